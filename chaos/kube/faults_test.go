package kube

import (
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"portcullis/chaos"
)

// A fault that begins while nobody has an IP that could go to another ends at
// once; else it lasts until enough IPs went, but not for ever.
func TestTurn(t *testing.T) {
	ip := netip.MustParseAddr("10.0.0.1")
	for name, c := range map[string]struct {
		living bool
		want   time.Duration
	}{"nobody": {false, 0}, "somebody": {true, maxFault}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var u uses
				if c.living {
					u.taken([]netip.Addr{ip}, chaos.SleepV1)
				}
				x := &turn{parts: 2, least: time.Minute, begun: make(chan struct{})}
				begin := time.Now()
				other := make(chan struct{})
				go func() { defer close(other); x.over(t.Context(), &u) }()
				x.over(t.Context(), &u)
				<-other
				if d := time.Since(begin); d != c.want {
					t.Errorf("it lasted %v, want %v", d, c.want)
				}
				if c.living {
					u.taken([]netip.Addr{ip}, chaos.SleepV2)
				}
				if n := x.turns(&u); (n == 1) != c.living {
					t.Errorf("%d IPs changed hands", n)
				}
				// One that never came to begin counts nothing of the one before.
				if n := (&turn{begun: make(chan struct{})}).turns(&u); n != 0 {
					t.Errorf("%d IPs changed hands before it", n)
				}
			})
		})
	}
}
