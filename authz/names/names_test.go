package names

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

func ip(n int) netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, byte(n)}) }

const sec = int64(time.Second)

func nobody(netip.Addr) bool { return false }

func TestLifeOfAName(t *testing.T) {
	b := New(Options{Floor: 10 * time.Second, Grace: 5 * time.Second})
	if added, err := b.Learn(0, "a.b", []Address{{ip(1), time.Second}, {ip(2), time.Minute}, {ip(1), 0}}); err != nil || !slices.Equal(added, []netip.Addr{ip(1), ip(2)}) {
		t.Fatal(added, err)
	}
	if added, _ := b.Learn(0, "c", []Address{{ip(2), 0}}); !slices.Equal(added, []netip.Addr{ip(2)}) || !slices.Equal(b.Names(ip(2)), []string{"a.b", "c"}) {
		t.Error(added, b.Names(ip(2)))
	}
	for _, step := range []struct {
		at   int64
		live int // the address with a live connection; 0: none
		want []netip.Addr
	}{
		{9 * sec, 0, nil},                  // valid by the floor
		{14 * sec, 0, nil},                 // in its grace
		{14 * sec, 1, nil},                 // used
		{18 * sec, 0, []netip.Addr{ip(2)}}, // c's, not a.b's; 1 was used 4 s ago
		{19 * sec, 0, []netip.Addr{ip(1)}},
		{64 * sec, 0, nil},
		{65 * sec, 2, nil},
		{69 * sec, 0, nil},
		{70 * sec, 0, []netip.Addr{ip(2)}},
	} {
		if got := b.Expire(step.at, func(a netip.Addr) bool { return a == ip(step.live) }); !slices.Equal(got, step.want) {
			t.Errorf("at %d s %v go, want %v", step.at/sec, got, step.want)
		}
	}
	if b.Len() != 0 || len(b.byIP) != 0 || len(b.byName) != 0 {
		t.Error("something is left:", b.Entries())
	}
}

func TestFullRefuses(t *testing.T) {
	b := New(Options{PerName: 2, Max: 3})
	learn := func(name string, n ...int) error {
		var answer []Address
		for _, i := range n {
			answer = append(answer, Address{ip(i), time.Hour})
		}
		_, err := b.Learn(0, name, answer)
		return err
	}
	if err := errors.Join(learn("a", 1, 2), learn("b", 3)); err != nil {
		t.Fatal(err)
	}
	before := b.Entries()
	for what, err := range map[string]error{"a third of one name": learn("a", 3), "one known, one too much": learn("a", 1, 3), "a fourth in all": learn("c", 4)} {
		if !errors.Is(err, ErrFull) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if !slices.Equal(b.Entries(), before) {
		t.Error("what was refused left something")
	}
	if err := learn("a", 1, 2); err != nil {
		t.Error("what is known is not known any more:", err)
	}
	b.Forget("a", ip(1))
	b.Forget("a", ip(9))
	if err := learn("c", 4); err != nil || len(b.Names(ip(1))) > 0 {
		t.Error(err)
	}
}

// TestModel holds a book against the plainest thing that does the same.
func TestModel(t *testing.T) {
	type pair struct {
		name string
		ip   netip.Addr
	}
	type state struct{ expires, used int64 }
	for seed := range uint64(40) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		opts := Options{Floor: 3 * time.Second, Ceiling: 20 * time.Second, Grace: 4 * time.Second, PerName: 4, Max: 10}
		b, model, now := New(opts), map[pair]state{}, int64(0)
		for range 200 {
			now += rnd.Int64N(3 * sec)
			switch rnd.IntN(4) {
			case 0, 1:
				name, answer := fmt.Sprint("n", rnd.IntN(4)), make([]Address, 1+rnd.IntN(3))
				next := maps.Clone(model)
				for i := range answer {
					answer[i] = Address{ip(rnd.IntN(8)), time.Duration(rnd.Int64N(30 * sec))}
					p := pair{name, answer[i].IP}
					ttl := min(max(answer[i].TTL, opts.Floor), opts.Ceiling)
					next[p] = state{max(next[p].expires, now+int64(ttl)), next[p].used}
				}
				ofName := 0
				for p := range next {
					if p.name == name {
						ofName++
					}
				}
				_, err := b.Learn(now, name, answer)
				grows := len(next) > len(model)
				if full := grows && (ofName > opts.PerName || len(next) > opts.Max); full != errors.Is(err, ErrFull) {
					t.Fatalf("seed %d: full %v, error %v", seed, full, err)
				}
				if err == nil {
					model = next
				}
			case 2:
				used := ip(rnd.IntN(8))
				b.Expire(now, func(a netip.Addr) bool { return a == used })
				for p, s := range model {
					switch {
					case now < s.expires:
					case p.ip == used:
						model[p] = state{s.expires, now}
					case now >= max(s.expires, s.used)+int64(opts.Grace):
						delete(model, p)
					}
				}
			case 3: // a restart
				text, err := json.Marshal(b.Entries())
				var kept []Entry
				if err = errors.Join(err, json.Unmarshal(text, &kept)); err != nil {
					t.Fatal(err)
				}
				if b = New(opts); b.Restore(now, kept) != 0 {
					t.Fatalf("seed %d: a restart loses something", seed)
				}
			}
			got := map[pair]state{}
			for _, e := range b.Entries() {
				got[pair{e.Name, e.IP}] = state{e.Expires, e.Used}
				if !slices.Contains(b.Names(e.IP), e.Name) {
					t.Fatalf("seed %d: %s is not among the names of %s", seed, e.Name, e.IP)
				}
			}
			if !maps.Equal(got, model) || b.Len() != len(model) {
				t.Fatalf("seed %d: the book says %v, the model %v", seed, got, model)
			}
		}
	}
}

func TestRestoreOfAnotherClock(t *testing.T) {
	b := New(Options{Ceiling: time.Minute, Grace: time.Second, Max: 1})
	left := b.Restore(100*sec, []Entry{{Name: "a", IP: ip(1), Expires: 1 << 60, Used: 1 << 60}, {Name: "a", IP: ip(2)}, {Name: "a"}})
	if left != 2 || b.Len() != 1 {
		t.Error(left, b.Entries())
	}
	if gone := b.Expire(101*sec, nobody); len(gone) != 1 {
		t.Error("what can never have been learnt stays:", b.Entries())
	}
}
