package kube

import (
	"net/http"
	"sync"
	"time"
)

// requestMinutes is how far back the rate of requests looks.
const requestMinutes = 10

// requests counts what is sent to the API server. Safe for concurrent use.
type requests struct {
	next http.RoundTripper
	now  func() time.Time

	mu    sync.Mutex
	total uint64
	start time.Time
	count [requestMinutes]uint64 // by minute
	at    [requestMinutes]int64  // which minute the count is of
}

func newRequests(next http.RoundTripper, now func() time.Time) *requests {
	return &requests{next: next, now: now, start: now()}
}

// RoundTrip implements http.RoundTripper.
func (r *requests) RoundTrip(q *http.Request) (*http.Response, error) {
	minute := r.now().Unix() / 60
	r.mu.Lock()
	i := minute % requestMinutes
	if r.at[i] != minute {
		r.at[i], r.count[i] = minute, 0
	}
	r.count[i]++
	r.total++
	r.mu.Unlock()
	return r.next.RoundTrip(q)
}

// rate returns the number of requests since the start, and per minute of the
// last ten, or since the start if that is less, but at least of one.
func (r *requests) rate() (total uint64, perMinute float64) {
	now := r.now()
	r.mu.Lock()
	defer r.mu.Unlock()
	var n uint64
	for i, m := range r.at {
		if now.Unix()/60-m < requestMinutes {
			n += r.count[i]
		}
	}
	minutes := min(max(now.Sub(r.start).Minutes(), 1), requestMinutes)
	return r.total, float64(n) / minutes
}
