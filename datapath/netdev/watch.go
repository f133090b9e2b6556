package netdev

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Change says that a device appeared or changed, or is gone.
type Change struct {
	Device Device
	Gone   bool // deleted, or moved to another network namespace
}

// Watch calls f for every device that exists, then for every change, until ctx
// ends (its error is returned) or netlink fails. f is called from one
// goroutine and may block; if the kernel has to drop messages meanwhile, the
// devices are listed again and those that vanished are reported gone, so that
// no disappearance is lost. A device that went and came back under the same
// index in such a gap is not reported; indices are not reused so soon.
func Watch(ctx context.Context, f func(Change)) error {
	known := map[uint32]Device{}
	for {
		err := watchOnce(ctx, known, f)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if !errors.Is(err, unix.ENOBUFS) {
			return fmt.Errorf("watch devices: %w", err)
		}
	}
}

// watchOnce subscribes, then lists (nothing can fall between), then follows.
func watchOnce(ctx context.Context, known map[uint32]Device, f func(Change)) error {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return err
	}
	defer sock.Close()
	defer context.AfterFunc(ctx, func() { sock.Close() })()
	// Best effort: an overrun is noticed, and the devices listed again.
	_ = sock.SetReceiveBufferSize(1<<20, false)
	devices, err := Devices()
	if err != nil {
		return err
	}
	now := map[uint32]bool{}
	for _, d := range devices {
		now[d.Ifindex] = true
		known[d.Ifindex] = d
		f(Change{Device: d})
	}
	for i, d := range known {
		if !now[i] {
			delete(known, i)
			f(Change{Device: d, Gone: true})
		}
	}
	for {
		msgs, from, err := sock.Receive()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return err
		}
		if from.Pid != nl.PidKernel {
			continue // another process: not to be believed
		}
		for _, m := range msgs {
			follow(m, known, f)
		}
	}
}

func follow(m syscall.NetlinkMessage, known map[uint32]Device, f func(Change)) {
	if m.Header.Type != unix.RTM_NEWLINK && m.Header.Type != unix.RTM_DELLINK || len(m.Data) < unix.SizeofIfInfomsg {
		return
	}
	info := nl.DeserializeIfInfomsg(m.Data)
	if info.Family != unix.AF_UNSPEC {
		return // a bridge port left its bridge, for instance: the device stays
	}
	if m.Header.Type == unix.RTM_DELLINK {
		if d, ok := known[uint32(info.Index)]; ok {
			delete(known, d.Ifindex)
			f(Change{Device: d, Gone: true})
		}
		return
	}
	h := unix.NlMsghdr(m.Header)
	d := Device{Ifindex: uint32(info.Index)}
	if link, err := netlink.LinkDeserialize(&h, m.Data); err == nil {
		d = deviceOf(link)
	} else if _, ok := known[d.Ifindex]; ok {
		return // what is known already is better
	}
	known[d.Ifindex] = d
	f(Change{Device: d})
}

// pollInterval bounds how long Wait goes without looking.
const pollInterval = 10 * time.Millisecond

// Wait returns the device of that name as soon as it exists, or ctx's error.
func Wait(ctx context.Context, name string) (Device, error) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		d, err := ByName(name)
		if !errors.Is(err, ErrNoDevice) {
			return d, err
		}
		select {
		case <-ctx.Done():
			return Device{}, fmt.Errorf("%w: %w", err, ctx.Err())
		case <-tick.C:
		}
	}
}
