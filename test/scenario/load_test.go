package scenario

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// What the client asks the server: it may POST and not PUT, and may ask for names
// below example.com and for no others. The node of the server judges the requests,
// the client's the queries.
const (
	mayCall = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts:
    - ports: [{port: "8088", protocol: TCP}]
      rules: {http: [{method: POST}]}
    - ports: [{port: "53", protocol: UDP}]
`
	mayAsk = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: client}
spec:
  endpointSelector: {matchLabels: {app: client}}
  egress:
  - toEndpoints: [{matchLabels: {app: server}}]
    toPorts:
    - ports: [{port: "53", protocol: UDP}]
      rules: {dns: [{matchPattern: "*.example.com"}]}
    - ports: [{port: "8088", protocol: TCP}]
`
)

// outcome is what became of one try of a load.
type outcome string

const (
	asItShould outcome = "as it should"
	turnedAway outcome = "refused"      // by a reset, or by port unreachable
	noAnswer   outcome = "not answered" // for as long as anybody waits
	letBy      outcome = "let by"       // what no rule allows
)

// outcomeOf tells errors of a socket apart.
func outcomeOf(err error) outcome {
	for _, e := range []error{unix.ECONNREFUSED, unix.ECONNRESET, unix.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, e) {
			return turnedAway
		}
	}
	return noAnswer
}

// load is one thing that the client does again and again, until stop.
type load struct {
	what string
	stop func()

	mu    sync.Mutex
	tries []try // guarded by mu
}

type try struct {
	began, ended time.Time
	outcome      outcome
	err          error
}

// load has do done by so many at a time, each allowed thing in turn with one that
// is not.
func (w *world) load(what string, do func(allowed bool) (outcome, error)) *load {
	w.t.Helper()
	const workers = 2
	l := &load{what: what}
	stopped := make(chan struct{})
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			err := w.InWorkload("client", func() error {
				for allowed := true; ; allowed = !allowed {
					x := try{began: time.Now()}
					x.outcome, x.err = do(allowed)
					x.ended = time.Now()
					l.mu.Lock()
					l.tries = append(l.tries, x)
					l.mu.Unlock()
					select {
					case <-stopped:
						return nil
					case <-time.After(5 * time.Millisecond):
					}
				}
			})
			if err != nil {
				w.t.Errorf("%s: %v", what, err)
			}
		})
	}
	l.stop = sync.OnceFunc(func() { close(stopped); wg.Wait() })
	w.t.Cleanup(l.stop)
	return l
}

// goesOn waits until each of the loads has had an outcome again, of tries from now
// on.
func goesOn(w *world, when string, want outcome, loads ...*load) {
	w.t.Helper()
	now := time.Now()
	for _, l := range loads {
		w.eventually(when+": "+l.what+" "+string(want), func() error {
			n, last := 0, error(nil)
			for _, x := range l.since(now) {
				if x.outcome == want {
					n++
				} else {
					last = fmt.Errorf("%s: %w", x.outcome, x.err)
				}
			}
			if n < 4 {
				return fmt.Errorf("%d times; last else: %w", n, last)
			}
			return nil
		})
	}
}

// since returns the tries that have begun since then.
func (l *load) since(then time.Time) (out []try) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, x := range l.tries {
		if x.began.After(then) {
			out = append(out, x)
		}
	}
	return out
}

// summary tells of tries since something broke: for how long they were refused, and
// how many were.
func (l *load) summary(broke time.Time) string {
	count, late := map[outcome]int{}, 0
	var last time.Time
	var slowest time.Duration
	for _, x := range l.since(broke) {
		count[x.outcome]++
		if x.outcome != asItShould && x.ended.After(last) {
			last = x.ended
		}
		if x.outcome == asItShould && x.ended.Sub(x.began) > 2*time.Second {
			late++ // asked again
		}
		if x.outcome == turnedAway {
			slowest = max(slowest, x.ended.Sub(x.began))
		}
	}
	gap := time.Duration(0)
	if !last.IsZero() {
		gap = last.Sub(broke)
	}
	return fmt.Sprintf("%s: failed for %v; %d refused (the slowest after %v), %d not answered, %d let by; %d as they should be, %d of them late", l.what,
		gap.Round(time.Millisecond), count[turnedAway], slowest.Round(time.Millisecond), count[noAnswer], count[letBy], count[asItShould], late)
}

// none fails the test for each try since then that has such an outcome.
func (l *load) none(w *world, since time.Time, of ...outcome) {
	w.t.Helper()
	for _, x := range l.since(since) {
		if slices.Contains(of, x.outcome) {
			w.t.Errorf("%s, %s: %v, after %v", l.what, x.outcome, x.err, x.ended.Sub(x.began))
		}
	}
}

// requests makes requests at an address of the server, each on a connection of its
// own.
func (x *web) requests(what string, ip netip.Addr) *load {
	return x.w.load(what, func(allowed bool) (outcome, error) {
		c, err := net.DialTimeout("tcp", netip.AddrPortFrom(ip, webPort).String(), patience)
		if err != nil {
			return outcomeOf(err), err
		}
		defer c.Close()
		return (&caller{x.w, c, bufio.NewReader(c)}).try(allowed)
	})
}

// try makes a request that is allowed, or one that is not.
func (c *caller) try(allowed bool) (outcome, error) {
	method, want := http.MethodPut, http.StatusForbidden
	if allowed {
		method, want = http.MethodPost, http.StatusOK
	}
	switch code, _, err := c.ask(method, "/", patience); {
	case err != nil:
		return outcomeOf(err), err
	case code != want && !allowed:
		return letBy, fmt.Errorf("%s is answered %d", method, code)
	case code != want:
		return noAnswer, fmt.Errorf("%s is answered %d", method, code)
	}
	return asItShould, nil
}

// queries asks for names at an address of the server, and again after 2 s where there
// is no answer: a query that is under way is lost with who relays it.
func (w *world) queries(what string, ip netip.Addr) *load {
	return w.load(what, func(allowed bool) (of outcome, err error) {
		for began := time.Now(); time.Since(began) < patience; {
			if of, err = query(ip, allowed, 2*time.Second); of != noAnswer {
				break
			}
		}
		return of, err
	})
}

// query asks once for a name that may be asked for, or for one that may not. It is
// called in the client's namespace.
func query(ip netip.Addr, allowed bool, patience time.Duration) (outcome, error) {
	name, want := "api.example.org.", dns.RcodeRefused
	if allowed {
		name, want = "api.example.com.", dns.RcodeSuccess
	}
	client := &dns.Client{Timeout: patience}
	m, _, err := client.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), netip.AddrPortFrom(ip, 53).String())
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return noAnswer, err
	case err != nil:
		return outcomeOf(err), err
	case m.Rcode != want && !allowed:
		return letBy, fmt.Errorf("%s is answered %s", name, dns.RcodeToString[m.Rcode])
	case m.Rcode != want:
		return noAnswer, fmt.Errorf("%s is answered %s", name, dns.RcodeToString[m.Rcode])
	}
	return asItShould, nil
}

const longest = time.Minute // of leases: nothing waits for the end of such a one

// loaded is a world whose client makes requests and asks for names, by both
// families.
type loaded struct {
	*world
	web      *web
	names    *asked
	requests []*load
	queries  []*load
}

func newLoaded(t *testing.T, ttl time.Duration) *loaded {
	t.Helper()
	return newLoadedOf(t, program, ttl)
}

// newLoadedOf makes one whose agents are of a binary.
func newLoadedOf(t *testing.T, binary string, ttl time.Duration) *loaded {
	t.Helper()
	w := newWorldOf(t, binary, func(c *lab.Config) { c.TTL = ttl })
	x := &loaded{world: w, web: w.serveWeb()}
	x.names = w.serveNames(map[string]netip.Addr{"api.example.com.": inBlock.Addr()})
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "server.yaml", Content: []byte(mayCall)}))
	w.must(w.ImportPoliciesAt(t.Context(), owner, &api.PolicyFile{Name: "client.yaml", Content: []byte(mayAsk)}))
	for _, ip := range []netip.Addr{w.server.IP4(), w.server.IP6()} {
		x.requests = append(x.requests, x.web.requests("HTTP to "+ip.String(), ip))
		x.queries = append(x.queries, w.queries("DNS to "+ip.String(), ip))
	}
	goesOn(w, "at first", asItShould, x.all()...)
	return x
}

func (x *loaded) all() []*load {
	return append(x.requests[:len(x.requests):len(x.requests)], x.queries...)
}

// safe ends the loads, and checks that nothing was let by.
func (x *loaded) safe() {
	x.t.Helper()
	for _, l := range x.all() {
		l.stop()
		l.none(x.world, time.Time{}, letBy, noAnswer)
	}
	if puts, beyond := x.web.puts.Load(), x.names.beyond.Load(); puts > 0 || beyond > 0 {
		x.t.Errorf("%d requests and %d queries have come to the server that no rule allows", puts, beyond)
	}
}
