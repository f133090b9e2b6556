package conformance

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"

	"portcullis/authz"
	"portcullis/bpf"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
)

// tcxNext is what a program returns to let a packet pass: TCX_NEXT, -1.
const tcxNext, tcxDrop, tcxRedirect = math.MaxUint32, 2, 7

// kernel is the loaded object.
type kernel struct {
	*testing.T
	coll         *ebpf.Collection
	events, held *ringbuf.Reader
	stamp        uint64
	sets         [2]map[abi.PolicyKey]abi.Policy // in the map: this round's and the last
	ranges       map[abi.RangeKey]bool           // in the map
	sctp         bool                            // the object tells SCTP ports apart
}

func loadObject(t *testing.T) *kernel {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it loads the programs into the kernel")
		}
		t.Skip("needs root: it loads the programs into the kernel")
	}
	spec, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(bpf.Object))
	if err != nil {
		t.Fatal(err)
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatalf("%+v", err)
	}
	k := &kernel{T: t, coll: coll}
	t.Cleanup(coll.Close)
	for name, r := range map[string]**ringbuf.Reader{"events": &k.events, "held": &k.held} {
		if *r, err = ringbuf.NewReader(coll.Maps[name]); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { (*r).Close() })
	}
	k.put("uplinks", uint32(uplink), abi.Uplink{})
	k.put("leases", uint32(abi.LeaseLocal), abi.Lease{Deadline: math.MaxUint64})
	k.put("leases", uint32(abi.LeaseClassic), abi.Lease{Deadline: math.MaxUint64}) // yet the mode is lease
	k.put("leases", liveLease, abi.Lease{Deadline: math.MaxUint64})
	k.put("leases", expiredLease, abi.Lease{Deadline: 1})
	return k
}

func (k *kernel) put(name string, key, value any) {
	k.Helper()
	if err := k.coll.Maps[name].Put(key, value); err != nil {
		k.Fatalf("%s: %v", name, err)
	}
}

// install fills the maps for a round: the set, the endpoint, ranges, bindings.
func (k *kernel) install(round uint32, set authz.Set, who numbers) {
	k.Helper()
	for key := range k.sets[round%2] {
		if err := k.coll.Maps["policy"].Delete(key); err != nil {
			k.Fatal(err)
		}
	}
	k.sets[round%2] = set.WithSet(round)
	for key, entry := range k.sets[round%2] {
		k.put("policy", key, entry)
	}
	var flags abi.EndpointFlag
	if set.EnforceIngress {
		flags |= abi.EPEnforceIngress
	}
	if set.EnforceEgress {
		flags |= abi.EPEnforceEgress
	}
	if set.LocalHost {
		flags |= abi.EPAdmitHost
	}
	k.put("endpoints", uint32(loopback), abi.Endpoint{
		IP4: addr(ownV4), IP6: addr(ownV6), ID: round, Ifindex: loopback, State: uint32(abi.EPActive),
		Flags: uint32(flags), Policy: round, HoldIndex: 1,
	})
	k.put("state", uint32(0), abi.State{ReaderTick: math.MaxUint64 / 2, RangeEpoch: uint64(round)})
	known := map[netip.Prefix]abi.Range{}
	for _, r := range ranges {
		known[netip.MustParsePrefix(r.prefix)] = abi.Range{Flags: uint32(r.flags)}
	}
	for key := range k.ranges {
		if err := k.coll.Maps["ranges"].Delete(key); err != nil {
			k.Fatal(err)
		}
	}
	k.ranges = map[abi.RangeKey]bool{}
	for p, v := range datapath.FoldRanges(known, who.world) {
		key := abi.RangeKey{Prefixlen: uint32(p.Bits()), Addr: addr(p.Addr())}
		if p.Addr().Is4() {
			key.Prefixlen += 96
		}
		k.put("ranges", key, v)
		k.ranges[key] = true
	}
	slot := uint32(1)
	for _, p := range peers {
		for _, ip := range []string{p.v4, p.v6} {
			if p.slot == nil {
				continue
			}
			k.stamp++
			s := *p.slot
			s.Stamp, s.IP, s.Identity = k.stamp, addr(netip.MustParseAddr(ip)), uint32(who.of(p, netip.MustParseAddr(ip)))
			if p.revoked {
				s.Stamp = 0
			}
			k.put("slots", slot, s)
			k.put("bindings", s.IP, abi.Binding{Slot: slot, Stamp: k.stamp})
			slot++
		}
	}
}

func peerNamed(name string) *peer {
	for _, p := range peers {
		if p.name == name {
			return p
		}
	}
	panic(name)
}

// run gives a packet to a program and returns what that returns.
func (k *kernel) run(dir abi.Direction, p packet, from uint32) uint32 {
	k.Helper()
	program := "to_workload"
	if dir == abi.DirEgress {
		program = "from_workload"
	}
	// struct __sk_buff up to ifindex.
	ctx := [11]uint32{9: from, 10: loopback}
	ret, err := k.coll.Programs[program].Run(&ebpf.RunOptions{Data: p.bytes(), Context: ctx, Repeat: 1})
	if err != nil {
		k.Fatalf("%s: %v", program, err)
	}
	return ret
}

// event takes the next event out of its ring.
func (k *kernel) event(p packet) (ev abi.Event) {
	k.Helper()
	k.events.SetDeadline(time.Now().Add(time.Second))
	rec, err := k.events.Read()
	if err != nil {
		k.Fatalf("%+v: no event: %v", p, err)
	}
	if err := binary.Read(bytes.NewReader(rec.RawSample), binary.LittleEndian, &ev); err != nil {
		k.Fatal(err)
	}
	if ev.Src != addr(p.src) || ev.Dst != addr(p.dst) || ev.Proto != p.proto {
		k.Fatalf("%+v: the event of another packet: %+v", p, ev)
	}
	return ev
}

// drain takes the held packet out of its ring, gives its place back, and
// checks that it is the one that was sent.
func (k *kernel) drain(dir abi.Direction, p packet, reason abi.Reason) {
	k.Helper()
	k.held.SetDeadline(time.Now().Add(time.Second))
	rec, err := k.held.Read()
	if err != nil {
		k.Fatalf("%+v: held, and not in the ring: %v", p, err)
	}
	var h abi.Held
	if err := binary.Read(bytes.NewReader(rec.RawSample), binary.LittleEndian, &h); err != nil {
		k.Fatal(err)
	}
	sent, peer := p.bytes(), p.src
	if dir == abi.DirEgress {
		peer = p.dst
	}
	if h.Peer != addr(peer) || h.Direction != uint8(dir) || h.Reason != uint8(reason) ||
		!bytes.Equal(rec.RawSample[binary.Size(h):][:h.Len], sent) {
		k.Fatalf("%+v: held as %+v", p, h)
	}
	for i := range uint32(2) {
		k.put("hold_quota", i, abi.HoldQuota{})
	}
}

// The kernel's verdict, reason, need of evidence and deciding rule are the
// evaluator's, for generated policies, peers and packets.
func TestKernelIsEvaluator(t *testing.T) {
	const seed, rounds, packets = 11, 400, 60
	k := loadObject(t)
	r := rand.New(rand.NewPCG(seed, 0))
	k.probe()
	seen := map[[2]string]int{}
	sport, count := uint16(1024), 0
	for round := uint32(2); round < 2+rounds; round++ { // 1 was the probe's
		repo := authz.NewRepository(authz.Options{TrustDomain: trustDomain, LocalHost: r.IntN(2) == 0})
		for i := range 1 + r.IntN(4) {
			if err := repo.Put(somePolicy(r, i)); err != nil {
				t.Fatal(err)
			}
		}
		alloc := identity.NewAllocator()
		repo.SetBlockGroup("some", map[string]string{"zone": "x"}, []netip.Prefix{someBlock(r), someBlock(r)})
		who := number(r, repo, alloc)
		for i, p := range peers {
			if id, ok := alloc.Lookup(who.who[p][0]); ok && p.reserved == "" {
				repo.AddPorts(uint64(i+1), id, someNamed(r))
			}
		}
		set := repo.Compile(someIdentity(r), authz.PeersIn(alloc.All, alloc.Region), someNamed(r)...)
		others := set // as it judges whoever is not the node itself
		others.LocalHost = false
		k.install(round, set, who)
		for range packets {
			p, dir := peers[r.IntN(len(peers))], abi.Direction(r.IntN(2))
			pkt := somePacket(r, p, dir, k.sctp)
			pkt.sport = sport
			sport = max(sport+1, 1024)
			far := pkt.src
			if dir == abi.DirEgress {
				far = pkt.dst
			}
			set := set
			if p.inbound == nobody {
				set = others
			}
			d := set.Judge(dir, who.of(p, far), pkt.proto, pkt.policyPort())
			verdict, reason := p.expect(d, dir)
			ret := k.run(dir, pkt, p.from)
			ev := k.event(pkt)

			wantRet := uint32(tcxDrop)
			if verdict == abi.VerdictPass {
				wantRet = tcxNext
			}
			if ret != wantRet || ev.Verdict != uint8(verdict) || ev.Reason != uint8(reason) ||
				ev.Flags&uint8(abi.EventNoEvidence) != 0 == d.NeedsEvidence || ev.Rule != p.rule(set, d, dir, pkt) {
				t.Fatalf("round %d, %s, peer %q (%s), %+v:\nkernel %s, %s, rule %d, flags %d, returned %#x\nwant   %s, %s, %+v",
					round, dir, p.name, who.of(p, far), pkt, abi.Verdict(ev.Verdict), abi.Reason(ev.Reason), ev.Rule, ev.Flags, ret, verdict, reason, d)
			}
			switch verdict {
			case abi.VerdictHold:
				k.drain(dir, pkt, reason)
			case abi.VerdictPass:
				// The flow is known now; the same packet passes without a word.
				if ret := k.run(dir, pkt, p.from); ret != tcxNext || k.events.AvailableBytes() != 0 {
					t.Fatalf("%s, peer %q, %+v: the second packet: %#x, %d bytes of events", dir, p.name, pkt, ret, k.events.AvailableBytes())
				}
			}
			seen[[2]string{dir.String(), verdict.String() + " " + reason.String()}]++
			if set.LocalHost && dir == abi.DirIngress && p.name == "host" && verdict == abi.VerdictPass && others.Judge(dir, who.of(p, far), pkt.proto, pkt.policyPort()).Verdict != verdict {
				seen[[2]string{"host", "let in"}]++
			}
			if d.LeastEvidence == identity.EvidenceSVID && verdict == abi.VerdictDrop && p.name == "local" {
				seen[[2]string{"local", "no svid"}]++
			}
			if pkt.proto == authz.ProtoSCTP {
				seen[[2]string{"SCTP", verdict.String()}]++
			}
			count++
		}
		k.sameLookups(r, set, round)
	}
	t.Logf("%d packets: %v", count, seen)
	for _, dir := range []string{"ingress", "egress"} {
		for _, what := range []string{"pass none", "drop policy-denied", "drop stale-lease", "drop unbound", "drop evidence-too-weak"} {
			if seen[[2]string{dir, what}] == 0 {
				t.Errorf("%s: never %s", dir, what)
			}
		}
	}
	for _, dir := range []string{"ingress", "egress"} {
		for _, what := range []string{"hold unbound", "hold stale-lease"} {
			if seen[[2]string{dir, what}] == 0 {
				t.Errorf("%s: never %s", dir, what)
			}
		}
	}
	for _, what := range [][2]string{{"host", "let in"}, {"local", "no svid"}} {
		if seen[what] == 0 {
			t.Errorf("never: %s", what)
		}
	}
	if seen[[2]string{"ingress", "drop spoofed"}] == 0 {
		t.Error("ingress: never drop spoofed")
	}
	for _, what := range []string{"pass", "drop"} {
		if k.sctp && seen[[2]string{"SCTP", what}] == 0 {
			t.Errorf("SCTP: never %s", what)
		}
	}
}

// probe asks the object whether it can tell SCTP ports apart, so that the test
// asks no less of it.
func (k *kernel) probe() {
	k.Helper()
	repo := authz.NewRepository(authz.Options{TrustDomain: trustDomain})
	if err := repo.Put(&authz.Policy{Ref: authz.Ref{Kind: "Test", Namespace: "a", Name: "probe"}, Specs: []authz.Spec{{DenyIngress: true, Rules: []authz.Rule{
		{Direction: abi.DirIngress, Action: authz.Allow, AnyPeer: true, Ports: []authz.PortRange{authz.Port(authz.ProtoSCTP, 80)}}}}}}); err != nil {
		k.Fatal(err)
	}
	k.install(1, repo.Compile(identity.New(trustDomain, "a", "x", nil), authz.Peers(identity.NewAllocator().All)), numbers{})
	p := packet{src: netip.MustParseAddr(peerNamed("world").v4), dst: ownV4, proto: authz.ProtoSCTP, sport: 1, dport: 80}
	k.sctp = k.run(abi.DirIngress, p, uplink) == tcxNext
	k.event(p)
	if !k.sctp {
		k.Log("NOT TESTED, the object cannot do it yet: SCTP ports")
	}
}

// rule is the one that the record must name. Where the peer's identity does
// not count, it is that of the decision without it.
func (p *peer) rule(set authz.Set, d authz.Decision, dir abi.Direction, pkt packet) uint32 {
	how := p.outbound
	if dir == abi.DirIngress {
		how = p.inbound
	}
	if d.NeedsEvidence && how != bound && how != ranged {
		return set.Judge(dir, authz.NoPeer, pkt.proto, pkt.policyPort()).Rule
	}
	return d.Rule
}

// sameLookups: the kernel's trie and Set.Lookup agree, set beside set.
func (k *kernel) sameLookups(r *rand.Rand, set authz.Set, round uint32) {
	k.Helper()
	for range 60 {
		key := abi.PolicyKey{Prefixlen: uint32(abi.PolicyPrefixPort), Direction: uint8(r.IntN(2)),
			Proto: pick(r, []uint8{authz.ProtoTCP, authz.ProtoUDP, authz.ProtoICMP, authz.ProtoSCTP}), Identity: uint32(abi.IDAny)}
		binary.BigEndian.PutUint16(key.Port[:], uint16(r.IntN(1<<16)))
		for other := range set.WithSet(0) { // any one
			key.Identity = other.Identity
			break
		}
		want, wantOK := set.Lookup(key)
		key.Set = round
		var got abi.Policy
		err := k.coll.Maps["policy"].Lookup(key, &got)
		if (err == nil) != wantOK || got != want {
			k.Fatalf("%+v: kernel %+v, %v; set %+v, %v", key, got, err, want, wantOK)
		}
	}
}

func somePacket(r *rand.Rand, p *peer, dir abi.Direction, sctp bool) packet {
	far, own := netip.MustParseAddr(p.v4), ownV4
	icmp := uint8(authz.ProtoICMP)
	if r.IntN(2) == 0 {
		far, own, icmp = netip.MustParseAddr(p.v6), ownV6, authz.ProtoICMPv6
	}
	pkt := packet{src: far, dst: own, proto: pick(r, []uint8{authz.ProtoTCP, authz.ProtoTCP, authz.ProtoUDP, icmp})}
	if sctp && r.IntN(5) == 0 {
		pkt.proto = authz.ProtoSCTP
	}
	if dir == abi.DirEgress {
		pkt.src, pkt.dst = own, far
	}
	if pkt.proto != icmp {
		if pkt.dport = pick(r, somePorts); r.IntN(4) == 0 {
			pkt.dport = uint16(r.IntN(1 << 16))
		}
	}
	return pkt
}
