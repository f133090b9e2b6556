package model

import (
	"flag"
	"strings"
	"testing"
	"time"
)

var (
	onlyFlag   = flag.String("model.only", "", "search only the configurations whose name contains this")
	statesFlag = flag.Int("model.states", 40_000, "bound on the states of each search that is to find nothing; 0: none, and those that take long are searched too")
	timeFlag   = flag.Duration("model.time", 0, "bound on the time of each search; 0: none")
)

// TestConfigs: what must hold holds, as far as is searched, and every planted
// mistake is found. In -short mode only a little is searched, and a mistake that
// takes longer to find is left to the full run.
func TestConfigs(t *testing.T) {
	bound := *statesFlag
	if testing.Short() {
		bound = min(bound, 5_000)
	}
	for _, c := range Configs() {
		if !strings.Contains(c.Name, *onlyFlag) || c.Long && bound > 0 || testing.Short() && strings.HasSuffix(c.Name, "/ingress") {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			begin, cut := time.Now(), false
			r := Explore(c, func(n int) bool {
				cut = (!c.Breaks || testing.Short()) && bound > 0 && n > bound || *timeFlag > 0 && time.Since(begin) > *timeFlag
				return cut
			})
			t.Logf("%s %v (%v)", c.Name, r, time.Since(begin).Round(time.Millisecond))
			if c.Breaks != (r.Broken != "") && !(cut && c.Breaks && testing.Short()) {
				t.Errorf("a violation is expected: %v", c.Breaks)
			}
		})
	}
}

// TestKernelConfigs: the same of the datapath's loads.
func TestKernelConfigs(t *testing.T) {
	for _, c := range KernelConfigs() {
		r := ExploreKernel(c)
		t.Logf("%s %v", c.Name, r)
		if c.Breaks != (r.Broken != "") {
			t.Errorf("%s: a violation is expected: %v", c.Name, c.Breaks)
		}
	}
}
