package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/authz"
	"portcullis/authz/names"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/proxy"
	"portcullis/proxy/feed"
)

// putNames puts a policy by names, and another one by blocks around them, into
// force for two workloads.
func (n *node) putNames(l *loop) {
	n.t.Helper()
	rule := func(path string, peer authz.PeerSelector, port uint16) authz.Rule {
		return authz.Rule{Direction: abi.DirEgress, Action: authz.Allow, Peers: []authz.PeerSelector{peer}, Ports: []authz.PortRange{authz.Port(authz.ProtoTCP, port)}, Path: path}
	}
	for _, name := range []string{"a0", "a1"} {
		p := &authz.Policy{Ref: authz.Ref{Kind: "Test", Namespace: "default", Name: name}, Specs: []authz.Spec{{Subject: authz.Selector{authz.Label("app", name)}, DenyEgress: true,
			Rules: []authz.Rule{rule("names", authz.DNSName{Pattern: "*.example.com"}, 80), rule("block", authz.Block{Prefix: netip.MustParsePrefix("198.51.0.0/16")}, 443)}}}}
		if err := l.repo.Put(p); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := l.applyPolicies(); err != nil {
		n.t.Fatal(err)
	}
}

// tell does what the proxy asks for, with the loop's part on the test's goroutine.
func tell(l *loop, e *endpoint, name string, ips ...string) error {
	a := feed.Answer{Name: name}
	for _, ip := range ips {
		a.Addresses = append(a.Addresses, feed.Address{IP: netip.MustParseAddr(ip), TTL: time.Minute})
	}
	done := make(chan error, 1)
	go func() {
		done <- l.learnNames(context.Background(), proxy.Conn{Client: netip.AddrPortFrom(e.ips[0], 5353)}, e.policy.id, a)
	}()
	(<-l.inbox)()
	return <-done
}

func reaches(e *endpoint, n identity.Numeric, port uint16) bool {
	return e.policy.set.Judge(abi.DirEgress, n, authz.ProtoTCP, port).Verdict == abi.VerdictPass
}

func TestLearnt(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("a1")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a, b := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("a1", "10.1.1.3"))
	n.putNames(l)
	epoch, around := a.policy.id, func() identity.Numeric { at, _ := n.worldAt(l, "198.51.100.8"); return at }
	before := around()

	for _, step := range []error{tell(l, a, "www.example.com", "198.51.100.7", "2001:db8::7"), tell(l, a, "www.other.org", "198.51.100.9"),
		tell(l, b, "b.example.com", "203.0.113.5"), tell(l, a, "in.example.com", "10.1.1.3", "127.0.0.1", "224.0.0.1", "169.254.1.1", "192.0.2.1")} {
		if step != nil {
			t.Fatal(step)
		}
	}
	if got := [][]string{l.names.Names(a.id, netip.MustParseAddr("198.51.100.7")), l.names.Names(b.id, netip.MustParseAddr("203.0.113.5")),
		l.names.Names(b.id, netip.MustParseAddr("198.51.100.7")), l.names.Names(a.id, netip.MustParseAddr("198.51.100.9"))}; !slices.Equal(got[0], []string{"www.example.com"}) ||
		!slices.Equal(got[1], []string{"b.example.com"}) || got[2] != nil || got[3] != nil {
		t.Errorf("flow records name addresses %q", got)
	}
	verify := func(when string) {
		t.Helper()
		for _, c := range []struct {
			ip        string
			a, b, any bool // on port 80; any: on 443, by the block
		}{
			{"198.51.100.7", true, false, true}, {"2001:db8::7", true, false, false}, {"198.51.100.8", false, false, true},
			{"198.51.100.9", false, false, true}, {"203.0.113.5", false, true, false}, {"203.0.113.6", false, false, false},
		} {
			at, known := n.worldAt(l, c.ip)
			if known || reaches(a, at, 80) != c.a || reaches(b, at, 80) != c.b || reaches(a, at, 443) != c.any || reaches(b, at, 443) != c.any {
				t.Errorf("%s: %s (number %d, known %v): %v %v on port 80, %v %v on port 443", when, c.ip, at, known, reaches(a, at, 80), reaches(b, at, 80), reaches(a, at, 443), reaches(b, at, 443))
			}
		}
		for _, ip := range []string{"10.1.1.3", "10.1.1.77"} {
			if _, known := n.worldAt(l, ip); !known {
				t.Errorf("%s: %s needs no binding", when, ip)
			}
		}
	}
	verify("told")
	if around() != before || a.policy.id != epoch {
		t.Error("an address that was learnt changes the number around it, or the epoch")
	}
	if len(l.learnt.numbers) != 3 {
		t.Errorf("numbers for %v", l.learnt.numbers)
	}

	// Of a set that is not the endpoint's, nothing is learnt.
	one := []names.Address{{IP: netip.MustParseAddr("198.51.100.99"), TTL: time.Minute}}
	for _, set := range []uint32{0, b.policy.id, 1 << 30} {
		if err := l.learn(a.ips[0], set, "www.example.com", one); !errors.Is(err, errNobody) {
			t.Errorf("set %d: %v", set, err)
		}
	}
	if err := l.learn(netip.MustParseAddr("10.1.1.99"), a.policy.id, "www.example.com", one); !errors.Is(err, errNobody) {
		t.Errorf("nobody's address: %v", err)
	}

	// What was asked for under an earlier set of its own counts.
	asked := a.policy.id
	n.importPolicy(l, strings.Replace(denyAll, "podSelector: {}", "podSelector: {matchLabels: {app: a0}}", 1))
	n.importPolicy(l, strings.Replace(denyAll, "podSelector: {}", "podSelector: {matchLabels: {app: none}}", 1))
	if a.policy.id == asked || len(a.policy.former) < 2 {
		t.Fatalf("the policy has not changed twice: %d, before it %v", a.policy.id, a.policy.former)
	}
	if err := l.learn(a.ips[0], asked, "late.example.com", one); err != nil {
		t.Errorf("asked for under an earlier set: %v", err)
	}
	if at, _ := n.worldAt(l, "198.51.100.99"); !reaches(a, at, 80) {
		t.Error("asked for under an earlier set, and not admitted")
	}
	e := policySet{id: 1}
	for id := range uint32(3 * formerSets) {
		e = policySet{id: id + 2, former: e.before()}
	}
	if len(e.former) != formerSets || e.former[0] != e.id-1 {
		t.Errorf("kept of %d: %v", e.id, e.former)
	}

	// A restart keeps it.
	l.storeNames()
	n.crash(l)
	l = n.mustStart()
	a, b = l.byIP[netip.MustParseAddr("10.1.1.2")], l.byIP[netip.MustParseAddr("10.1.1.3")]
	n.putNames(l)
	verify("after a restart")

	// What has expired stays while a flow lives, and then goes.
	old := func(e *endpoint) {
		book := names.New(names.Options{Grace: 1})
		for _, x := range e.book.Entries() {
			x.Expires = 0
			book.Restore(int64(l.now()), []names.Entry{x})
		}
		e.book, l.learnt.next = book, 0
	}
	l.sawFlows([]datapath.Pair{{Local: a.ips[0], Remote: netip.MustParseAddr("198.51.100.7")}, {Local: b.ips[0], Remote: netip.MustParseAddr("2001:db8::7")}})
	old(a)
	l.expireNames()
	if at, _ := n.worldAt(l, "198.51.100.7"); !reaches(a, at, 80) {
		t.Error("an address with a live flow has gone")
	}
	if at, _ := n.worldAt(l, "2001:db8::7"); reaches(a, at, 80) || l.learnt.users[netip.MustParseAddr("2001:db8::7")] > 0 {
		t.Error("an address without a flow of its own is kept")
	}
	clear(l.learnt.live)
	old(a)
	l.expireNames()
	if at, _ := n.worldAt(l, "198.51.100.7"); at != around() || reaches(a, at, 80) || len(l.learnt.numbers) != 1 {
		t.Errorf("198.51.100.7 is %d still, around it %d; numbers %v", at, around(), l.learnt.numbers)
	}
	// So does what an endpoint knew that ends.
	if _, err := l.deregister(b.uid); err != nil {
		t.Fatal(err)
	}
	l.learnt.next = 0
	l.expireNames()
	if len(l.learnt.numbers)+len(l.learnt.users) > 0 {
		t.Errorf("what a workload knew that has ended is kept: %v", l.learnt)
	}
}

// A kernel without room admits nothing, and says so.
func TestLearntWithoutRoom(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.cfg.RangeEntries = 16
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a := n.run(l, app("a0", "10.1.1.2"))
	n.putNames(l)
	var err error
	for i := range 32 {
		ip := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
		if err = tell(l, a, "www.example.com", ip.String()); err != nil {
			if _, numbered := l.learnt.numbers[ip]; numbered || len(a.book.Names(ip)) > 0 || l.learnt.users[ip] > 0 {
				t.Errorf("%s is kept, though it was refused", ip)
			}
			break
		}
	}
	if err == nil {
		t.Error("32 addresses fit into 16 ranges")
	}
}

// What workloads were told is listed by endpoint and name, with what it is
// admitted on and the connections to it.
func TestListNames(t *testing.T) {
	n := newNode(t)
	n.veth("a0")
	n.veth("a1")
	l := n.mustStart()
	defer func() { n.crash(l) }()
	a, b := n.run(l, app("a0", "10.1.1.2")), n.run(l, app("a1", "10.1.1.3"))
	n.putNames(l)
	for _, err := range []error{tell(l, a, "www.example.com", "198.51.100.7", "2001:db8::7"), tell(l, a, "b.example.com", "198.51.100.8"), tell(l, b, "www.example.com", "203.0.113.5")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	s := &server{l: l}
	ask := func(uid, name string) (out []string) {
		t.Helper()
		type reply struct {
			r   *api.ListNamesResponse
			err error
		}
		done := make(chan reply, 1)
		go func() {
			r, err := s.ListNames(context.Background(), &api.ListNamesRequest{Uid: uid, Name: name})
			done <- reply{r, err}
		}()
		(<-l.inbox)()
		got := <-done
		if got.err != nil {
			t.Fatal(got.err)
		}
		for _, x := range got.r.Names {
			for _, ip := range x.Addresses {
				out = append(out, fmt.Sprintf("%d %s %s %s %s %d", x.Endpoint, x.Workload.Name, x.Name, ip.Ip, ip.Source, ip.Connections))
				if ttl := ip.Ttl.AsDuration(); (ip.Source == onLookup) != (ttl > 0) || ttl > time.Minute {
					t.Errorf("%s has %v left", ip.Ip, ttl)
				}
			}
		}
		return out
	}
	row := func(e *endpoint, rest string) string { return fmt.Sprintf("%d %s %s", e.id, e.name, rest) }
	for _, c := range []struct {
		uid, name string
		want      []string
	}{
		{"", "", []string{row(a, "b.example.com 198.51.100.8 lookup 0"), row(a, "www.example.com 198.51.100.7 lookup 0"), row(a, "www.example.com 2001:db8::7 lookup 0"),
			row(b, "www.example.com 203.0.113.5 lookup 0")}},
		{b.uid.String(), "", []string{row(b, "www.example.com 203.0.113.5 lookup 0")}},
		{a.uid.String(), "B.example.com.", []string{row(a, "b.example.com 198.51.100.8 lookup 0")}},
		{"", "*.example.org", nil},
	} {
		if got := ask(c.uid, c.name); !slices.Equal(got, c.want) {
			t.Errorf("%q %q: %q, want %q", c.uid, c.name, got, c.want)
		}
	}
	if _, err := s.ListNames(t.Context(), &api.ListNamesRequest{Name: "a..b"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no name: %v", err)
	}
	old := b.book.Entries()
	old[0].Expires = 0
	b.book = names.New(names.Options{})
	b.book.Restore(int64(l.now()), old)
	if got, want := ask(b.uid.String(), ""), []string{row(b, "www.example.com 203.0.113.5 grace 0")}; !slices.Equal(got, want) {
		t.Errorf("expired: %q, want %q", got, want)
	}
}
