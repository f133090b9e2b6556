package datapath

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"portcullis/bpf/abi"
)

// How long an entry stays after its last packet, at the least: the sweep has to
// come by, see SweepStep. A packet that passes renews it. Entries are not needed
// for safety, every packet is judged by them only while stamp, lease and epoch
// are right; they are what tells a reply.
const (
	lifeTCPSyn         = 60 * time.Second  // no reply yet
	lifeTCPEstablished = 6 * time.Hour     // seen both ways
	lifeTCPHalfClosed  = 5 * time.Minute   // one side has finished
	lifeTCPClosing     = 10 * time.Second  // both have, or a reset
	lifeUDP            = 60 * time.Second  // one way
	lifeUDPReplied     = 180 * time.Second // both ways
	lifeICMP           = 30 * time.Second
	lifeOther          = 60 * time.Second
	// Of an entry all of whose judgements are of ended endpoints: nobody can
	// use it. Not 0, as an endpoint may be younger than the list of endpoints.
	lifeNoJudge = 10 * time.Second
	// Of an entry all of whose judgements name bindings that ended. It can
	// renew itself when the same workload is confirmed again, so that its
	// replies keep their direction.
	lifeDead = 60 * time.Second
)

type (
	ctKey   [unsafe.Sizeof(abi.CTKey{})]byte
	ctValue [unsafe.Sizeof(abi.CT{})]byte
)

func decodeCT(v *ctValue) (ct abi.CT) {
	*(*ctValue)(unsafe.Pointer(&ct)) = *v
	return ct
}

// Types of protocols that x/sys has no name for.
const protoSCTP = 132

func lifetime(proto uint8, flags abi.CTFlag) time.Duration {
	replied := flags&abi.CTSeenReply != 0
	switch proto {
	case unix.IPPROTO_TCP, protoSCTP: // SCTP sets the same flags
		const fin = abi.CTFinForward | abi.CTFinReply
		switch {
		case flags&abi.CTRst != 0 || flags&fin == fin:
			return lifeTCPClosing
		case flags&fin != 0:
			return lifeTCPHalfClosed
		case replied:
			return lifeTCPEstablished
		}
		return lifeTCPSyn
	case unix.IPPROTO_UDP:
		if replied {
			return lifeUDPReplied
		}
		return lifeUDP
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return lifeICMP
	}
	return lifeOther
}
