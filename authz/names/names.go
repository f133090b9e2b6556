package names

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Options bound a Book. Zeros stand for the defaults.
type Options struct {
	Floor   time.Duration // the least time that an address is valid for; 0: none
	Ceiling time.Duration // the longest; 0: 24 h
	// Grace is how long an address is kept when it has expired and no
	// connection to it was seen any more: who asked just before that may still
	// be about to connect. 0: 30 s.
	Grace   time.Duration
	PerName int // addresses of one name; 0: 128
	Max     int // addresses of all names together, each name's counted; 0: 2048
}

// ErrFull is of an answer that has no room. Nothing that is there gives way to
// it, for a connection may need that; room comes with time.
var ErrFull = errors.New("no room for what was learnt")

// Book is what one workload was told. Make it with New.
type Book struct {
	opts   Options
	byName map[string]map[netip.Addr]*entry
	byIP   map[netip.Addr][]string // sorted
	n      int
}

type entry struct {
	expires int64 // when it is not valid any more
	used    int64 // when a connection was last seen; 0: never
}

// New returns an empty book.
func New(o Options) *Book {
	o.Ceiling = cmp.Or(o.Ceiling, 24*time.Hour)
	o.Grace = cmp.Or(o.Grace, 30*time.Second)
	o.PerName = cmp.Or(o.PerName, 128)
	o.Max = cmp.Or(o.Max, 2048)
	return &Book{opts: o, byName: map[string]map[netip.Addr]*entry{}, byIP: map[netip.Addr][]string{}}
}

// Address is one address of an answer.
type Address struct {
	IP  netip.Addr
	TTL time.Duration
}

// Learn notes an answer about a name, which is in lower case and without a final
// dot, and returns the addresses that have it as a new name. All of it is noted,
// or nothing: then the error wraps ErrFull. What is known already lasts longer
// by it, never shorter.
func (b *Book) Learn(now int64, name string, answer []Address) (added []netip.Addr, err error) {
	have := b.byName[name]
	for _, a := range answer {
		if _, known := have[a.IP]; !known && !slices.Contains(added, a.IP) {
			added = append(added, a.IP)
		}
	}
	if len(have)+len(added) > b.opts.PerName && len(added) > 0 {
		return nil, fmt.Errorf("%w: %s has %d addresses already, of at most %d", ErrFull, name, len(have), b.opts.PerName)
	}
	if b.n+len(added) > b.opts.Max && len(added) > 0 {
		return nil, fmt.Errorf("%w: the workload knows %d addresses already, of at most %d", ErrFull, b.n, b.opts.Max)
	}
	for _, a := range answer {
		ttl := min(max(a.TTL, b.opts.Floor), b.opts.Ceiling)
		b.put(name, a.IP, entry{expires: now + int64(ttl)})
	}
	return added, nil
}

func (b *Book) put(name string, ip netip.Addr, e entry) {
	have := b.byName[name]
	if old := have[ip]; old != nil {
		old.expires = max(old.expires, e.expires)
		return
	}
	if have == nil {
		have = map[netip.Addr]*entry{}
		b.byName[name] = have
	}
	have[ip] = &e
	b.n++
	names := b.byIP[ip]
	i, _ := slices.BinarySearch(names, name)
	b.byIP[ip] = slices.Insert(slices.Clone(names), i, name)
}

// Expire forgets what has expired, has no live connection, and had none for the
// grace. It returns the addresses that lost a name. live is asked about expired
// ones only.
func (b *Book) Expire(now int64, live func(netip.Addr) bool) (changed []netip.Addr) {
	for name, have := range b.byName {
		for ip, e := range have {
			if now < e.expires {
				continue
			}
			if live(ip) {
				e.used = now
				continue
			}
			if now-max(e.expires, e.used) < int64(b.opts.Grace) {
				continue
			}
			b.remove(name, ip)
			changed = append(changed, ip)
		}
	}
	slices.SortFunc(changed, netip.Addr.Compare)
	return slices.Compact(changed)
}

func (b *Book) remove(name string, ip netip.Addr) {
	delete(b.byName[name], ip)
	if len(b.byName[name]) == 0 {
		delete(b.byName, name)
	}
	b.n--
	names := slices.DeleteFunc(slices.Clone(b.byIP[ip]), func(s string) bool { return s == name })
	if b.byIP[ip] = names; len(names) == 0 {
		delete(b.byIP, ip)
	}
}

// Forget removes an address from a name, as if it had never been learnt.
func (b *Book) Forget(name string, ip netip.Addr) {
	if b.byName[name][ip] != nil {
		b.remove(name, ip)
	}
}

// Names returns the names under which an address is known, sorted; it must not
// be changed.
func (b *Book) Names(ip netip.Addr) []string { return b.byIP[ip] }

// Addresses returns every address that is known, sorted.
func (b *Book) Addresses() []netip.Addr {
	return slices.SortedFunc(maps.Keys(b.byIP), netip.Addr.Compare)
}

// Len returns how many addresses there are, each counted once for each name.
func (b *Book) Len() int { return b.n }

// Entry is one address of one name, as it is kept and shown. Times are those of
// the book's clock.
type Entry struct {
	Name    string     `json:"name"`
	IP      netip.Addr `json:"ip"`
	Expires int64      `json:"expires"`        // ns
	Used    int64      `json:"used,omitempty"` // when a connection was last seen after that, ns
}

// Entries returns all that the book holds, by name and address.
func (b *Book) Entries() (out []Entry) {
	for name, have := range b.byName {
		for ip, e := range have {
			out = append(out, Entry{name, ip, e.expires, e.used})
		}
	}
	slices.SortFunc(out, func(x, y Entry) int { return cmp.Or(cmp.Compare(x.Name, y.Name), x.IP.Compare(y.IP)) })
	return out
}

// Restore puts back what Entries returned. What would be valid for longer than
// the ceiling is of another clock, or damaged: it expires now. What there is no
// room for is left out, and counted.
func (b *Book) Restore(now int64, entries []Entry) (left int) {
	for _, e := range entries {
		if !e.IP.IsValid() || b.n >= b.opts.Max || len(b.byName[e.Name]) >= b.opts.PerName {
			left++
			continue
		}
		if e.Expires > now+int64(b.opts.Ceiling) {
			e.Expires = now
		}
		b.put(e.Name, e.IP, entry{expires: e.Expires, used: min(e.Used, now)})
	}
	return left
}
