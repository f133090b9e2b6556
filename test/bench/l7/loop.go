package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// What is asked, and what is answered. A client knows an answer by its end,
// whatever a proxy has put into its head.
const (
	request      = "GET /v1/request-landing HTTP/1.1\r\nHost: deathstar.default.svc\r\nUser-Agent: curl/8.14\r\nAccept: */*\r\n\r\n"
	lastRequest  = "GET /v1/request-landing HTTP/1.1\r\nHost: deathstar.default.svc\r\nUser-Agent: curl/8.14\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	answer       = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 12\r\n\r\nShip landed\n"
	lastAnswer   = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\nContent-Length: 12\r\n\r\nShip landed\n"
	answerBegins = "HTTP/1.1 200"
	answerEnds   = "Ship landed\n"
)

// poller is an epoll instance of one thread.
type poller struct {
	fd     int
	events [256]unix.EpollEvent
}

// newPoller keeps the calling goroutine on its thread.
func newPoller() (*poller, error) {
	runtime.LockOSThread()
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	return &poller{fd: fd}, err
}

func (p *poller) add(fd int, events uint32) error {
	return unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// wait returns what is ready; nothing after that many milliseconds.
func (p *poller) wait(ms int) ([]unix.EpollEvent, error) {
	n, err := unix.EpollWait(p.fd, p.events[:], ms)
	if errors.Is(err, unix.EINTR) {
		return nil, nil
	}
	return p.events[:max(n, 0)], err
}

// serveHTTP answers requests without bodies on every address, for ever.
func serveHTTP(addresses []string) error {
	p, err := newPoller()
	if err != nil {
		return err
	}
	listeners := map[int]bool{}
	for _, a := range addresses {
		fd, err := listen(a)
		if err != nil {
			return fmt.Errorf("listen at %s: %w", a, err)
		}
		listeners[fd] = true
		if err := p.add(fd, unix.EPOLLIN); err != nil {
			return err
		}
	}
	state := make([]int, 1<<16) // by file descriptor: bytes of the head's end that are there
	buf := make([]byte, 64<<10)
	for {
		events, err := p.wait(-1)
		if err != nil {
			return err
		}
		for _, e := range events {
			fd := int(e.Fd)
			if !listeners[fd] {
				state[fd] = serveOne(fd, state[fd], buf)
				continue
			}
			for {
				c, _, err := unix.Accept4(fd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
				if err != nil {
					break // EAGAIN; whatever else it is, the client sees it
				}
				state[c] = 0
				if err := errors.Join(unix.SetsockoptInt(c, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1), p.add(c, unix.EPOLLIN)); err != nil {
					unix.Close(c)
				}
			}
		}
	}
}

var answers = bytes.Repeat([]byte(answer), 64)

// serveOne answers what has come on a connection.
func serveOne(fd, state int, buf []byte) int {
	n, err := unix.Read(fd, buf)
	if err == unix.EAGAIN || err == unix.EINTR {
		return state
	}
	if n <= 0 {
		unix.Close(fd)
		return 0
	}
	const end = "\r\n\r\n"
	whole := 0
	for _, c := range buf[:n] {
		switch {
		case c == end[state]:
			state++
		case c == '\r':
			state = 1
		default:
			state = 0
		}
		if state == len(end) {
			whole++
			state = 0
		}
	}
	if whole == 1 && bytes.Contains(buf[:n], []byte("Connection: close")) {
		unix.Write(fd, []byte(lastAnswer)) // one that fails is the client's to count
		unix.Close(fd)
		return 0
	}
	if whole > 0 {
		unix.Write(fd, answers[:min(whole, 64)*len(answer)])
	}
	return state
}

func listen(address string) (int, error) {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return -1, err
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return fd, errors.Join(unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())}), unix.Listen(fd, 4096))
}

// connect begins a connection.
func connect(to netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrInet4{Addr: to.Addr().As4(), Port: int(to.Port())})
	}
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}
