package proxy

import (
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"unsafe"
)

// The sizes of buffers: most messages fit into the first; heads grow up to
// Options.HeaderBytes, bodies of many bytes take the last.
const (
	smallBuffer = 4 << 10
	largeBuffer = 64 << 10
)

var (
	smallBuffers = sync.Pool{New: func() any { b := make([]byte, smallBuffer); return &b }}
	largeBuffers = sync.Pool{New: func() any { b := make([]byte, largeBuffer); return &b }}
)

// reader reads a connection through a buffer that it gives back while nothing
// is in it. It belongs to one goroutine.
type reader struct {
	conn net.Conn
	raw  syscall.RawConn // nil: a connection without a file descriptor
	try  func(fd uintptr) bool
	n    int // what try has read
	err  error
	big  bool // the next buffer is a large one

	buf  *[]byte // nil: no buffer
	r, w int     // unread bytes are buf[r:w]
}

func newReader(c net.Conn) *reader {
	x := &reader{conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		// Without a raw connection reading merely holds its buffer while it waits.
		x.raw, _ = sc.SyscallConn()
	}
	x.try = x.tryRead
	return x
}

// data returns the unread bytes; valid until the next call.
func (x *reader) data() []byte {
	if x.buf == nil {
		return nil
	}
	return (*x.buf)[x.r:x.w]
}

// skip takes n bytes as read.
func (x *reader) skip(n int) {
	if x.r += n; x.r == x.w {
		x.release()
	}
}

// release gives the buffer back, with what is in it.
func (x *reader) release() {
	if x.buf == nil {
		return
	}
	x.give(x.buf)
	x.buf, x.r, x.w = nil, 0, 0
}

func (x *reader) take() *[]byte {
	if x.big {
		return largeBuffers.Get().(*[]byte)
	}
	return smallBuffers.Get().(*[]byte)
}

func (x *reader) give(buf *[]byte) {
	switch len(*buf) {
	case smallBuffer:
		smallBuffers.Put(buf)
	case largeBuffer:
		largeBuffers.Put(buf)
	}
}

// errFull: more unread bytes than the limit.
var errFull = errors.New("the buffer is full")

// fill waits for at least one more byte. Unread bytes stay; there are never
// more than limit of them.
func (x *reader) fill(limit int) error {
	if x.buf == nil {
		return x.first()
	}
	if x.w-x.r >= limit {
		return errFull
	}
	if x.w == len(*x.buf) {
		x.room(limit)
	}
	n, err := x.conn.Read((*x.buf)[x.w:])
	x.w += n
	if n > 0 {
		return nil // an error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// room makes room behind the unread bytes.
func (x *reader) room(limit int) {
	if x.r > 0 {
		x.w = copy(*x.buf, (*x.buf)[x.r:x.w])
		x.r = 0
		return
	}
	old := x.buf
	if len(*old) < largeBuffer {
		x.buf = largeBuffers.Get().(*[]byte)
	} else {
		b := make([]byte, min(2*len(*old), max(limit, largeBuffer+1)))
		x.buf = &b
	}
	x.w = copy(*x.buf, (*old)[:x.w])
	x.give(old)
}

// first waits for the first byte, without a buffer as long as there is none.
func (x *reader) first() error {
	if x.raw == nil {
		x.buf = x.take()
		return x.fill(largeBuffer)
	}
	x.n, x.err = 0, nil
	if err := x.raw.Read(x.try); err != nil {
		return err
	}
	switch {
	case x.err != nil:
		return x.err
	case x.n == 0:
		return io.EOF
	}
	return nil
}

// tryRead reads into a fresh buffer, and gives it back if nothing is there yet.
func (x *reader) tryRead(fd uintptr) bool {
	buf := x.take()
	n, err := rawIO(syscall.SYS_READ, fd, *buf)
	if n > 0 {
		x.buf, x.r, x.w, x.n = buf, 0, n, n
		return true
	}
	x.give(buf)
	if err == syscall.EAGAIN {
		return false
	}
	if err != 0 {
		x.err = err
	}
	return true
}

// rawIO reads from, or writes to, a socket that does not block, without telling
// the scheduler: it would give this goroutine's place away in the middle of a
// write, which takes as long as the kernel takes to carry the bytes to the other
// side of the machine, and wake a thread for that.
func rawIO(call, fd uintptr, b []byte) (int, syscall.Errno) {
	for {
		n, _, err := syscall.RawSyscall(call, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if err == 0 {
			return int(n), 0
		}
		if err != syscall.EINTR {
			return 0, err
		}
	}
}

// writer writes small messages to a connection. It belongs to one goroutine.
type writer struct {
	conn net.Conn
	raw  syscall.RawConn // nil: a connection without a file descriptor
	try  func(fd uintptr) bool
	left []byte
	err  error
}

func newWriter(c net.Conn) *writer {
	x := &writer{conn: c}
	if sc, ok := c.(syscall.Conn); ok {
		x.raw, _ = sc.SyscallConn() // without it, it is the connection's own way
	}
	x.try = x.tryWrite
	return x
}

// write writes all of b.
func (x *writer) write(b []byte) error {
	if x.raw == nil || len(b) > smallBuffer {
		_, err := x.conn.Write(b)
		return err
	}
	x.left, x.err = b, nil
	if err := x.raw.Write(x.try); err != nil {
		x.err = err
	}
	x.left = nil
	return x.err
}

func (x *writer) tryWrite(fd uintptr) bool {
	for len(x.left) > 0 {
		n, err := rawIO(syscall.SYS_WRITE, fd, x.left)
		if err == syscall.EAGAIN {
			return false
		}
		if err != 0 {
			x.err = err
			return true
		}
		x.left = x.left[n:]
	}
	return true
}
