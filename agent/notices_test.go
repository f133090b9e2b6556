package agent

import "testing"

// What runs beside the agent has its alarms in the agent's status.
func TestNotices(t *testing.T) {
	n := &Notices{}
	l := &loop{alarms: newAlarms(), cfg: Config{Notices: n}}
	n.Set("cni-plugin", "it is not in place")
	l.alarmNotices()
	if l.alarmText("cni-plugin") != "it is not in place" {
		t.Errorf("alarms %+v", l.alarms.list())
	}
	n.Set("cni-plugin", "")
	l.alarmNotices()
	if raised(l, "cni-plugin") {
		t.Error("an alarm that is over")
	}
	l.cfg.Notices = nil
	l.alarmNotices()
}
