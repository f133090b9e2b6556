package agent

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"portcullis/authz"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
	"portcullis/proxy"
	"portcullis/proxy/feed"
)

// What policies say inside protocols goes to the node's proxy, set by set, before
// the kernel names the set: a flow that the kernel judges so is refused by a proxy
// that does not know how.

// putSet puts an endpoint's new policy set into the kernel, after the proxy was
// told of it.
func (l *loop) putSet(id uint32, set authz.Set, before policySet) error {
	if l.feed != nil && (set.LooksInside() || l.feed.Knows(before.id)) {
		// One that looks inside no more is told too: connections that the proxy
		// has live on by it.
		if err := l.feed.Put(id, set.Inside()); err != nil {
			return fmt.Errorf("rules inside protocols: %w", err)
		}
	}
	if err := l.dp.PutPolicy(id, set.WithSet(id)); err != nil {
		l.forgetSet(id)
		return err
	}
	return nil
}

// forgetSet says that the kernel names a set no more.
func (l *loop) forgetSet(id uint32) {
	l.steered.behind = l.steered.behind || len(l.steered.sets[id]) > 0
	if l.feed != nil {
		l.feed.Drop(id)
	}
}

// tellPeer tells the proxy what a set says of a peer alone, before the kernel
// has it, and when it is over.
func (l *loop) tellPeer(s *authz.Subject, n identity.Numeric) error {
	if l.feed == nil {
		return nil
	}
	e := l.bySubject[s]
	of, host := e.policy.set.InsideOf(n)
	return l.feed.PutPeer(e.policy.id, n, of, host)
}

// tellPeers does so of all that a change of a set speaks of.
func (l *loop) tellPeers(s *authz.Subject, d authz.Delta) error {
	if l.feed == nil {
		return nil
	}
	told := map[uint32]bool{}
	for _, k := range slices.AppendSeq(slices.Clone(d.Remove), maps.Keys(d.Add)) {
		if told[k.Identity] {
			continue
		}
		told[k.Identity] = true
		if err := l.tellPeer(s, identity.Numeric(k.Identity)); err != nil {
			return err
		}
	}
	return nil
}

// forgetPeer tells the proxy that nobody bears a number any more, before it may
// be given to another identity, and returns the message that the proxy must have
// heard for that.
func (l *loop) forgetPeer(n identity.Numeric) (message uint64) {
	if l.feed == nil {
		return 0
	}
	for _, e := range l.endpoints {
		if err := l.feed.PutPeer(e.policy.id, n, nil, false); err != nil {
			l.log.Error("tell the proxy of a number that is gone", zap.Error(err)) // it cannot: nothing is put
		}
	}
	return l.feed.Said()
}

// insides hears what the proxy says. Its methods are called beside the loop.
type insides struct{ l *loop }

// Record implements feed.Handler.
func (i insides) Record(r *proxy.Record) {
	i.l.countInside(r)
	if i.l.monitors.empty() {
		return
	}
	i.l.monitors.publish(i.l.insideRecord(r))
}

// Lost implements feed.Handler.
func (i insides) Lost(n uint64) {
	i.l.instruments.InsideLost(n)
	i.l.monitors.lose(n)
	i.l.keepLost(n, flow.LostProxy)
}

// Learn implements feed.Handler.
func (i insides) Learn(ctx context.Context, c proxy.Conn, set uint32, a feed.Answer) error {
	return i.l.learnNames(ctx, c, set, a)
}

// requestsKept is how many requests a second the proxy tells of, beside those that
// were refused, while nobody monitors: telling of all of them would cost more than
// to let them by, and --flows is not that many.
func (c Config) requestsKept() int { return min(c.Flows, 200) }

// hearWait is how long a reader waits until the proxy knows of it.
const hearWait = time.Second

// hearRequests has the proxy tell of requests until stop is called. When it
// returns, what begins from now on is told: or the proxy is not there, or too
// busy to be waited for.
func (l *loop) hearRequests(ctx context.Context) (stop func()) {
	if l.feed == nil {
		return func() {}
	}
	ctx, cancel := context.WithTimeout(ctx, hearWait)
	defer cancel()
	return l.feed.Records(ctx)
}

// insideRecord makes a flow record of a proxy's. The ends are named by their
// addresses as they are held now: the flow is alive, or was a moment ago, so of
// a record of the past a name may be the next holder's.
func (l *loop) insideRecord(r *proxy.Record) flow.Record {
	out := flow.Record{Time: r.Time, Node: l.cfg.Node, Verdict: abi.VerdictPass, Direction: r.Conn.Direction, Protocol: r.Conn.Protocol,
		Source: flow.End{IP: r.Conn.Client.Addr(), Port: r.Conn.Client.Port()},
		Dest:   flow.End{IP: r.Conn.Server.Addr(), Port: r.Conn.Server.Port()},
		L7:     l.cfg.Records.asked(insideL7(r))}
	if r.Verdict != proxy.Forwarded {
		out.Verdict, out.Reason = abi.VerdictDrop, abi.ReasonPolicyDenied
	}
	local, peer := out.Local(), out.Peer()
	known, id, numeric := l.names.Holder(local.IP)
	local.Workload, local.Owner, local.Endpoint, local.Identity, out.Endpoint = known.Workload, known.Owner, id, numeric, id
	known, peer.Endpoint, _ = l.names.Holder(peer.IP)
	peer.Workload, peer.Owner = known.Workload, known.Owner
	peer.Identity = r.Peer.Identity
	resolve := l.resolver()
	resolve.Call(&out)
	for _, e := range []*flow.End{&out.Source, &out.Dest} {
		if id, ok := l.names.Identity(e.Identity); ok {
			e.Text, e.Labels, e.SPIFFE = id.Text, id.Labels, id.SPIFFE
		}
	}
	out.Process = l.callers.ofRequest(&out)
	return out
}

// Records is what the proxy records, and answers, beside what it always does.
// Query strings and headers may hold what nobody but the server is to see.
type Records struct {
	Queries  bool     // of requests hold query strings
	Headers  []string // of requests hold the values of these headers
	NXDomain bool     // names that rules do not allow are answered NXDOMAIN, not REFUSED
}

var headerName = regexp.MustCompile("^[0-9A-Za-z!#$%&'*+.^_`|~-]+$") // token of RFC 9110

func (c *Records) validate() (errs []error) {
	for _, h := range c.Headers {
		if !headerName.MatchString(h) {
			errs = append(errs, fmt.Errorf("--record-header %q: want the name of a header, e.g. User-Agent", h))
		}
	}
	return errs
}

// args are the flags of the proxy for it.
func (c *Records) args() (args []string) {
	if c.Queries {
		args = append(args, "--record-queries")
	}
	for _, h := range c.Headers {
		args = append(args, "--record-header", h)
	}
	if c.NXDomain {
		args = append(args, "--dns-nxdomain")
	}
	return args
}

// asked takes out of a record what this agent was not told to record: the proxy
// may be one that an earlier agent started.
func (c *Records) asked(x *flow.L7) *flow.L7 {
	if !c.Queries {
		x.Path, _, _ = strings.Cut(x.Path, "?")
	}
	x.Header = slices.DeleteFunc(x.Header, func(h string) bool {
		name, _, _ := strings.Cut(h, ":")
		return !slices.ContainsFunc(c.Headers, func(s string) bool { return strings.EqualFold(s, name) })
	})
	return x
}

func insideL7(r *proxy.Record) *flow.L7 {
	out := &flow.L7{Verdict: string(r.Verdict), Reason: r.Reason, Rule: r.Rule, Name: r.ServerName}
	if r.Parser != l7.ParserNone {
		out.Protocol = r.Parser.String()
	}
	if h := r.HTTP; h != nil {
		out.Version, out.Method, out.Path, out.Host, out.Status, out.Latency = h.Version, h.Method, h.Path, h.Host, h.Status, h.Latency
		for _, field := range h.Header {
			out.Header = append(out.Header, field[0]+": "+field[1])
		}
	}
	if d := r.DNS; d != nil {
		name := d.Name // with a final dot, which is all of the root's
		if len(name) > 1 {
			name = strings.TrimSuffix(name, ".")
		}
		out.Name, out.Type, out.Code, out.Addresses, out.TTL, out.Latency = name, d.Type, d.Code, d.Addresses, d.TTL, d.Latency
	}
	return out
}
