package agent

import (
	"fmt"
	"time"
)

// Bounds of Config.WatchFreshness: proofs come every 20 to 45 s, see
// kube/fresh.go.
const (
	leastFreshness    = time.Minute
	greatestFreshness = 10 * time.Minute
)

// ModeWatch believes what the API server tells, as ModeClassic does, and no longer
// than Config.WatchFreshness after it was proved to be all.

// told reports whether entries are believed because somebody else than the owner
// told them.
func (m Mode) told() bool { return m == ModeClassic || m == ModeWatch }

// validateWatch looks at what mode watch needs.
func (c *Config) validateWatch() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.UnsafeClassic {
		bad("--unsafe-classic makes no sense with --evidence=watch: leave it out")
	}
	if !c.Kubernetes {
		bad("--evidence=watch believes an API server: say --kubernetes too, or another evidence")
	}
	if c.WatchFreshness < leastFreshness || c.WatchFreshness > greatestFreshness {
		bad("--watch-freshness %v: want %v to %v: a proof comes twice a minute, and one may fail", c.WatchFreshness, leastFreshness, greatestFreshness)
	}
	return errs
}

// alarmWatch tells that what the API server told does not count any more.
func (l *loop) alarmWatch() {
	if l.watchLease == 0 {
		return
	}
	if now := l.now(); l.verifier.LeaseDeadline(l.watchLease) > now {
		l.alarms.clear("watch")
		return
	}
	h := l.cluster.Health()
	why := h.FreshErr
	if why == "" {
		why = "the watch does not come as far as the store"
	}
	l.alarms.raise("watch", fmt.Sprintf("it is not proved that the API server told of all pods in the last %v, so nobody on other nodes is known: %s", l.cfg.WatchFreshness, why))
}

// watchAge says how late the watch over pods is at most, for people; "" where
// that does not matter.
func watchAge(prove bool, age time.Duration, problem string) string {
	switch {
	case !prove:
		return ""
	case age == 0:
		return ", not proved fresh yet"
	case problem != "":
		return fmt.Sprintf(", proved fresh as of %v ago: %s", age.Round(time.Second), problem)
	}
	return fmt.Sprintf(", proved fresh as of %v ago", age.Round(time.Second))
}
