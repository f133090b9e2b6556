package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// client makes requests. Its connections live from order to order.
type client struct {
	p     *poller
	to    netip.AddrPort
	conns []*asked
	byFD  map[int32]*asked
	free  []*asked // without a request under way

	due   []time.Time // requests that wait for a connection
	took  []time.Duration
	fails int

	grpc []*grpc.ClientConn
}

// asked is a connection.
type asked struct {
	fd   int
	from time.Time // when its request was made, or due
	got  int       // bytes of the answer
	buf  [1024]byte
}

const patience = 5 * time.Second // for what is under way at the end

// keep makes requests on kept connections.
func (c *client) keep(o order) (d done, err error) {
	if err := c.open(o); err != nil {
		return d, err
	}
	timer := -1
	if o.Rate > 0 {
		if timer, err = c.timer(o.Rate); err != nil {
			return d, err
		}
		defer unix.Close(timer)
	}
	begin := time.Now()
	stop := begin.Add(time.Duration(o.Millis) * time.Millisecond)
	next, each := begin, time.Duration(0)
	if o.Rate > 0 {
		each = time.Duration(float64(time.Second) / o.Rate)
	} else {
		for _, x := range c.conns {
			if err := c.ask(x, time.Now()); err != nil {
				return d, err
			}
		}
	}
	under := func() bool { return len(c.free) < len(c.conns) || len(c.due) > 0 }
	for now := begin; now.Before(stop) || under(); {
		if now.After(stop.Add(patience)) {
			return d, fmt.Errorf("%d requests of %d are not answered", len(c.conns)-len(c.free), len(c.took))
		}
		events, err := c.p.wait(100)
		if err != nil {
			return d, err
		}
		now = time.Now()
		for _, e := range events {
			if int(e.Fd) == timer {
				var b [8]byte
				unix.Read(timer, b[:]) // how often it fired, the clock tells
				continue
			}
			if err := c.answered(c.byFD[e.Fd], o.Rate == 0 && now.Before(stop)); err != nil {
				return d, err
			}
		}
		for ; o.Rate > 0 && now.Before(stop) && !next.After(now); next = next.Add(each) {
			c.due = append(c.due, next)
		}
		if err := c.askDue(); err != nil {
			return d, err
		}
	}
	return c.sum(stop.Sub(begin)), nil
}

// sum counts what came; what began in time and came a little later counts too.
func (c *client) sum(took time.Duration) done {
	d := done{Requests: len(c.took), Failed: c.fails, Seconds: took.Seconds()}
	if slices.Sort(c.took); len(c.took) > 0 {
		at := func(p float64) float64 { return float64(c.took[int(p*float64(len(c.took)-1))]) / 1e3 }
		d.P50, d.P99 = at(0.5), at(0.99)
	}
	c.took, c.fails, c.due = c.took[:0], 0, c.due[:0]
	return d
}

// timer wakes the loop as often as requests fall due.
func (c *client) timer(rate float64) (int, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return -1, err
	}
	each := unix.NsecToTimespec(int64(1e9 / rate))
	return fd, errors.Join(unix.TimerfdSettime(fd, 0, &unix.ItimerSpec{Interval: each, Value: each}, nil), c.p.add(fd, unix.EPOLLIN))
}

// open connects, and makes one request on each, unless that was done.
func (c *client) open(o order) (err error) {
	if c.p == nil {
		if c.p, err = newPoller(); err != nil {
			return err
		}
	}
	if c.conns != nil {
		return nil
	}
	if c.to, err = netip.ParseAddrPort(o.To); err != nil {
		return err
	}
	c.byFD = map[int32]*asked{}
	for range o.Conns {
		x, err := c.dial()
		if err != nil {
			return err
		}
		c.conns = append(c.conns, x)
		for len(c.free) < len(c.conns) {
			if time.Since(x.from) > patience {
				return fmt.Errorf("connection %d to %v: no answer", len(c.conns), c.to)
			}
			if _, err := c.p.wait(100); err != nil {
				return err
			}
			if err := c.answered(x, false); err != nil {
				return err
			}
		}
	}
	c.took = c.took[:0]
	return nil
}

// dial connects and asks.
func (c *client) dial() (*asked, error) {
	fd, err := connect(c.to)
	if err != nil {
		return nil, err
	}
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		if _, err = unix.Poll(poll, int(patience/time.Millisecond)); err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	x := &asked{fd: fd, from: time.Now()}
	c.byFD[int32(fd)] = x
	if err := c.p.add(fd, unix.EPOLLIN|unix.EPOLLET); err != nil {
		return nil, err
	}
	if _, err := unix.Write(fd, []byte(request)); err != nil {
		return nil, fmt.Errorf("connect to %v: %w", c.to, err)
	}
	return x, nil
}

var requestBytes = []byte(request)

func (c *client) ask(x *asked, from time.Time) error {
	if i := slices.Index(c.free, x); i >= 0 {
		c.free = slices.Delete(c.free, i, i+1)
	}
	return x.ask(from)
}

func (x *asked) ask(from time.Time) error {
	x.from, x.got = from, 0
	n, err := unix.Write(x.fd, requestBytes)
	if err == nil && n < len(request) {
		err = errors.New("a request does not fit")
	}
	return err
}

// askDue makes the requests that are due.
func (c *client) askDue() error {
	for len(c.due) > 0 && len(c.free) > 0 {
		x := c.free[0]
		c.free = c.free[1:]
		if err := x.ask(c.due[0]); err != nil {
			return err
		}
		c.due = c.due[1:]
	}
	return nil
}

// answered reads an answer, and asks again at once if told to.
func (c *client) answered(x *asked, again bool) error {
	n, err := unix.Read(x.fd, x.buf[x.got:])
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		return nil
	case err != nil:
		return fmt.Errorf("a kept connection: %w", err)
	case n == 0:
		return errors.New("a kept connection was ended")
	}
	x.got += n
	if whole, err := x.whole(); err != nil || !whole {
		return err
	}
	now := time.Now()
	c.took = append(c.took, now.Sub(x.from))
	if again {
		return x.ask(now)
	}
	c.free = append(c.free, x)
	return nil
}

// whole reports whether the answer is whole.
func (x *asked) whole() (bool, error) {
	s := x.buf[:x.got]
	if x.got < len(answerBegins)+len(answerEnds) || string(s[x.got-len(answerEnds):]) != answerEnds {
		return false, nil
	}
	if string(s[:len(answerBegins)]) != answerBegins {
		line, _, _ := strings.Cut(string(s), "\r")
		return true, fmt.Errorf("answered %q", line)
	}
	return true, nil
}

// each makes one request per connection.
func (c *client) each(o order) (d done, err error) {
	if c.p == nil {
		if c.p, err = newPoller(); err != nil {
			return d, err
		}
	}
	if c.to, err = netip.ParseAddrPort(o.To); err != nil {
		return d, err
	}
	open := map[int32]*asked{}
	begin := time.Now()
	stop := begin.Add(time.Duration(o.Millis) * time.Millisecond)
	for now := begin; now.Before(stop) || len(open) > 0; now = time.Now() {
		if now.After(stop.Add(patience)) {
			c.fails += len(open)
			for fd := range open {
				unix.Close(int(fd))
			}
			break
		}
		for now.Before(stop) && len(open) < o.Conns {
			fd, err := connect(c.to)
			if err != nil {
				return d, err
			}
			open[int32(fd)] = &asked{fd: fd, from: time.Now(), got: -1}
			if err := c.p.add(fd, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLET|unix.EPOLLRDHUP); err != nil {
				return d, err
			}
		}
		events, err := c.p.wait(100)
		if err != nil {
			return d, err
		}
		for _, e := range events {
			if x := open[e.Fd]; x != nil && c.step(x, e.Events) {
				unix.Close(x.fd)
				delete(open, e.Fd)
			}
		}
	}
	return c.sum(stop.Sub(begin)), nil
}

// step goes on with a connection of one request. It reports whether that is done.
func (c *client) step(x *asked, events uint32) (over bool) {
	if x.got < 0 && events&unix.EPOLLOUT != 0 {
		x.got = 0
		if _, err := unix.Write(x.fd, []byte(lastRequest)); err != nil {
			c.fails++
			return true
		}
	}
	for {
		n, err := unix.Read(x.fd, x.buf[max(x.got, 0):])
		switch {
		case err == unix.EAGAIN || err == unix.EINTR:
			return false
		case err != nil:
			c.fails++
			return true
		case n > 0:
			x.got += n
			continue
		}
		if whole, err := x.whole(); whole && err == nil {
			c.took = append(c.took, time.Since(x.from))
		} else {
			c.fails++
		}
		return true
	}
}

// idle opens so many connections with a request each, and leaves them.
func (c *client) idle(o order) (done, error) {
	begin := time.Now()
	c.conns, c.free = nil, nil
	if err := c.open(o); err != nil {
		return done{}, err
	}
	return done{Requests: len(c.conns), Seconds: time.Since(begin).Seconds()}, nil
}
