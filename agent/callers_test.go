package agent

import (
	"errors"
	"strings"
	"testing"
)

// The alarm stands while processes cannot be read, and no longer; what the node
// lacks stands before, meanwhile and after.
func TestAlarmOfProcesses(t *testing.T) {
	all := newAlarms()
	text := func() string {
		for _, a := range all.list() {
			if a.name == "processes" {
				return a.text
			}
		}
		return ""
	}
	a := callersAlarm{alarms: all}
	a.works()
	if got := text(); got != "" {
		t.Errorf("while all works: %q", got)
	}
	a.fails(errors.New("the ring is gone"))
	if got := text(); !strings.Contains(got, "the ring is gone") {
		t.Errorf("when it fails: %q", got)
	}
	a.works()
	if got := text(); got != "" {
		t.Errorf("when it works again: %q", got)
	}
	a.lacks("no IPv6")
	a.fails(errors.New("the ring is gone"))
	if got := text(); !strings.Contains(got, "no IPv6") || !strings.Contains(got, "the ring is gone") {
		t.Errorf("both: %q", got)
	}
	a.works()
	if got := text(); got != "no IPv6" {
		t.Errorf("when it works again, without IPv6: %q", got)
	}
}
