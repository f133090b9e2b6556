package svid

import (
	"context"
	"time"

	"go.uber.org/zap"
)

// stage is how far a certificate's life has gone without a renewal.
type stage int

const (
	stageFresh  stage = iota
	stageHalf         // 50 %: a renewal was due
	stageLate         // 75 %
	stageUrgent       // 90 %
	stageOver
)

// percent is where each stage begins.
var percent = [...]int64{stageFresh: 0, stageHalf: 50, stageLate: 75, stageUrgent: 90, stageOver: 100}

// stageAt returns the stage at a time, and when the next one begins (zero after
// the last).
func stageAt(begin, end, now time.Time) (at stage, next time.Time) {
	whole := end.Sub(begin)
	for at = stageOver; at > stageFresh; at-- {
		if starts := begin.Add(whole / 100 * time.Duration(percent[at])); !now.Before(starts) {
			break
		} else {
			next = starts
		}
	}
	return at, next
}

// Overdue returns how much of the newest SVID's life is over, in per cent, if
// that is 75 or more: at half it should have been renewed. Else 0, also when
// there is no SVID. It is one of 75, 90 and 100, by the wall clock.
func (s *Source) Overdue() int64 {
	begin, end := s.Life()
	if at, _ := stageAt(begin, end, time.Now().Round(0)); !end.IsZero() && at >= stageLate {
		return percent[at]
	}
	return 0
}

// pollWall bounds how long a timer may sleep: the wall clock, which ends a
// certificate, can be set, and goes on while the timers' clock does not.
const pollWall = 30 * time.Second

// alarms logs when the SVID passes a stage of its life. Each is logged once per
// certificate. It returns when ctx ends.
func (s *Source) alarms(ctx context.Context) {
	var seen stage
	var seenEnd time.Time
	for {
		changed := s.Changed()
		begin, end := s.Life()
		sleep := pollWall
		if !end.IsZero() {
			if !end.Equal(seenEnd) {
				seen, seenEnd = stageFresh, end
			}
			now := time.Now().Round(0) // wall clock only
			at, next := stageAt(begin, end, now)
			if at > seen {
				s.alarm(at, end, now)
			}
			seen = max(seen, at)
			if !next.IsZero() {
				sleep = min(sleep, max(next.Sub(now), time.Millisecond))
			}
		}
		t := time.NewTimer(sleep)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-changed:
			t.Stop()
		case <-t.C:
		}
	}
}

func (s *Source) alarm(at stage, end, now time.Time) {
	fields := []zap.Field{
		zap.Stringer("spiffe_id", s.cfg.ID), zap.Stringer("from", s.cfg.From), zap.Int64("life_percent", percent[at]),
		zap.Time("expires", end), zap.Duration("remaining", end.Sub(now)),
	}
	switch at {
	case stageHalf:
		s.cfg.Log.Warn("half of the SVID's life is over and it was not renewed yet", fields...)
	case stageLate:
		s.cfg.Log.Warn("three quarters of the SVID's life are over: look at where SVIDs come from", fields...)
	case stageUrgent:
		s.cfg.Log.Error("the SVID expires soon and was not renewed: all sessions will end", fields...)
	case stageOver:
		s.cfg.Log.Error("the SVID has expired: no session can be opened until it is renewed", fields...)
	}
}
