package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"go.uber.org/zap"

	"portcullis/authz/names"
	"portcullis/bpf/abi"
	"portcullis/datapath"
	"portcullis/identity"
	"portcullis/proxy"
	"portcullis/proxy/feed"
)

// What workloads are told by DNS. An answer that a rule by names (toFQDNs) of its
// workload means is admitted before the workload hears it:
//
//	answer -> the endpoint's book -> its subject -> entries of its own set in the kernel
//	                                            '-> a number of the address alone, in ranges
//	       <- acknowledged
//
// The number is of world at that one address, so it says of it what is true
// whatever else policies say of the block around it, and neither sets of others
// nor numbers of others change. What has expired goes when no connection lives
// by it any more; a restart keeps it.

// learntNames is what all endpoints know together. Owned by the loop.
type learntNames struct {
	numbers map[netip.Addr]identity.Numeric // one use each
	users   map[netip.Addr]int              // endpoints that know it
	live    map[datapath.Pair]int64         // when a flow was last seen, ns; of those watched
	before  map[identity.UID][]names.Entry  // of an earlier agent, until its endpoint is there
	file    string
	dirty   bool  // file lags
	next    int64 // when what has expired is looked for again
}

// Times of learnt names.
const (
	// namesGrace is longer than a pass of the sweep takes to see each flow.
	namesGrace  = 2*datapath.SweepPass + 30*time.Second
	namesExpiry = 5 * time.Second
)

// formerSets is how many changes of policy an answer may be under way for. One that
// has seen more is refused, and asked for again.
const formerSets = 16

// before returns the former sets of the one that comes after p.
func (p policySet) before() []uint32 {
	if p.id == 0 {
		return nil
	}
	all := append([]uint32{p.id}, p.former...)
	return all[:min(len(all), formerSets)]
}

// namesRecord is the file.
type namesRecord struct {
	Boot  identity.BootID                `json:"boot"`
	Names map[identity.UID][]names.Entry `json:"names"`
}

var (
	errNobody   = errors.New("no endpoint was asked for by this policy")
	errNotWorld = errors.New("not an address of the world")
)

// openNames reads what an earlier agent of this boot knew. What cannot be read is
// not known: workloads ask again.
func (l *loop) openNames() {
	l.learnt = learntNames{numbers: map[netip.Addr]identity.Numeric{}, users: map[netip.Addr]int{}, live: map[datapath.Pair]int64{},
		file: filepath.Join(l.cfg.JournalDir, "names")}
	var r namesRecord
	if err := readJSON(l.learnt.file, &r); err == nil && r.Boot == l.boot {
		l.learnt.before = r.Names
	}
}

// learnNames admits what the client of a flow is about to hear, which it asked for
// under a policy set. On an error it must not hear it: nothing of it was
// admitted, or nobody may count on it. Safe for concurrent use.
func (l *loop) learnNames(ctx context.Context, c proxy.Conn, set uint32, a feed.Answer) error {
	answer := make([]names.Address, len(a.Addresses))
	for i, x := range a.Addresses {
		answer[i] = names.Address(x)
	}
	return l.call(ctx, func() error { return l.learn(c.Client.Addr(), set, a.Name, answer) })
}

func (l *loop) learn(client netip.Addr, set uint32, name string, answer []names.Address) error {
	e := l.byIP[client]
	// The set is the endpoint's own, now or before its last changes: of another one,
	// which had the address before, this says nothing.
	if e == nil || e.policy.id != set && !slices.Contains(e.policy.former, set) {
		return errNobody
	}
	if e.subject.Stale() {
		if err := l.applyPolicies(); err != nil {
			return err
		}
	}
	if !e.subject.Wants(name) {
		return nil // no rule of its hangs on the name
	}
	known := l.knownRanges()
	answer = slices.DeleteFunc(slices.Clone(answer), func(a names.Address) bool { return !l.ofWorld(a.IP, known) })
	if e.book == nil {
		e.book = l.newBook()
	}
	added, err := e.book.Learn(int64(l.now()), name, answer)
	if err != nil {
		return err
	}
	l.learnt.dirty = l.learnt.dirty || len(answer) > 0
	for i, ip := range added {
		if err := l.admit(e, ip, known); err != nil {
			for j, ip := range added {
				if e.book.Forget(name, ip); j <= i {
					l.retract(e, ip)
				}
			}
			return fmt.Errorf("%w %s at %s: %w", errKernelRefuse, name, ip, err)
		}
	}
	if e.subject.Stale() { // an entry that was there before has changed
		return l.applyPolicies()
	}
	return nil
}

func (l *loop) newBook() *names.Book {
	return names.New(names.Options{Grace: namesGrace, Max: l.cfg.NamesPerEndpoint})
}

// ofWorld reports whether a name may say anything of an address: not if somebody
// may be bound to it, nor if it is nobody's on the network.
func (l *loop) ofWorld(ip netip.Addr, known map[netip.Prefix]abi.Range) bool {
	if !ip.IsValid() || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip.Is4In6() || ip.Zone() != "" {
		return false
	}
	return !datapath.IsKnown(known, ip)
}

// admit puts into the kernel what an endpoint's book says of an address: the
// entries first, then, if it has none yet, the number under which they count.
func (l *loop) admit(e *endpoint, ip netip.Addr, known map[netip.Prefix]abi.Range) error {
	if len(e.book.Names(ip)) == 1 { // its first
		l.learnt.users[ip]++
	}
	if err := l.sayNames(e, ip); err != nil {
		return err
	}
	if _, numbered := l.learnt.numbers[ip]; numbered {
		return nil
	}
	world, _ := identity.Reserved("world")
	n, err := l.acquireIn(world, identity.Region{Block: netip.PrefixFrom(ip, ip.BitLen())})
	if err != nil {
		return err
	}
	done, err := l.dp.PutAddress(ip, known, uint32(n))
	if err == nil && !done {
		err = errNotWorld
	}
	if err != nil {
		l.release(n)
		return err
	}
	l.learnt.numbers[ip] = n
	return nil
}

// sayNames tells the endpoint's subject by which names it knows an address, and
// the kernel what follows.
func (l *loop) sayNames(e *endpoint, ip netip.Addr) error {
	var is []string
	if e.book != nil {
		is = e.book.Names(ip)
	}
	l.names.setNames(e.id, ip, slices.Clone(is)) // for flow records
	d := l.sets.Learn(e.subject, ip, is)
	set := e.policy.id
	if err := l.tellPeers(e.subject, d); err != nil {
		return err
	}
	if len(d.Add) > 0 {
		if err := l.dp.PutPolicy(set, withSet(d.Add, set)); err != nil {
			return err
		}
	}
	for i := range d.Remove {
		d.Remove[i].Set = set
	}
	if len(d.Remove) > 0 {
		return l.dp.DeletePolicy(d.Remove)
	}
	return nil
}

// retract says that an endpoint has lost a name of an address, or all of them. If
// the kernel does not follow, the endpoint is put under a new set.
func (l *loop) retract(e *endpoint, ip netip.Addr) {
	if err := l.sayNames(e, ip); err != nil {
		l.sets.Distrust(e.subject)
		l.retryPolicies = true
		l.alarms.raise("policy-not-applied", fmt.Sprintf("what %s learnt of %s is still allowed: %v", e.fullName(), ip, err))
	}
	l.learnt.dirty = true
	if e.book != nil && len(e.book.Names(ip)) > 0 || l.learnt.users[ip] == 0 {
		return
	}
	if l.learnt.users[ip]--; l.learnt.users[ip] == 0 {
		delete(l.learnt.users, ip)
	}
}

// dropAddresses takes the numbers of addresses that no endpoint knows any more
// out of the kernel, all at once: flows that were judged by ranges are judged
// again after it.
func (l *loop) dropAddresses() {
	gone := map[netip.Addr]identity.Numeric{}
	for ip, n := range l.learnt.numbers {
		if l.learnt.users[ip] == 0 {
			gone[ip] = n
		}
	}
	if len(gone) == 0 {
		return
	}
	for ip := range gone {
		delete(l.learnt.numbers, ip)
	}
	if err := l.setRanges(); err != nil {
		maps.Copy(l.learnt.numbers, gone) // as it may stand in the kernel
		l.log.Warn("remove addresses that nobody knows any more, to be tried again", zap.Error(err))
		return
	}
	for _, n := range gone {
		l.release(n)
	}
}

// recallNames gives an endpoint of an earlier agent back what it knew, before its
// policy is compiled.
func (l *loop) recallNames(e *endpoint) {
	e.book = nil
	before := l.learnt.before[e.uid]
	if delete(l.learnt.before, e.uid); len(before) == 0 {
		return
	}
	known := l.knownRanges()
	before = slices.DeleteFunc(before, func(x names.Entry) bool { return !l.ofWorld(x.IP, known) })
	e.book = l.newBook()
	if left := e.book.Restore(int64(l.now()), before); left > 0 {
		l.log.Warn("names that an endpoint was told of are forgotten", zap.String("workload", e.fullName()), zap.Int("addresses", left))
	}
	world, _ := identity.Reserved("world")
	for _, ip := range e.book.Addresses() {
		l.learnt.users[ip]++
		l.sets.Learn(e.subject, ip, e.book.Names(ip)) // nothing is in force yet
		l.names.setNames(e.id, ip, slices.Clone(e.book.Names(ip)))
		if _, numbered := l.learnt.numbers[ip]; numbered {
			continue
		}
		n, err := l.acquireIn(world, identity.Region{Block: netip.PrefixFrom(ip, ip.BitLen())})
		if err != nil { // it is not admitted; the workload asks again
			l.log.Warn("an address that a workload was told of is forgotten", zap.Stringer("ip", ip), zap.Error(err))
			continue
		}
		l.learnt.numbers[ip] = n // in ranges when policies are applied
		l.regions.behind = true
	}
}

// forgetNames ends what an endpoint knew, with its policy.
func (l *loop) forgetNames(e *endpoint) {
	if e.book == nil {
		return
	}
	for _, ip := range e.book.Addresses() {
		if l.learnt.users[ip]--; l.learnt.users[ip] <= 0 {
			delete(l.learnt.users, ip)
		}
	}
	e.book, l.learnt.dirty = nil, true
	l.names.forgetNames(e.id)
}

// expireNames forgets what has expired and is not used any more.
func (l *loop) expireNames() {
	now := int64(l.now())
	if now < l.learnt.next {
		return
	}
	l.learnt.next = now + int64(namesExpiry)
	watch := map[datapath.Pair]struct{}{}
	for _, e := range l.endpoints {
		if e.book == nil {
			continue
		}
		changed := e.book.Expire(now, func(ip netip.Addr) bool {
			used := false
			for _, own := range e.ips {
				p := datapath.Pair{Local: own, Remote: ip}
				watch[p] = struct{}{}
				seen, ok := l.learnt.live[p]
				used = used || ok && now-seen < int64(namesGrace)
			}
			return used
		})
		for _, ip := range changed {
			l.retract(e, ip)
		}
	}
	maps.DeleteFunc(l.learnt.live, func(p datapath.Pair, _ int64) bool { _, watched := watch[p]; return !watched })
	l.dp.WatchFlows(watch)
	l.dropAddresses()
}

// sawFlows notes between whom flows live.
func (l *loop) sawFlows(pairs []datapath.Pair) {
	for _, p := range pairs {
		l.learnt.live[p] = int64(l.now())
	}
}

// storeNames writes down what is known. It may lag: what it lacks, workloads ask
// for again.
func (l *loop) storeNames() {
	if !l.learnt.dirty {
		return
	}
	r := namesRecord{Boot: l.boot, Names: map[identity.UID][]names.Entry{}}
	for uid, e := range l.endpoints {
		if e.book != nil && e.book.Len() > 0 {
			r.Names[uid] = e.book.Entries()
		}
	}
	if err := writeJSON(l.learnt.file, r, false); err != nil {
		l.log.Warn("what workloads were told by DNS would not outlive a restart", zap.Error(err))
		return
	}
	l.learnt.dirty = false
}

// worldNumbers are the numbers of the world's blocks, and of addresses that were
// learnt: what is in ranges beside what is known.
func (l *loop) worldNumbers() map[netip.Prefix]identity.Numeric {
	if len(l.learnt.numbers) == 0 {
		return l.regions.numbers
	}
	out := maps.Clone(l.regions.numbers)
	if out == nil {
		out = map[netip.Prefix]identity.Numeric{}
	}
	for ip, n := range l.learnt.numbers {
		out[netip.PrefixFrom(ip, ip.BitLen())] = n
	}
	return out
}
