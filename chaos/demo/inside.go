package demo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/observe/flow"
)

// Step 6: rules inside protocols. It goes on in the lease lab while step 3 is
// told of the classic one, in three parts at once; it is told after step 5.
const (
	landing     = "/v1/request-landing"
	exhaustPort = "/v1/exhaust-port"
	year2017    = "story-2017" // namespace of the workloads of 2017
	worldPort   = 5000
)

// inside is one telling of step 6.
type inside struct {
	l     *lab.Lab
	parts [3]*story     // told apart, and merged when it has ended
	done  chan struct{} // closed at the end; the parts and err may be read then
	err   error
}

// insideWorkloads are those of step 6 that no step before it has.
func insideWorkloads() []lab.Workload {
	out := parse("names.cluster.yaml").Workloads
	for _, w := range parse("policy-tree-2017.cluster.yaml").Workloads {
		if w.Name == "deathstar" || w.Name == "ship" {
			w.Namespace = year2017
			out = append(out, w)
		}
	}
	return out
}

// startInside begins step 6; it ends early with ctx.
func startInside(ctx context.Context, l *lab.Lab) *inside {
	i := &inside{l: l, done: make(chan struct{})}
	go func() {
		defer close(i.done)
		i.err = i.run(ctx)
	}()
	return i
}

func (i *inside) run(ctx context.Context) error {
	tell := []func(context.Context, *story) error{i.requests, i.tree, i.names}
	var errs [3]error
	var wg sync.WaitGroup
	for n := range tell {
		s := &story{out: new(bytes.Buffer)}
		i.parts[n] = s
		wg.Go(func() { errs[n] = tell[n](ctx, s) })
	}
	wg.Wait()
	return errors.Join(errs[:]...)
}

// mergeInside waits for the end of step 6 and tells it.
func (s *story) mergeInside(i *inside) error {
	<-i.done
	s.say("\n6. Rules inside protocols: flows that need it, and no others, go through a proxy of their node.")
	for _, p := range i.parts {
		if p != nil {
			s.say("%s", strings.TrimSuffix(p.out.(*bytes.Buffer).String(), "\n"))
			s.report.Steps = append(s.report.Steps, p.report.Steps...)
		}
	}
	return i.err
}

// requests is networkpolicy-L7.yaml.
func (i *inside) requests(ctx context.Context, s *story) error {
	s.say(" networkpolicy-L7.yaml: of what the empire's ships may ask the deathstar on port 80, landing only.")
	t, err := i.talk("tiefighter", "deathstar", "one")
	if err != nil {
		return err
	}
	if err := i.l.ImportPoliciesAt(ctx, "one", policyFile("networkpolicy-L7.yaml")); err != nil {
		return err
	}
	if err := t.serves(ctx); err != nil {
		return err
	}
	if err := t.open(ctx); err != nil {
		return err
	}
	defer t.close()
	const name = "6. networkpolicy-L7.yaml: "
	t.step(ctx, s, Step{Name: name + "landing", Does: "tiefighter asks the deathstar for landing", Expected: landed}, isLanded, "POST", landing)
	t.step(ctx, s, Step{Name: name + "exhaust port", Does: "tiefighter puts something into the exhaust port, on the same connection", Expected: denied}, isDenied, "PUT", exhaustPort)
	t.step(ctx, s, Step{Name: name + "landing again", Does: "it asks for landing again, on the same connection", Expected: landed}, isLanded, "POST", landing)
	xwing, err := i.l.Get("xwing")
	if err != nil {
		return err
	}
	a := &act{l: i.l, from: "xwing", args: httpArgs("post", "http://deathstar"+landing), judges: []string{"one"}, allowed: landed, reasons: []string{"policy-denied"},
		flow: flowFilter{src: xwing.IP4(), dst: t.to.IP4(), port: 80, proto: "TCP"}}
	s.do(Step{Name: name + "xwing", Mode: "lease", Does: "xwing, which may ask for nothing, asks for landing", Expected: expectDrop(a.reasons...)},
		func(st *Step) error { return a.run(ctx, st) })
	return ctx.Err()
}

// tree is the policy tree of 2017, judged at the ship's side.
func (i *inside) tree(ctx context.Context, s *story) error {
	s.say(" policy-tree-2017-http.json: what ships may ask whatever deathstar, judged at the ship's side.")
	t, err := i.talk(year2017+"/ship", year2017+"/deathstar", "two")
	if err != nil {
		return err
	}
	use := func(tree string) error {
		for _, node := range []string{"one", "two"} {
			if err := i.l.ImportPoliciesAt(ctx, node, policyFile(tree)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := use("policy-tree-2017-http.json"); err != nil {
		return err
	}
	if err := t.serves(ctx); err != nil {
		return err
	}
	if err := t.open(ctx); err != nil {
		return err
	}
	defer func() { t.close() }()
	const force = "X-Has-Force: true"
	t.step(ctx, s, Step{Name: "6. 2017: landing", Does: "a ship asks for landing", Expected: landed}, isLanded, "POST", landing)
	t.step(ctx, s, Step{Name: "6. 2017: exhaust port", Does: "it puts something into the exhaust port", Expected: denied}, isDenied, "PUT", exhaustPort, force)
	s.say(" policy-tree-2017-jedi.json: whoever has the force may.")
	if err := use("policy-tree-2017-jedi.json"); err != nil {
		return err
	}
	t.step(ctx, s, Step{Name: "6. jedi: without the force", Does: "the same connection, the changed policy: the exhaust port, without the force", Expected: denied}, isDenied, "PUT", exhaustPort)
	t.step(ctx, s, Step{Name: "6. jedi: with the force", Does: "the exhaust port, with " + force, Expected: exploded}, isExploded, "PUT", exhaustPort, force)
	s.do(Step{Name: "6. jedi: the deathstar comes back", Mode: "lease", Does: "it is started again, and a ship asks for landing", Expected: landed},
		func(st *Step) error {
			if err := t.serves(ctx); err != nil {
				return err
			}
			st.Observed, st.OK = landed, true
			return nil
		})
	return ctx.Err()
}

// names is toFQDNs.
func (i *inside) names(ctx context.Context, s *story) error {
	s.say(" names-policies.yaml: freighters may ask for *.alliance.example, and call yavin.alliance.example only.")
	closeWorld, err := i.world()
	if err != nil {
		return err
	}
	defer closeWorld()
	if err := i.l.ImportPoliciesAt(ctx, "three", policyFile("names-policies.yaml")); err != nil {
		return err
	}
	holonet, err := i.l.Get("holonet")
	if err != nil {
		return err
	}
	get := func(from, name string) (answer, error) {
		args := append(httpArgs("get", fmt.Sprintf("http://%s:%d/", name, worldPort)), "--dns", holonet.IP4().String())
		return probe(ctx, i.l, from, args...)
	}
	var yavin netip.AddrPort
	s.do(Step{Name: "6. toFQDNs: an allowed name", Mode: "lease", Does: "falcon asks the holonet for yavin.alliance.example, and calls what it is told at once", Expected: answered},
		func(st *Step) error {
			for deadline := time.Now().Add(20 * time.Second); ; {
				a, err := get("falcon", "yavin.alliance.example")
				if err != nil {
					return err
				}
				st.Detail = fmt.Sprintf("%s, the name is %s (%s)", a, a.Remote, a.Code)
				if a.Code == "" && time.Now().Before(deadline) && ctx.Err() == nil {
					continue // the proxy is being started: no answer from DNS yet
				}
				if st.Observed = "no answer"; a.Status == http.StatusOK {
					st.Observed = answered
				}
				// The first packet of the first connection: nothing was sent twice.
				st.OK = a.Status == http.StatusOK && a.Retrans == 0
				yavin, err = netip.ParseAddrPort(a.Remote)
				return err
			}
		})
	s.do(Step{Name: "6. toFQDNs: a name that may not be asked for", Mode: "lease", Does: "it asks for coruscant.empire.example", Expected: "REFUSED"},
		func(st *Step) error { return i.refusedName(ctx, st, get) })
	if !yavin.IsValid() {
		return ctx.Err() // the step has failed, and there is nothing to call
	}
	return errors.Join(i.notByOthers(ctx, s, yavin), ctx.Err())
}

func (i *inside) refusedName(ctx context.Context, st *Step, get func(from, name string) (answer, error)) error {
	w, err := watchNode(ctx, i.l, "three", &api.MonitorRequest{Verdicts: []string{"drop"}})
	if err != nil {
		return err
	}
	defer w.stop()
	a, err := get("falcon", "coruscant.empire.example")
	if err != nil {
		return err
	}
	st.Observed = a.Code
	e := find([]*watch{w}, 10*time.Second, func(e *api.FlowEvent) bool { return e.GetL7().GetName() == "coruscant.empire.example" })
	if e == nil {
		return errors.New("monitor tells nothing of the query")
	}
	st.Detail = describeL7(e)
	st.OK = a.Code == "REFUSED" && a.Status == 0 && e.GetL7().GetVerdict() == "denied"
	return nil
}

// notByOthers: what one workload was told admits nothing for another, and a name
// that may only be asked for admits nothing.
func (i *inside) notByOthers(ctx context.Context, s *story, yavin netip.AddrPort) error {
	steps := []struct{ name, does, from, to string }{
		{"another's address", "ghost, under the same policy, was told nothing: it calls the address that falcon was told", "ghost", yavin.String()},
		{"a name to ask for only", "falcon calls hoth.alliance.example, a name that it may ask for", "falcon", "203.0.113.20:5000"},
	}
	parts := make([]*story, len(steps))
	var wg sync.WaitGroup
	for n, x := range steps {
		from, err := i.l.Get(x.from)
		if err != nil {
			return err
		}
		to := netip.MustParseAddrPort(x.to)
		a := &act{l: i.l, from: x.from, args: []string{"tcp", x.to, "--timeout", callTimeout.String()}, judges: []string{"three"}, allowed: "connected",
			reasons: []string{"policy-denied"}, flow: flowFilter{src: from.IP4(), dst: to.Addr(), port: uint32(to.Port()), proto: "TCP"}}
		parts[n] = &story{out: new(bytes.Buffer)}
		wg.Go(func() {
			parts[n].do(Step{Name: "6. toFQDNs: " + x.name, Mode: "lease", Does: x.does, Expected: expectDrop(a.reasons...)},
				func(st *Step) error { return a.run(ctx, st) })
		})
	}
	wg.Wait()
	for _, p := range parts {
		s.say("%s", strings.TrimSuffix(p.out.(*bytes.Buffer).String(), "\n"))
		s.report.Steps = append(s.report.Steps, p.report.Steps...)
	}
	return nil
}

// world serves HTTP at the addresses that the holonet tells of.
func (i *inside) world() (closed func(), err error) {
	ips := []netip.Addr{netip.MustParseAddr("203.0.113.10"), netip.MustParseAddr("203.0.113.20"), netip.MustParseAddr("203.0.113.30")}
	if err := i.l.World("one", ips...); err != nil {
		return nil, err
	}
	var ln net.Listener
	err = i.l.InNode("one", func() (err error) {
		ln, err = net.Listen("tcp4", fmt.Sprintf(":%d", worldPort))
		return err
	})
	if err != nil {
		return nil, err
	}
	srv := &http.Server{ReadHeaderTimeout: callTimeout, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "Welcome to "+r.Host+"\n")
	})}
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	return func() { srv.Close(); <-done }, nil
}

// What a request can come to, beside landed.
const (
	denied   = "403 Access denied"
	exploded = "503 Panic: deathstar exploded"
)

// reply is an answer to a request, as it came.
type reply struct {
	code   int
	header http.Header
	body   string
}

func isLanded(r reply) (string, bool) { return landed, r.code == 200 && r.body == "Ship landed\n" }

// isDenied tells of exactly the answer of a refused request.
func isDenied(r reply) (string, bool) {
	return denied, r.code == 403 && r.body == "Access denied\n" && len(r.header["Content-Type"]) == 1 &&
		r.header.Get("Content-Type") == "text/plain; charset=utf-8" && r.header.Get("X-Content-Type-Options") == "nosniff" && r.header.Get("Connection") == ""
}

func isExploded(r reply) (string, bool) {
	return exploded, r.code == 503 && strings.HasPrefix(r.body, "Panic: deathstar exploded")
}

// talking is one workload's requests to another's port 80, on one connection.
type talking struct {
	l        *lab.Lab
	from, to lab.Running
	judge    string // node whose proxy judges
	conn     net.Conn
	r        *bufio.Reader
}

func (i *inside) talk(from, to, judge string) (*talking, error) {
	t := &talking{l: i.l, judge: judge}
	var err error
	if t.from, err = i.l.Get(from); err == nil {
		t.to, err = i.l.Get(to)
	}
	return t, err
}

func (t *talking) open(ctx context.Context) (err error) {
	if t.conn, err = dialIn(t.l, t.from.Spec.FullName(), netip.AddrPortFrom(t.to.IP4(), 80), 5*time.Second); err == nil {
		t.r = bufio.NewReader(t.conn)
	}
	return err
}

func (t *talking) close() {
	if t.conn != nil {
		t.conn.Close()
	}
}

// ask makes one request on the connection.
func (t *talking) ask(method, path string, header ...string) (r reply, err error) {
	if err := t.conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return r, err
	}
	lines := append([]string{method + " " + path + " HTTP/1.1", "Host: " + t.to.Spec.Name, "Content-Length: 0"}, header...)
	if _, err := io.WriteString(t.conn, strings.Join(lines, "\r\n")+"\r\n\r\n"); err != nil {
		return r, err
	}
	resp, err := http.ReadResponse(t.r, nil)
	if err != nil {
		return r, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return reply{resp.StatusCode, resp.Header, string(b)}, err
}

// serves waits until landing is answered on a connection of its own: the proxy
// runs, and the deathstar does.
func (t *talking) serves(ctx context.Context) error {
	var last error
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		once := *t
		if last = once.open(ctx); last == nil {
			var r reply
			r, last = once.ask("POST", landing)
			once.close()
			if _, ok := isLanded(r); ok {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return fmt.Errorf("%s is not answered by %s: %w", t.from.Spec.FullName(), t.to.Spec.FullName(), last)
}

// step makes one request, and looks for what monitor tells of it.
func (t *talking) step(ctx context.Context, s *story, st Step, want func(reply) (string, bool), method, path string, header ...string) {
	st.Mode = "lease"
	s.do(st, func(st *Step) error {
		w, err := watchNode(ctx, t.l, t.judge, &api.MonitorRequest{Prefixes: []string{t.from.IP4().String()}})
		if err != nil {
			return err
		}
		defer w.stop()
		r, err := t.ask(method, path, header...)
		if err != nil {
			return err
		}
		word, ok := want(r)
		first, _, _ := strings.Cut(r.body, "\n")
		st.Observed, st.Detail = fmt.Sprintf("%d %s", r.code, first), ""
		if ok {
			st.Observed, st.Detail = word, fmt.Sprintf("%d %s", r.code, first)
		}
		e := find([]*watch{w}, 10*time.Second, func(e *api.FlowEvent) bool {
			x := e.GetL7()
			return x.GetMethod() == method && x.GetPath() == path && int(x.GetStatus()) == r.code
		})
		if e == nil {
			return fmt.Errorf("%s, but monitor tells nothing of the request", st.Observed)
		}
		st.Detail = strings.TrimPrefix(st.Detail+"\n"+describeL7(e), "\n")
		passed := e.GetL7().GetVerdict() == "forwarded" && e.GetVerdict() == "pass"
		st.OK = ok && passed == (word != denied)
		return nil
	})
}

// describeL7 writes an event of the proxy's as monitor does.
func describeL7(e *api.FlowEvent) string {
	r, err := api.ToRecord(e)
	if err != nil {
		return err.Error()
	}
	return "monitor of node " + e.GetNode() + ": " + flow.Formatter{}.Line(&r)
}
