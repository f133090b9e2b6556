package conformance

import (
	"net/netip"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

// corpusKernel judges a corpus' cells with the kernel's programs: the sets that
// were compiled for it lie in the map, and each cell is a packet of a peer that
// is bound under the cell's number, with as much evidence as there can be.
type corpusKernel struct {
	*kernel
	sets    map[*authz.RuleRef]uint32 // in the map, by their rules, which are no other set's
	next    uint32
	current uint32
	cells   int
	skipped int // of subjects that are not under policy
	entries int

	unsupported int // ICMP that is neither echo nor error
	steered     int // to the proxy
}

func newCorpusKernel(t *testing.T) *corpusKernel {
	k := &corpusKernel{kernel: loadObject(t), sets: map[*authz.RuleRef]uint32{}, next: 1}
	k.put("ranges", abi.RangeKey{Prefixlen: 0}, abi.Range{Flags: uint32(abi.RangeKnown)}) // nobody is world
	for dir := range uint32(abi.DirMax) {
		k.put("steering", dir, abi.Steering{Outer: loopback, Inner: 77 + dir, Mark: 0x0c000000 << dir, Mac: [6]byte{2, 0xcc, 0, 0, 0, 1}})
	}
	return k
}

// use puts the endpoint under a set.
func (k *corpusKernel) use(set authz.Set) {
	k.Helper()
	id := k.sets[&set.Rules[0]]
	if id == 0 {
		if k.entries > 20_000 { // make room; the object's map is as large as an agent's
			k.flush()
		}
		id = k.next
		k.next++
		k.sets[&set.Rules[0]] = id
		for key, entry := range set.WithSet(id) {
			k.put("policy", key, entry)
			k.entries++
		}
	}
	if id == k.current {
		return
	}
	k.current = id
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
	k.put("endpoints", uint32(loopback), abi.Endpoint{IP4: addr(ownV4), IP6: addr(ownV6), ID: 1, Ifindex: loopback, State: uint32(abi.EPActive),
		Flags: uint32(flags), Policy: id, HoldIndex: 1})
}

func (k *corpusKernel) flush() {
	k.Helper()
	var key abi.PolicyKey
	var keys []abi.PolicyKey
	var entry abi.Policy
	it := k.coll.Maps["policy"].Iterate()
	for it.Next(&key, &entry) {
		keys = append(keys, key)
	}
	if it.Err() != nil {
		k.Fatal(it.Err())
	}
	for _, key := range keys {
		if err := k.coll.Maps["policy"].Delete(key); err != nil {
			k.Fatal(err)
		}
	}
	clear(k.sets)
	k.entries, k.current = 0, 0
}

// judge has the kernel judge a cell, of which the evaluator says d.
func (k *corpusKernel) judge(set authz.Set, dir abi.Direction, n identity.Numeric, proto uint8, port uint16, d authz.Decision, at string) {
	k.Helper()
	want := uint32(tcxDrop)
	switch {
	case d.Verdict == abi.VerdictPass && d.L7:
		want = tcxRedirect // to the proxy
		k.steered++
	case d.Verdict == abi.VerdictPass:
		want = tcxNext
	}
	if !set.Enforce(dir) {
		if k.skipped++; k.skipped%64 != 0 {
			return // it all passes; a sample is enough
		}
	}
	if (proto == authz.ProtoICMP || proto == authz.ProtoICMPv6) && port != uint16(echoRequest(proto))<<8 {
		// Of ICMP the programs know echoes and errors; the rest is dropped as
		// unsupported, whatever policy says.
		want = tcxDrop
		k.unsupported++
	}
	k.use(set)
	p := peerNamed("proved")
	from, slot := p.from, *p.slot
	if n == identity.NumHost {
		from, slot = 0, *peerNamed("host").slot
	}
	far, own := netip.MustParseAddr(p.v4), ownV4
	if proto == authz.ProtoICMPv6 {
		far, own = netip.MustParseAddr(p.v6), ownV6
	}
	// Another stamp for each cell, and so another judgement.
	k.stamp++
	slot.Stamp, slot.IP, slot.Identity = k.stamp, addr(far), uint32(n)
	k.put("slots", uint32(1), slot)
	k.put("bindings", slot.IP, abi.Binding{Slot: 1, Stamp: k.stamp})
	k.put("state", uint32(0), abi.State{RangeEpoch: k.stamp, EndpointEpoch: k.stamp})
	pkt := packet{src: far, dst: own, proto: proto, sport: uint16(1024 + k.cells%50_000), dport: port}
	if dir == abi.DirEgress {
		pkt.src, pkt.dst = own, far
	}
	k.cells++
	if got := k.run(dir, pkt, from); got != want {
		k.Errorf("%s: %s: the kernel returns %d, the evaluator wants %d (2 drops, 7 steers to the proxy)", at, dir, int32(got), int32(want))
	}
}

// The kernel's verdict is the evaluator's for every cell of the corpora whose
// subject is under policy, and for a sample of the others.
func TestNetworkPolicyCorpusInKernel(t *testing.T) {
	k := newCorpusKernel(t)
	networkPolicyCorpus(t, k)
	k.enough(11_132)
}

func TestCiliumCorpusInKernel(t *testing.T) {
	k := newCorpusKernel(t)
	ciliumCorpus(t, k)
	k.enough(4449)
}

func (k *corpusKernel) enough(policed int) {
	k.Helper()
	k.Logf("%d cells judged by the kernel, in %d sets; %d of them ICMP that it does not support, %d steered to the proxy", k.cells, k.next-1, k.unsupported, k.steered)
	if k.cells < policed {
		k.Error("fewer cells than there are under policy")
	}
}
