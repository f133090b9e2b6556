package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// window is how many addresses are waited for at a time: well below what the
// agent holds and waits for.
const window = 256

// fewSessions is how many sessions begin at a time, where nearly each address
// has an owner of its own: this process is the other side of all of them.
const fewSessions = 16

// sink counts from which addresses something has come.
type sink struct {
	fd     int
	owners int
	seen   []atomic.Bool
	count  atomic.Int64
	ending atomic.Bool
	done   sync.WaitGroup
}

func newSink(n *network, addresses, owners int) (*sink, error) {
	s := &sink{owners: owners, seen: make([]atomic.Bool, addresses)}
	err := n.inPod(func() (err error) {
		if s.fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		wake := unix.NsecToTimeval(int64(100 * time.Millisecond))
		return errors.Join(unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wake),
			unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.Bind(s.fd, &unix.SockaddrInet4{Addr: podIP.As4(), Port: podPort}))
	})
	if err != nil {
		return nil, err
	}
	s.done.Go(func() {
		buf := make([]byte, 64)
		for !s.ending.Load() {
			_, from, err := unix.Recvfrom(s.fd, buf, 0)
			if a, ok := from.(*unix.SockaddrInet4); err == nil && ok {
				k := number(netip.AddrFrom4(a.Addr), owners)
				if k >= 0 && k < len(s.seen) && !s.seen[k].Swap(true) {
					s.count.Add(1)
				}
			}
		}
	})
	return s, nil
}

func (s *sink) close() {
	s.ending.Store(true)
	s.done.Wait()
	unix.Close(s.fd)
}

// touch sends from every address until something has come from each.
func (s *sink) touch(ctx context.Context) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return fmt.Errorf("raw socket: %w", err)
	}
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: podIP.As4()}
	total, progress := int64(len(s.seen)), time.Now()
	came := time.Now() // the last one
	most := int64(window)
	if s.owners > wideOwners {
		most = fewSessions
	}
	for s.count.Load() < total {
		before := s.count.Load()
		sent, first := int64(0), before
		for k := range s.seen {
			if s.seen[k].Load() {
				continue
			}
			if err := unix.Sendto(fd, datagram(remote(k, s.owners)), 0, to); err != nil && err != unix.ENOBUFS {
				return fmt.Errorf("send from %v: %w", remote(k, s.owners), err)
			}
			sent++
			for stuck := time.Now(); sent-(s.count.Load()-first) >= most; time.Sleep(200 * time.Microsecond) {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				if time.Since(stuck) > time.Second { // some are lost: they come again
					sent, first = 0, s.count.Load()
				}
			}
			if now := s.count.Load(); time.Since(progress) > 10*time.Second {
				fmt.Fprintf(os.Stderr, "%d of %d addresses confirmed\n", now, total)
				progress = time.Now()
			}
		}
		time.Sleep(500 * time.Millisecond) // the last ones
		if s.count.Load() > before {
			came = time.Now()
		}
		// A thousand new sessions at once take their time.
		if time.Since(came) > time.Minute {
			return fmt.Errorf("%d of %d addresses are never confirmed", total-before, total)
		}
	}
	return nil
}

// datagram returns an IPv4 packet with a UDP datagram for the workload.
func datagram(src netip.Addr) []byte {
	b := make([]byte, 36)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	s, d := src.As4(), podIP.As4()
	copy(b[12:], s[:])
	copy(b[16:], d[:])
	binary.BigEndian.PutUint16(b[20:], 40000)
	binary.BigEndian.PutUint16(b[22:], podPort)
	binary.BigEndian.PutUint16(b[24:], 16) // without a checksum; the kernel adds that of the header
	copy(b[28:], "anybody?")
	return b
}
