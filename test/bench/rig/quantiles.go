package rig

import (
	"fmt"
	"slices"
)

// Quantiles of a sample; in the unit of the sample.
type Quantiles struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	Max   float64 `json:"max"`
}

// Summarize sums a sample up; it leaves the sample as it is.
func Summarize(sample []float64) (q Quantiles) {
	s := slices.Sorted(slices.Values(sample))
	if q.Count = len(s); q.Count == 0 {
		return q
	}
	// The smallest value that at least that part of the sample does not exceed.
	at := func(p float64) float64 { return s[min(len(s)-1, int(p*float64(len(s))))] }
	q.P50, q.P90, q.P99, q.Max = at(0.5), at(0.9), at(0.99), s[len(s)-1]
	return q
}

func (q Quantiles) String() string {
	return fmt.Sprintf("n %4d   p50 %8.3f   p90 %8.3f   p99 %8.3f   max %8.3f", q.Count, q.P50, q.P90, q.P99, q.Max)
}
