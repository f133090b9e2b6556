package main

import (
	"context"
	"encoding/json"
	"io"
	"net"
	"time"
)

// Change is when datagrams of new flows began to be answered, or ceased to be.
type Change struct {
	At int64 `json:"at"` // when the first of them was sent: Unix nanoseconds
	OK bool  `json:"ok"`
}

// steady is how many attempts one after the other must come out alike before
// they are told as a change: on a busy machine some are lost, or late.
const steady = 10

// changes sends a datagram from a new socket at every interval, and tells each
// change as soon as it is sure. The first line is how it is at first.
func changes(ctx context.Context, w io.Writer, target string, until end, interval, timeout time.Duration) error {
	type attempt struct {
		at   time.Time
		done chan bool
	}
	// As many as are under way at a time; who starts them waits for room.
	under := make(chan attempt, timeout/interval+1)
	go func() {
		defer close(under)
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for !until.reached() && ctx.Err() == nil {
			a := attempt{time.Now(), make(chan bool, 1)}
			go func() { a.done <- answered(target, timeout) }() // ends by its timeout
			under <- a
			<-tick.C
		}
	}()
	enc := json.NewEncoder(w)
	var last, candidate Change
	known, alike := false, 0
	for a := range under {
		ok := <-a.done
		if alike == 0 || ok != candidate.OK {
			candidate, alike = Change{a.at.UnixNano(), ok}, 0
		}
		if alike++; alike == steady && (!known || ok != last.OK) {
			last, known = candidate, true
			if err := enc.Encode(last); err != nil {
				return err
			}
		}
	}
	return nil
}

func answered(target string, timeout time.Duration) bool {
	c, err := net.Dial("udp", target)
	if err != nil {
		return false
	}
	defer c.Close()
	if c.SetDeadline(time.Now().Add(timeout)) != nil {
		return false
	}
	if _, err := c.Write([]byte("who are you?")); err != nil {
		return false
	}
	buf := make([]byte, 512)
	_, err = c.Read(buf)
	return err == nil
}
