package issuer

import (
	"net"
	"net/netip"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// Each node may have burst SVIDs at once and one more each refill. An agent needs two in the life of
// an SVID, and one at each start.
const (
	burst  = 10
	refill = 30 * time.Second

	// limited is how many nodes and how many sources are remembered. A forgotten
	// one may begin its burst anew.
	limited = 16384
)

// Each source address may ask sourceBurst times at once and once more each
// sourceRefill, whoever it is, and have sourceConnections open: the API server is
// asked for every token, and a workload that floods the issuer must not keep
// agents from it.
const (
	sourceBurst       = 100
	sourceRefill      = 100 * time.Millisecond
	sourceConnections = 16
)

// limiter counts what each of many was given. Safe for concurrent use.
type limiter[K comparable] struct {
	burst  time.Duration // as many
	refill time.Duration

	mu   sync.Mutex
	full *lru.Cache[K, time.Time] // when it may have its burst again; guarded by mu, for read and write together
}

func newLimiter[K comparable](burst int, refill time.Duration) *limiter[K] {
	full, err := lru.New[K, time.Time](limited)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &limiter[K]{burst: time.Duration(burst), refill: refill, full: full}
}

func newNodeLimiter() *limiter[Attested] {
	return newLimiter[Attested](burst, refill)
}

func newSourceLimiter() *limiter[netip.Prefix] {
	return newLimiter[netip.Prefix](sourceBurst, sourceRefill)
}

// take returns how long one must wait, 0 if it may have one now, which is then
// counted.
func (l *limiter[K]) take(who K, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	full, _ := l.full.Get(who)
	if full.Before(now) {
		full = now
	}
	if after := full.Add(l.refill); after.Sub(now) <= l.burst*l.refill {
		l.full.Add(who, after)
		return 0
	}
	return full.Sub(now) - (l.burst-1)*l.refill
}

// source is what counts as one sender: an IPv4 address, or an IPv6 network of 64
// bits, of which one sender can have every address. The zero prefix is all whose
// address cannot be read.
func source(remote string) netip.Prefix {
	addr, err := netip.ParseAddrPort(remote)
	if err != nil {
		return netip.Prefix{}
	}
	ip, bits := addr.Addr().Unmap().WithZone(""), 64
	if ip.Is4() {
		bits = 32
	}
	p, _ := ip.Prefix(bits) // fits
	return p
}

// fairListener closes at once what a source opens beyond sourceConnections.
type fairListener struct {
	net.Listener
	mu   sync.Mutex
	open map[netip.Prefix]int // guarded by mu
}

func newFairListener(l net.Listener) *fairListener {
	return &fairListener{Listener: l, open: map[netip.Prefix]int{}}
}

// Accept returns the next connection of a source that may have one more.
func (l *fairListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := source(conn.RemoteAddr().String())
		l.mu.Lock()
		many := l.open[from] >= sourceConnections
		if !many {
			l.open[from]++
		}
		l.mu.Unlock()
		if many {
			conn.Close()
			continue
		}
		return &fairConn{Conn: conn, closed: sync.OnceFunc(func() { l.done(from) })}, nil
	}
}

func (l *fairListener) done(from netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[from]--; l.open[from] == 0 {
		delete(l.open, from)
	}
}

type fairConn struct {
	net.Conn
	closed func()
}

// Close closes the connection and gives its place free.
func (c *fairConn) Close() error {
	defer c.closed()
	return c.Conn.Close()
}
