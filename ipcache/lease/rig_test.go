package lease_test

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
	"portcullis/ipcache/lease"
)

const (
	ms     = time.Millisecond
	ttl    = 3 * time.Second
	margin = 100 * ms
	flight = 30 * ms
)

var (
	ip1   = netip.MustParseAddr("10.0.0.1")
	ip2   = netip.MustParseAddr("10.0.0.2")
	bootO = identity.BootID{'o'}
	bootV = identity.BootID{'v'}
	y1    = identity.New("td", "ns", "y1", nil)
	y2    = identity.New("td", "ns", "y2", nil)
	w0    = identity.UID{1}
	w1    = identity.UID{2}
	w2    = identity.UID{3}
)

// only returns the outputs (or messages) of one type, in order.
func only[T any](outs any) []T {
	var all []any
	switch outs := outs.(type) {
	case []lease.OwnerOutput:
		for _, o := range outs {
			all = append(all, o)
			if s, ok := o.(lease.SendToVerifier); ok {
				all = append(all, s.Message)
			}
			if j, ok := o.(lease.Journal); ok {
				all = append(all, j.Record)
			}
		}
	case []lease.VerifierOutput:
		for _, o := range outs {
			all = append(all, o)
			if s, ok := o.(lease.SendToOwner); ok {
				all = append(all, s.Message)
			}
		}
	}
	var r []T
	for _, o := range all {
		if x, ok := o.(T); ok {
			r = append(r, x)
		}
	}
	return r
}

func one[T any](t testing.TB, outs any) T {
	t.Helper()
	r := only[T](outs)
	if len(r) != 1 {
		var z T
		t.Fatalf("want one %T, got %d in %+v", z, len(r), outs)
	}
	return r[0]
}

func none[T any](t *testing.T, outs any) {
	t.Helper()
	if r := only[T](outs); len(r) != 0 {
		t.Fatalf("want no %T, got %+v", r[0], r)
	}
}

// ownerRig drives an owner by hand.
type ownerRig struct {
	t       *testing.T
	o       *lease.Owner
	now     lease.Time
	cfg     lease.OwnerConfig
	journal []lease.Record
	active  map[identity.UID]identity.Generation
}

func newOwner(t *testing.T, change func(*lease.OwnerConfig)) *ownerRig {
	t.Helper()
	var nonce uint64
	r := &ownerRig{t: t, now: lease.Time(time.Hour), active: map[identity.UID]identity.Generation{}}
	r.cfg = lease.OwnerConfig{
		Node: "o", Boot: bootO, ReuseMargin: margin, Flight: flight,
		Nonce:   func() (n lease.Nonce) { nonce++; binary.BigEndian.PutUint64(n[:], nonce); return },
		Mine:    func(ip netip.Addr) bool { return netip.MustParsePrefix("10.0.0.0/24").Contains(ip) },
		Journal: lease.JournalMissing, FreshRanges: true,
	}
	if change != nil {
		change(&r.cfg)
	}
	r.start()
	return r
}

func (r *ownerRig) start() {
	r.t.Helper()
	o, err := lease.NewOwner(r.cfg, r.now)
	if err != nil {
		r.t.Fatal(err)
	}
	r.o = o
}

// restart crashes the agent and starts another. lost: without the journal.
func (r *ownerRig) restart(lost bool, adopt ...lease.Adopt) {
	r.t.Helper()
	r.cfg.Journal, r.cfg.Records, r.cfg.FreshRanges = lease.JournalPresent, slices.Clone(r.journal), false
	if lost {
		r.cfg.Journal, r.cfg.Records, r.journal = lease.JournalMissing, nil, nil
	}
	r.start()
	for _, a := range adopt {
		none[lease.Rejected](r.t, r.step(a))
	}
	r.tick()
}

func (r *ownerRig) step(in lease.OwnerInput) []lease.OwnerOutput {
	out := r.o.Step(r.now, in)
	r.journal = append(r.journal, only[lease.Record](out)...)
	for _, a := range only[lease.Activate](out) {
		r.active[a.UID] = a.Generation
	}
	return out
}

func (r *ownerRig) tick() []lease.OwnerOutput { return r.step(lease.OwnerTick{}) }

func (r *ownerRig) wait(d time.Duration) []lease.OwnerOutput {
	r.now = r.now.Add(d)
	return r.tick()
}

func (r *ownerRig) add(uid identity.UID, id identity.Identity, ips ...netip.Addr) []lease.OwnerOutput {
	return r.step(lease.Add{UID: uid, IPs: ips, Identity: id})
}

func (r *ownerRig) del(uid identity.UID) []lease.OwnerOutput {
	delete(r.active, uid)
	return r.step(lease.Delete{UID: uid})
}

func (r *ownerRig) msg(s lease.StreamID, m lease.Message) []lease.OwnerOutput {
	return r.step(lease.FromVerifier{Stream: s, Message: m})
}

// accept opens a stream and returns the nonce.
func (r *ownerRig) accept(s lease.StreamID) lease.Nonce {
	r.t.Helper()
	return one[lease.Challenge](r.t, r.step(lease.StreamAccepted{Stream: s, Verifier: "v"})).Nonce
}

func hello(n lease.Nonce, held ...lease.Held) lease.Hello {
	return lease.Hello{Nonce: n, Verifier: "v", Boot: bootV, Held: held, SentAt: 1, Ask: ttl}
}

// open opens a session.
func (r *ownerRig) open(s lease.StreamID, held ...lease.Held) lease.Welcome {
	r.t.Helper()
	return one[lease.Welcome](r.t, r.msg(s, hello(r.accept(s), held...)))
}

func (r *ownerRig) confirm(s lease.StreamID, ip netip.Addr) lease.Binding {
	r.t.Helper()
	return one[lease.Binding](r.t, r.msg(s, lease.Confirm{ID: 1, IP: ip}))
}

func held(b lease.Binding) lease.Held {
	return lease.Held{Ref: lease.Ref{IP: b.Binding.IP, Generation: b.Binding.Generation, Boot: bootO}, Identity: b.Binding.Identity.Hash()}
}

// activatesAfter asserts that the workload is bound when d has passed, and not before.
func (r *ownerRig) activatesAfter(uid identity.UID, d time.Duration) {
	r.t.Helper()
	r.wait(d - 1)
	if _, ok := r.active[uid]; ok {
		r.t.Fatalf("active before %v", d)
	}
	r.wait(1)
	if _, ok := r.active[uid]; !ok {
		r.t.Fatalf("not active after %v", d)
	}
}

// verifierRig drives a verifier by hand.
type verifierRig struct {
	t      *testing.T
	v      *lease.Verifier
	table  *ipcache.Table
	now    lease.Time
	stream lease.StreamID
	last   []lease.VerifierOutput
}

func newVerifier(t *testing.T, change func(*lease.VerifierConfig)) *verifierRig {
	t.Helper()
	table, err := ipcache.New(ipcache.Config{Slots: 8, Leases: 8, NextStamp: 1})
	if err != nil {
		t.Fatal(err)
	}
	return newVerifierOver(t, table, change)
}

func newVerifierOver(t *testing.T, table *ipcache.Table, change func(*lease.VerifierConfig)) *verifierRig {
	t.Helper()
	r := &verifierRig{t: t, table: table, now: lease.Time(2 * time.Hour)}
	cfg := lease.VerifierConfig{
		Node: "v", Boot: bootV, TTL: ttl, Heartbeat: 500 * ms,
		Speaks: func(o identity.NodeName, ip netip.Addr) bool {
			return (o == "o" || o == "o2") && netip.MustParsePrefix("10.0.0.0/24").Contains(ip)
		},
	}
	if change != nil {
		change(&cfg)
	}
	var err error
	if r.v, err = lease.NewVerifier(cfg, table, r.now); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *verifierRig) step(in lease.VerifierInput) []lease.VerifierOutput {
	r.last = r.v.Step(r.now, in)
	return r.last
}

func (r *verifierRig) wait(d time.Duration) []lease.VerifierOutput {
	r.now = r.now.Add(d)
	return r.step(lease.VerifierTick{})
}

func (r *verifierRig) msg(m lease.Message) []lease.VerifierOutput {
	return r.step(lease.FromOwner{Stream: r.stream, Message: m})
}

func (r *verifierRig) want(ip netip.Addr) []lease.VerifierOutput {
	return r.step(lease.Want{IP: ip, Owner: "o", Arrival: r.now})
}

// greet answers an OpenStream and brings the session to Hello.
func (r *verifierRig) greet() lease.Hello {
	r.t.Helper()
	r.stream++
	r.step(lease.StreamOpened{Owner: "o", Stream: r.stream})
	return one[lease.Hello](r.t, r.msg(lease.Challenge{Nonce: lease.Nonce{byte(r.stream)}}))
}

// welcome completes the session; every held binding stands, unless revoked.
func (r *verifierRig) welcome(h lease.Hello, revoked ...lease.Ref) []lease.VerifierOutput {
	r.t.Helper()
	w := lease.Welcome{Boot: bootO, Echo: h.SentAt, TTL: h.Ask, Revoked: revoked}
	for _, x := range h.Held {
		if !slices.Contains(revoked, x.Ref) {
			w.Stands = append(w.Stands, x.Ref)
		}
	}
	return r.msg(w)
}

// session opens a session because the IP is wanted, and returns the Confirm.
func (r *verifierRig) session(ip netip.Addr) lease.Confirm {
	r.t.Helper()
	one[lease.OpenStream](r.t, r.want(ip))
	return one[lease.Confirm](r.t, r.welcome(r.greet()))
}

func binding(c lease.Confirm, gen identity.Generation, id identity.Identity) lease.Binding {
	return lease.Binding{
		Confirm: c.ID, Since: -1, Flight: flight,
		Binding: identity.Binding{IP: c.IP, Generation: gen, UID: identity.UID{byte(gen)}, Identity: id, Owner: "o"},
	}
}

// index tells at which place of the outputs something stands; -1: nowhere.
func index(outs []lease.VerifierOutput, is func(lease.VerifierOutput) bool) int {
	return slices.IndexFunc(outs, is)
}

func isA[T any](o lease.VerifierOutput) bool {
	if s, ok := o.(lease.SendToOwner); ok {
		if _, ok := s.Message.(T); ok {
			return true
		}
	}
	_, ok := any(o).(T)
	return ok
}

// ordered asserts that the first output of each kind comes before the next's.
func ordered(t *testing.T, outs []lease.VerifierOutput, is ...func(lease.VerifierOutput) bool) {
	t.Helper()
	at := -1
	for i, f := range is {
		j := index(outs, f)
		if j < 0 || j <= at {
			t.Fatalf("output %d of the wanted order is at %d, after one at %d, in:\n%s", i, j, at, dump(outs))
		}
		at = j
	}
}

func dump(outs []lease.VerifierOutput) (s string) {
	for _, o := range outs {
		s += fmt.Sprintf("  %T%+v\n", o, o)
	}
	return s
}
