package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.uber.org/zap"
)

// errNotKept: what the kernel is to have and a restart could not account for is not
// put there. An alarm says why.
var errNotKept = errors.New("it could not be written down, so nothing is done of it")

// kept notes whether something could be written beside the journal, which is full
// whenever that is, and vice versa. nil stays nil.
func (l *loop) kept(err error) error {
	if err == nil {
		return nil
	}
	l.alarms.raise("journal", keptAlarm(err, l.cfg.JournalDir))
	if !l.unkept { // once, and not for each packet that waits for it
		l.log.Error("write down what must outlive this agent", zap.Error(err))
	}
	l.unkept = true
	return fmt.Errorf("%w: %w", errNotKept, err)
}

// forgot lets an agent start whose disk is full: what it needs could be read.
func (l *loop) forgot(err error) error {
	if !errors.Is(err, errNotRewritten) {
		return err
	}
	_ = l.kept(err) // the alarm tells
	return nil
}

func keptAlarm(err error, dir string) string {
	return fmt.Sprintf("what a restart must know of workloads cannot be written, so no workload is registered, and of other nodes' none that is not known is believed; what was before stands: %v: make room in %s", err, dir)
}

// keptProbe is what must fit before the alarm ends: more than the largest record.
const keptProbe = 16 << 10

// retryKept looks whether there is room again. Who was refused asks again by
// itself: the container runtime, and whoever sends packets.
func (l *loop) retryKept() {
	if !l.unkept {
		return
	}
	probe := filepath.Join(l.cfg.JournalDir, "probe")
	err := writeFile(probe, make([]byte, keptProbe), false)
	if err == nil {
		err = os.Remove(probe)
	}
	if err != nil {
		l.alarms.raise("journal", keptAlarm(err, l.cfg.JournalDir))
		return
	}
	l.unkept = false
	l.log.Info("there is room again", zap.String("dir", l.cfg.JournalDir))
	l.clearJournalAlarm()
}

func (l *loop) clearJournalAlarm() {
	if !l.unwritten && !l.unkept {
		l.alarms.clear("journal")
	}
}
