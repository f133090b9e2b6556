package hold

import (
	"container/heap"

	"portcullis/bpf/abi"
)

// place is what a hold that ended still takes of the kernel's quotas.
type place struct {
	holdIndex, source uint32
	free              int64 // when it is given back, CLOCK_BOOTTIME ns
}

// places is a heap by free. The kernel's quotas bound it: no place is taken
// there while it is in here.
type places []place

func (p places) Len() int           { return len(p) }
func (p places) Less(i, j int) bool { return p[i].free < p[j].free }
func (p places) Swap(i, j int)      { p[i], p[j] = p[j], p[i] }
func (p *places) Push(x any)        { *p = append(*p, x.(place)) }

func (p *places) Pop() any {
	last := (*p)[len(*p)-1]
	*p = (*p)[:len(*p)-1]
	return last
}

func (q *Queue) freePlace(r *Record) { q.giveBack(r.HoldIndex, r.Source) }

// keepPlace gives the place of a refused call back when its time has come, and
// not in one burst with others of its workload. Of what others send to a
// workload the place is free at once: they are to take none of its quota, and
// what one of them sends again waits for the end of the negative cache anyway.
func (q *Queue) keepPlace(r *Record) {
	if r.Direction != abi.DirEgress {
		q.freePlace(r)
		return
	}
	free := r.Arrival + int64(q.limits.Refused)
	if last, ok := q.lastFree[r.HoldIndex]; ok {
		free = max(free, last+int64(q.limits.Refused)/int64(q.limits.PerEndpoint))
	}
	q.lastFree[r.HoldIndex] = free
	heap.Push(&q.refused, place{r.HoldIndex, r.Source, free})
}

// freeNext gives the next place back.
func (q *Queue) freeNext() {
	p := heap.Pop(&q.refused).(place)
	if q.lastFree[p.holdIndex] == p.free {
		delete(q.lastFree, p.holdIndex)
	}
	q.giveBack(p.holdIndex, p.source)
}
