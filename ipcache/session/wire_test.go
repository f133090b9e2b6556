package session

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

func ip(s string) []byte { return netip.MustParseAddr(s).AsSlice() }

func sixteen() []byte { return make([]byte, 16) }

func goodBinding() *WireBinding {
	return &WireBinding{
		Ip: ip("10.1.0.7"), Generation: 1, Uid: sixteen(),
		Identity: &WireIdentity{TrustDomain: "portcullis.lab", Namespace: "default", ServiceAccount: "sleep", Labels: map[string]string{"app": "sleep"}},
		Ports:    []*WirePort{{Name: "http", Port: 80, Protocol: "TCP"}},
	}
}

func announce(change func(*WireBinding)) *FromOwner {
	b := goodBinding()
	change(b)
	return &FromOwner{Message: &FromOwner_Announce_{&FromOwner_Announce{Binding: b}}}
}

func unknownField(m proto.Message) {
	m.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 99, protowire.VarintType), 1))
}

// Each frame has one thing wrong, which the error must name.
func TestDecodeFromOwnerRefuses(t *testing.T) {
	ref := func() *WireRef { return &WireRef{Ip: ip("10.1.0.7"), Generation: 1, Boot: sixteen()} }
	welcome := func(change func(*FromOwner_Welcome)) *FromOwner {
		w := &FromOwner_Welcome{Boot: sixteen(), Stands: []*WireRef{ref()}}
		change(w)
		return &FromOwner{Message: &FromOwner_Welcome_{w}}
	}
	for _, test := range []struct {
		want  string
		frame *FromOwner
	}{
		{"no message", &FromOwner{}},
		{"nonce has 15", &FromOwner{Message: &FromOwner_Challenge_{&FromOwner_Challenge{Nonce: make([]byte, 15)}}}},
		{"nonce has 0", &FromOwner{Message: &FromOwner_Challenge_{&FromOwner_Challenge{}}}},
		{"boot has 17", welcome(func(w *FromOwner_Welcome) { w.Boot = make([]byte, 17) })},
		{"ttl of 1m0.000000001s", welcome(func(w *FromOwner_Welcome) { w.Ttl = int64(lease.MaxLease) + 1 })},
		{"ttl of -1ns", welcome(func(w *FromOwner_Welcome) { w.Ttl = -1 })},
		{"echo is before", welcome(func(w *FromOwner_Welcome) { w.Echo = -1 })},
		{"generation is 0", welcome(func(w *FromOwner_Welcome) { w.Stands[0].Generation = 0 })},
		{"IPv4-mapped", welcome(func(w *FromOwner_Welcome) {
			w.Revoked = []*WireRef{ref(), {Ip: ip("::ffff:10.1.0.7"), Generation: 1, Boot: sixteen()}}
		})},
		{"an IP has 0 bytes", welcome(func(w *FromOwner_Welcome) { w.Stands = []*WireRef{{}} })},
		{"stands lists 65537", welcome(func(w *FromOwner_Welcome) { w.Stands = make([]*WireRef, MaxHeld+1) })},
		{"revoked lists 65537", welcome(func(w *FromOwner_Welcome) { w.Revoked = make([]*WireRef, MaxHeld+1) })},
		{"WireRef has fields", welcome(func(w *FromOwner_Welcome) { unknownField(w.Stands[0]) })},
		{"Welcome has fields", welcome(func(w *FromOwner_Welcome) { unknownField(w) })},
		{"0 is no reason", &FromOwner{Message: &FromOwner_Refused_{&FromOwner_Refused{Ip: ip("10.1.0.7")}}}},
		{"8 is no reason", &FromOwner{Message: &FromOwner_Refused_{&FromOwner_Refused{Ip: ip("10.1.0.7"), Reason: 8}}}},
		{"264 is no reason", &FromOwner{Message: &FromOwner_Refused_{&FromOwner_Refused{Ip: ip("10.1.0.7"), Reason: 264}}}},
		{"no host's address", &FromOwner{Message: &FromOwner_Bound_{&FromOwner_Bound{Ip: ip("0.0.0.0")}}}},
		{"no host's address", &FromOwner{Message: &FromOwner_Bound_{&FromOwner_Bound{Ip: ip("127.0.0.1")}}}},
		{"no host's address", &FromOwner{Message: &FromOwner_Bound_{&FromOwner_Bound{Ip: ip("ff02::1")}}}},
		{"an IP has 5 bytes", &FromOwner{Message: &FromOwner_Bound_{&FromOwner_Bound{Ip: make([]byte, 5)}}}},
		{"seq is 0", &FromOwner{Message: &FromOwner_Revoke_{&FromOwner_Revoke{Ip: ip("10.1.0.7"), Generation: 1}}}},
		{"generation is 0", &FromOwner{Message: &FromOwner_Withdraw_{&FromOwner_Withdraw{Ip: ip("10.1.0.7")}}}},
		{"flight of", &FromOwner{Message: &FromOwner_Confirmed_{&FromOwner_Confirmed{Binding: goodBinding(), Flight: int64(time.Hour)}}}},
		{"an IP has 0 bytes", &FromOwner{Message: &FromOwner_Confirmed_{&FromOwner_Confirmed{}}}},
		{"uid has 0", announce(func(b *WireBinding) { b.Uid = nil })},
		{"no trust domain's name", announce(func(b *WireBinding) { b.Identity = nil })},
		{"no trust domain's name", announce(func(b *WireBinding) { b.Identity.TrustDomain = "spiffe://portcullis.lab" })},
		{"no name of a namespace", announce(func(b *WireBinding) { b.Identity.Namespace = "a/b" })},
		{"no name of a namespace", announce(func(b *WireBinding) { b.Identity.Namespace = "" })},
		{"no name of a service account", announce(func(b *WireBinding) { b.Identity.ServiceAccount = ".." })},
		{"no name of a service account", announce(func(b *WireBinding) { b.Identity.ServiceAccount = strings.Repeat("a", 254) })},
		{"a label with a key of 0", announce(func(b *WireBinding) { b.Identity.Labels[""] = "x" })},
		{"a label with a key", announce(func(b *WireBinding) { b.Identity.Labels["x"] = strings.Repeat("a", 254) })},
		{"printable", announce(func(b *WireBinding) { b.Identity.Labels["x"] = "\x1b[2J" })},
		{"257 labels", announce(func(b *WireBinding) {
			for i := range 256 {
				b.Identity.Labels[strings.Repeat("k", i+1)] = ""
			}
		})},
		{`reserved:"host"`, announce(func(b *WireBinding) { b.Identity = &WireIdentity{Reserved: "host"} })},
		{`reserved:"world"`, announce(func(b *WireBinding) { b.Identity = &WireIdentity{Reserved: "world"} })},
		{`reserved:"king"`, announce(func(b *WireBinding) { b.Identity = &WireIdentity{Reserved: "king"} })},
		{"a reserved identity with", announce(func(b *WireBinding) { b.Identity.Reserved = "remote-node" })},
		{"WireIdentity has fields", announce(func(b *WireBinding) { unknownField(b.Identity) })},
		{"0 is no port", announce(func(b *WireBinding) { b.Ports[0].Port = 0 })},
		{"65536 is no port", announce(func(b *WireBinding) { b.Ports[0].Port = 65536 })},
		{"no protocol", announce(func(b *WireBinding) { b.Ports[0].Protocol = "tcp" })},
		{"a port cannot", announce(func(b *WireBinding) { b.Ports[0].Name = "" })},
		{"257 named ports", announce(func(b *WireBinding) { b.Ports = make([]*WirePort, 257) })},
		{"WirePort has fields", announce(func(b *WireBinding) { unknownField(b.Ports[0]) })},
	} {
		m, err := decodeFromOwner(test.frame, "n1")
		if err == nil || m != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("want %q: %v, %v", test.want, m, err)
		}
	}
	if _, err := decodeFromOwner(announce(func(*WireBinding) {}), "n1"); err != nil {
		t.Errorf("what all these were made of: %v", err)
	}
}

func TestDecodeFromVerifierRefuses(t *testing.T) {
	hello := func(change func(*FromVerifier_Hello)) *FromVerifier {
		h := &FromVerifier_Hello{Nonce: sixteen(), Boot: sixteen(), Held: []*WireHeld{
			{Ref: &WireRef{Ip: ip("10.1.0.7"), Generation: 1, Boot: sixteen()}, Identity: make([]byte, 32)},
		}}
		change(h)
		return &FromVerifier{Message: &FromVerifier_Hello_{h}}
	}
	for _, test := range []struct {
		want  string
		frame *FromVerifier
	}{
		{"no message", &FromVerifier{}},
		{"nonce has", hello(func(h *FromVerifier_Hello) { h.Nonce = nil })},
		{"boot has", hello(func(h *FromVerifier_Hello) { h.Boot = nil })},
		{"sent_at is before", hello(func(h *FromVerifier_Hello) { h.SentAt = -1 })},
		{"ask of", hello(func(h *FromVerifier_Hello) { h.Ask = int64(lease.MaxLease) + 1 })},
		{"held lists", hello(func(h *FromVerifier_Hello) { h.Held = make([]*WireHeld, MaxHeld+1) })},
		{"an identity hash has 31", hello(func(h *FromVerifier_Hello) { h.Held[0].Identity = make([]byte, 31) })},
		{"an IP has 0", hello(func(h *FromVerifier_Hello) { h.Held[0].Ref = nil })},
		{"WireHeld has fields", hello(func(h *FromVerifier_Hello) { unknownField(h.Held[0]) })},
		{"FromVerifier has fields", func() *FromVerifier { f := hello(func(*FromVerifier_Hello) {}); unknownField(f); return f }()},
		{"an IP has", &FromVerifier{Message: &FromVerifier_Confirm_{&FromVerifier_Confirm{}}}},
		{"ask of", &FromVerifier{Message: &FromVerifier_Heartbeat_{&FromVerifier_Heartbeat{Ask: -1}}}},
		{"generation is 0", &FromVerifier{Message: &FromVerifier_Ack_{&FromVerifier_Ack{Ip: ip("10.1.0.7")}}}},
		{"generation is 0", &FromVerifier{Message: &FromVerifier_Release_{&FromVerifier_Release{Ip: ip("10.1.0.7")}}}},
	} {
		m, err := decodeFromVerifier(test.frame, "n1")
		if err == nil || m != nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("want %q: %v, %v", test.want, m, err)
		}
	}
	if _, err := decodeFromVerifier(hello(func(*FromVerifier_Hello) {}), "n1"); err != nil {
		t.Errorf("what all these were made of: %v", err)
	}
}

// The longest list that is allowed must fit into a frame.
func TestLargestHelloFitsIntoAFrame(t *testing.T) {
	h := lease.Hello{Held: make([]lease.Held, MaxHeld)}
	for i := range h.Held {
		h.Held[i].Ref = lease.Ref{IP: netip.MustParseAddr("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"), Generation: 1<<64 - 1}
	}
	f, err := encodeFromVerifier(h)
	if err != nil {
		t.Fatal(err)
	}
	if n := proto.Size(f); n > maxFrame {
		t.Errorf("%d bytes, a frame has %d", n, maxFrame)
	}
	w := lease.Welcome{Stands: make([]lease.Ref, MaxHeld)}
	for i := range w.Stands {
		w.Stands[i] = h.Held[i].Ref
	}
	o, err := encodeFromOwner(w)
	if err != nil {
		t.Fatal(err)
	}
	if n := proto.Size(o); n > maxFrame {
		t.Errorf("%d bytes, a frame has %d", n, maxFrame)
	}
}

// The numbers of refusals are the protocol's: those of package lease.
func TestRefusalNumbers(t *testing.T) {
	for n, name := range WireRefusal_name {
		want := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "WIRE_REFUSAL_"), "_", "-"))
		if got := lease.Refusal(n).String(); got != want {
			t.Errorf("refusal %d is %q in package lease and %q on the wire", n, got, want)
		}
	}
	if s := lease.Refusal(len(WireRefusal_name)).String(); s != "invalid" {
		t.Errorf("package lease has a refusal %q that the wire has not", s)
	}
}

// So are those of refused proofs.
func TestProofRefusalNumbers(t *testing.T) {
	for n, name := range WireProofRefusal_name {
		want := strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(name, "WIRE_PROOF_REFUSAL_"), "_", "-"))
		if want != "none" {
			want = "proof-" + want
		}
		if got := lease.ProofRefusal(n).String(); got != want {
			t.Errorf("refusal %d is %q in package lease and %q on the wire", n, got, want)
		}
	}
	if lease.ProofRefusal(len(WireProofRefusal_name)).Valid() {
		t.Error("package lease has a refusal that the wire has not")
	}
}

func TestCheckBinding(t *testing.T) {
	b := identity.Binding{IP: netip.MustParseAddr("10.1.0.7"), Generation: 1, Identity: identity.New("portcullis.lab", "default", "sleep", nil)}
	if err := CheckBinding(b); err != nil {
		t.Error(err)
	}
	b.Identity.Namespace = ""
	if err := CheckBinding(b); err == nil {
		t.Error("a binding that no agent understands was found good")
	}
}

// fuzz feeds a decoder: it must not panic, and what it accepts must survive
// being encoded and decoded again.
func fuzz(t *testing.T, frame []byte, decode func([]byte, identity.NodeName) (lease.Message, error), encode func(lease.Message) (proto.Message, error)) {
	m, err := decode(frame, "n1")
	if err != nil {
		if m != nil {
			t.Fatalf("an error and a message: %v", m)
		}
		return
	}
	f, err := encode(m)
	if err != nil {
		t.Fatalf("%+v was accepted but cannot be sent: %v", m, err)
	}
	again, err := proto.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	n, err := decode(again, "n1")
	if d := cmp.Diff(m, n, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.Addr{})); err != nil || d != "" {
		t.Fatalf("%v\n%s", err, d)
	}
}

func seed(f *testing.F, frames ...proto.Message) {
	for _, frame := range frames {
		b, err := proto.Marshal(frame)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{})
}

func FuzzFromVerifier(f *testing.F) {
	seed(f,
		&FromVerifier{Message: &FromVerifier_Hello_{&FromVerifier_Hello{Nonce: sixteen(), Boot: sixteen(), SentAt: 1, Ask: 1, Held: []*WireHeld{
			{Ref: &WireRef{Ip: ip("10.1.0.7"), Generation: 1, Boot: sixteen()}, Identity: make([]byte, 32)}}}}},
		&FromVerifier{Message: &FromVerifier_Confirm_{&FromVerifier_Confirm{Id: 1, Ip: ip("fd00::1")}}},
		&FromVerifier{Message: &FromVerifier_Heartbeat_{&FromVerifier_Heartbeat{SentAt: 1, Ask: 1}}},
		&FromVerifier{Message: &FromVerifier_Ack_{&FromVerifier_Ack{Ip: ip("10.1.0.7"), Generation: 1, Seq: 1}}},
		&FromVerifier{Message: &FromVerifier_Release_{&FromVerifier_Release{Ip: ip("10.1.0.7"), Generation: 1}}},
	)
	f.Fuzz(func(t *testing.T, frame []byte) {
		fuzz(t, frame, unmarshalFromVerifier, func(m lease.Message) (proto.Message, error) { return encodeFromVerifier(m) })
	})
}

func FuzzFromOwner(f *testing.F) {
	ref := &WireRef{Ip: ip("10.1.0.7"), Generation: 1, Boot: sixteen()}
	seed(f,
		&FromOwner{Message: &FromOwner_Challenge_{&FromOwner_Challenge{Nonce: sixteen()}}},
		&FromOwner{Message: &FromOwner_Welcome_{&FromOwner_Welcome{Boot: sixteen(), Stands: []*WireRef{ref}, Revoked: []*WireRef{ref}, Echo: 1, Ttl: 1}}},
		&FromOwner{Message: &FromOwner_Confirmed_{&FromOwner_Confirmed{Confirm: 1, Binding: goodBinding(), Since: -1, Flight: 1}}},
		&FromOwner{Message: &FromOwner_Refused_{&FromOwner_Refused{Confirm: 1, Ip: ip("10.1.0.7"), Reason: 3}}},
		&FromOwner{Message: &FromOwner_Revoke_{&FromOwner_Revoke{Ip: ip("10.1.0.7"), Generation: 1, Seq: 1}}},
		&FromOwner{Message: &FromOwner_Going_{&FromOwner_Going{}}},
		&FromOwner{Message: &FromOwner_Announce_{&FromOwner_Announce{Binding: &WireBinding{Ip: ip("fd00::1"), Generation: 1, Uid: sixteen(), Identity: &WireIdentity{Reserved: "remote-node"}}}}},
	)
	f.Fuzz(func(t *testing.T, frame []byte) {
		fuzz(t, frame, unmarshalFromOwner, func(m lease.Message) (proto.Message, error) { return encodeFromOwner(m) })
	})
}

// The configuration that handshakes are made with must say that nothing is
// resumed, and the assertion must notice if it did not.
func TestHardened(t *testing.T) {
	verify := func(tls.ConnectionState) error { return nil }
	good := func() *tls.Config {
		cfg := &tls.Config{VerifyPeerCertificate: nil, VerifyConnection: verify}
		(&proof{h: &handshaker{}}).harden(cfg)
		return cfg
	}
	cfg := good()
	if !cfg.SessionTicketsDisabled || cfg.ClientSessionCache != nil || cfg.MinVersion != tls.VersionTLS13 {
		t.Errorf("tickets disabled %v, cache %v, version %x", cfg.SessionTicketsDisabled, cfg.ClientSessionCache, cfg.MinVersion)
	}
	if err := cfg.VerifyConnection(tls.ConnectionState{DidResume: true, Version: tls.VersionTLS13}); err != errResumed {
		t.Errorf("a resumed connection: %v", err)
	}
	if err := cfg.VerifyConnection(tls.ConnectionState{Version: tls.VersionTLS13}); err == nil {
		t.Error("a connection whose peer nobody checked was accepted")
	}
	if err := checkHardened(cfg); err == nil {
		t.Error("a configuration that checks no peer was accepted")
	}
	for name, spoil := range map[string]func(*tls.Config){
		"tickets": func(c *tls.Config) { c.SessionTicketsDisabled = false },
		"cache":   func(c *tls.Config) { c.ClientSessionCache = tls.NewLRUClientSessionCache(1) },
		"version": func(c *tls.Config) { c.MinVersion = tls.VersionTLS12 },
		"peer":    func(c *tls.Config) { c.VerifyConnection = nil },
	} {
		cfg := good()
		cfg.VerifyPeerCertificate = func([][]byte, [][]*x509.Certificate) error { return nil }
		if err := checkHardened(cfg); err != nil {
			t.Fatal(err)
		}
		spoil(cfg)
		if err := checkHardened(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A peer that vanished is noticed by the kernel, on dialled and on accepted
// sockets.
func TestSocketsHaveAUserTimeout(t *testing.T) {
	lc := net.ListenConfig{Control: socketOptions(1234 * time.Millisecond)}
	ln, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	d := net.Dialer{Control: socketOptions(1234 * time.Millisecond)}
	dialled, err := d.DialContext(t.Context(), "tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer accepted.Close()
	for name, c := range map[string]net.Conn{"dialled": dialled, "accepted": accepted} {
		raw, err := c.(*net.TCPConn).SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Control(func(fd uintptr) {
			if ms, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); err != nil || ms != 1234 {
				t.Errorf("%s: TCP_USER_TIMEOUT is %d (%v)", name, ms, err)
			}
		})
	}
}
