package model

import "fmt"

// KernelConfig is one search of the second model: a program of the datapath
// reads binding, stamp, identity, lease index, deadline, and the stamp again,
// one load at a time, while the agent revokes, frees and rewrites.
type KernelConfig struct {
	Name   string
	Breaks bool
	Rest   uint8 // ticks that a slot or a lease index rests between two uses
	Stall  uint8 // ticks for which a running program may be descheduled
	Reread bool  // the stamp is read again at the end
	// FreesNamed is the mistake: a lease index is freed while a slot names it.
	FreesNamed bool
	// Again: the slot is used twice more, the last time as at first, but for the
	// stamp (ABA).
	Again bool
}

// KernelConfigs are the searches and what each must find.
func KernelConfigs() []KernelConfig {
	return []KernelConfig{
		{Name: "K1/rests-longer-than-a-stall", Rest: 2, Stall: 1},
		{Name: "K2/stalls-longer-than-it-rests", Rest: 2, Stall: 3, Breaks: true},
		{Name: "K3/stamp-read-again", Rest: 2, Stall: 3, Reread: true},
		{Name: "K4/stamp-read-again-no-rest", Stall: 8, Reread: true},
		{Name: "K5/frees-named-lease", Rest: 2, Stall: 1, FreesNamed: true, Breaks: true},
		{Name: "K6/frees-named-lease-stamp-read-again", Rest: 2, Stall: 1, Reread: true, FreesNamed: true, Breaks: true},
		{Name: "K7/same-identity-again", Stall: 8, Reread: true, Again: true},
	}
}

// Identities in the slot, and who sends.
const (
	first  = iota // has IP a
	second        // has it afterwards
	nobody
	other // has IP b, under a lease that never ends here
)

// kernelState: slot 0 and leases 0 and 1, the agent's and the program's places.
type kernelState struct {
	stamp, identity, index uint8
	lease                  [2]uint8 // ticks; endless: armed by another session
	written                uint8    // of the slot's next use: 0 nothing, 1 identity, 2 lease index, 3 stamp
	uses                   uint8
	rested, freed          uint8 // ticks; endless: not yet
	holder                 uint8 // of IP a, in truth

	at, sender, ran uint8 // the program
	sawIdentity     uint8
	sawIndex        uint8
}

const endless = 15

type kernelNode struct {
	state  kernelState
	from   int
	action string
}

type kernelStepper struct {
	KernelConfig
	seen  map[kernelState]bool
	nodes []kernelNode
	at    int
}

// ExploreKernel visits every state of the second model.
func ExploreKernel(c KernelConfig) Result {
	x := &kernelStepper{KernelConfig: c, seen: map[kernelState]bool{}}
	x.add(kernelState{stamp: 1, lease: [2]uint8{3, endless}, rested: endless, freed: endless}, "")
	for ; x.at < len(x.nodes); x.at++ {
		s := x.nodes[x.at].state
		if s.at == programAdmits && (s.sender != first || s.sawIdentity != first) {
			return Result{Broken: fmt.Sprintf("I1: a packet of w%d is admitted as %d", s.sender+1, s.sawIdentity+1), Trace: x.trace(), States: len(x.nodes)}
		}
		x.tick(s)
		x.truth(s)
		x.agent(s)
		x.program(s)
	}
	return Result{States: len(x.nodes), Whole: true}
}

func (x *kernelStepper) add(s kernelState, action string) {
	if !x.seen[s] {
		x.seen[s] = true
		x.nodes = append(x.nodes, kernelNode{s, x.at, action})
	}
}

func (x *kernelStepper) trace() (lines []string) {
	for i := x.at; i > 0; i = x.nodes[i].from {
		lines = append([]string{"\t" + x.nodes[i].action}, lines...)
	}
	return lines
}

func (x *kernelStepper) tick(s kernelState) {
	if s.lease[0] < endless {
		less(&s.lease[0])
	}
	for _, p := range []*uint8{&s.rested, &s.freed} {
		if *p < 10 {
			*p++
		}
	}
	if s.at > 0 {
		s.ran++
	}
	if s.ran <= x.Stall {
		x.add(s, "a tick passes")
	}
}

func (x *kernelStepper) truth(s kernelState) {
	switch {
	case s.holder == first:
		s.holder = nobody
		x.add(s, "w1 goes")
	case s.holder == nobody && (s.stamp != 1 || s.lease[0] == 0):
		s.holder = second
		x.add(s, "the owner activates w2: zeroed and acked, or the lease is over")
	}
}

func (x *kernelStepper) agent(s0 kernelState) {
	if s0.stamp == 1 {
		s := s0
		s.stamp, s.rested = 0, 0
		x.add(s, "agent: stamp = 0")
	}
	switch {
	case s0.written == 0 && s0.stamp == 0 && s0.rested >= x.Rest && s0.rested < endless:
		s := s0
		s.written, s.identity = 1, other
		if s.uses == 1 {
			s.identity = first
		}
		x.add(s, "agent: the slot's next use, identity")
	case s0.written == 1:
		s := s0
		s.written, s.index = 2, 1
		x.add(s, "agent: its lease index")
	case s0.written == 2:
		s := s0
		s.written, s.stamp = 3, 2+s.uses
		x.add(s, "agent: its stamp, published for another IP")
	case s0.written == 3 && x.Again && s0.uses == 0:
		s := s0
		s.written, s.stamp, s.uses, s.rested = 0, 0, 1, 0
		x.add(s, "agent: stamp = 0, a second time")
	}
	if s0.freed == endless && s0.holder != first && (x.FreesNamed || s0.stamp != 1) && s0.lease[0] == 0 {
		s := s0
		s.freed = 0
		x.add(s, "agent: lease index 0 is free")
	}
	if s0.freed < endless && s0.freed >= x.Rest && s0.lease[0] == 0 {
		s := s0
		s.lease[0] = endless
		x.add(s, "agent: lease index 0 is armed for a session with another owner")
	}
}

// Where the program is: what it does next.
const (
	programStarts = iota
	programStamp
	programIdentity
	programIndex
	programLease
	programStampAgain
	programAdmits
)

func (x *kernelStepper) program(s kernelState) {
	drop := func(why string) {
		s.at, s.sawIdentity, s.sawIndex, s.ran = programStarts, 0, 0, 0
		x.add(s, "program: "+why)
	}
	next := func(at uint8, what string) {
		s.at = at
		x.add(s, "program: "+what)
	}
	switch s.at {
	case programStarts:
		if s.holder != nobody {
			s.sender, s.ran = s.holder, 0
			next(programStamp, fmt.Sprintf("a packet of w%d; its binding names slot 0 and stamp 1", s.sender+1))
		}
	case programStamp:
		if s.stamp != 1 {
			drop("the stamp differs")
			return
		}
		next(programIdentity, "the stamp fits")
	case programIdentity:
		s.sawIdentity = s.identity
		next(programIndex, "reads the identity")
	case programIndex:
		s.sawIndex = s.index
		next(programLease, "reads the lease index")
	case programLease:
		switch {
		case s.lease[s.sawIndex] == 0:
			drop("the lease is past")
		case x.Reread:
			next(programStampAgain, "the lease is live")
		default:
			next(programAdmits, "the lease is live: admitted")
		}
	case programStampAgain:
		if s.stamp != 1 {
			drop("the stamp has changed")
			return
		}
		next(programAdmits, "the stamp still fits: admitted")
	case programAdmits:
		drop("done")
	}
}
