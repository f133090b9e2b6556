package kube

import (
	"fmt"
	"time"
)

// clocks relates the clocks of several kernels, named by their boot ids, by what
// must have been before what: a message is sent before it is received, a pod is
// ordered before it begins, a line is written before it is read.
//
// The clocks are taken to run at the same rate for as long as a run lasts.
type clocks struct {
	// late[a][b] is the most by which b's clock showed less than a's when what b
	// did came after what a did: b is at least so much behind.
	late map[string]map[string]int64
}

func newClocks() *clocks { return &clocks{late: map[string]map[string]int64{}} }

// before notes that what a did at its at was before what b did at its bt.
func (c *clocks) before(a string, at int64, b string, bt int64) {
	if a == b || a == "" || b == "" {
		return
	}
	if c.late[a] == nil {
		c.late[a] = map[string]int64{}
	}
	if was, ok := c.late[a][b]; !ok || at-bt > was {
		c.late[a][b] = at - bt
	}
}

// relation leads from every clock to that of one. What is added to a clock's
// time is at least least and at most most.
type relation struct {
	to          string
	least, most map[string]int64
}

// doubt is the most by which a time of one of the clocks may be wrong that is
// taken half-way.
func (r *relation) doubt(boots ...string) (d time.Duration) {
	for _, b := range boots {
		d = max(d, time.Duration(r.most[b]-r.least[b]+1)/2)
	}
	return d
}

// maxDisagreement is by how much what is known of two clocks may contradict
// itself, since clocks drift, before nothing is believed of them.
const maxDisagreement = int64(time.Second)

// relate leads from all clocks to that of ref. It is an error if one cannot be
// related to it.
func (c *clocks) relate(ref string, all ...string) (*relation, error) {
	r := &relation{to: ref, least: map[string]int64{}, most: map[string]int64{}}
	for _, x := range all {
		if x == ref {
			continue
		}
		least, ok := c.late[ref][x]
		behind, ok2 := c.late[x][ref]
		most := -behind
		if !ok || !ok2 {
			return nil, fmt.Errorf("the clocks of kernels %s and %s cannot be related: nothing passed between them in both directions", ref, x)
		}
		if least-most > maxDisagreement {
			return nil, fmt.Errorf("the clocks of kernels %s and %s contradict each other by %v", ref, x, time.Duration(least-most))
		}
		r.least[x], r.most[x] = min(least, most), max(least, most)
	}
	return r, nil
}

// A stamp is a time of a kernel's clock. The zero value is no time.
type stamp struct {
	boot string
	at   int64
}

// time is the stamp on the one clock, half-way between what it may be.
func (r *relation) time(s stamp) int64 { return (r.early(s) + r.late(s)) / 2 }

// early and late are the bounds of it.
func (r *relation) early(s stamp) int64 { return move(s, r.least[s.boot]) }
func (r *relation) late(s stamp) int64  { return move(s, r.most[s.boot]) }

func move(s stamp, by int64) int64 {
	if s.at == 0 {
		return 0
	}
	return s.at + by
}
