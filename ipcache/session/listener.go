package session

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"

	"go.uber.org/zap"

	"portcullis/identity"
)

// errNoPlace is why a verifier that has authenticated is turned away.
var errNoPlace = errors.New("session: no place for a further connection: too many are open, of this verifier or of all")

// pool counts connections, in all and by who has them.
type pool struct {
	most, each int // bounds
	n          int
	of         map[string]int
}

func newPool(most, each int) pool { return pool{most: most, each: each, of: map[string]int{}} }

func (p *pool) take(who string) bool {
	if p.n >= p.most || p.of[who] >= p.each {
		return false
	}
	p.n++
	p.of[who]++
	return true
}

func (p *pool) give(who string) {
	p.n--
	if p.of[who]--; p.of[who] == 0 {
		delete(p.of, who)
	}
}

// listener accepts connections, and closes at once what has no place. It never
// waits for a place: a stranger must not keep others out of the kernel's queue.
//
//	accepted, from an address of a known node ──────────────▶ a place of nodes
//	accepted, from elsewhere ──▶ a place of strangers ──────▶ a place of nodes
//	                                    authenticated as a known node
//
// However many strangers come, and from however many addresses, they take no
// place from nodes; and one address takes only its share of either.
type listener struct {
	net.Listener
	isNode func(netip.Addr) bool
	log    *zap.Logger

	mu        sync.Mutex
	nodes     pool      // guarded by mu; by address, or by name of who has shown it
	strangers pool      // guarded by mu; by address, of IPv6 by /64
	refused   int       // guarded by mu; since told
	told      time.Time // guarded by mu
}

func newListener(ln net.Listener, connections int, isNode func(netip.Addr) bool, log *zap.Logger) *listener {
	strangers := max(connections/strangersShare, leastStrangers)
	return &listener{Listener: ln, isNode: isNode, log: log, nodes: newPool(connections, maxPerNode),
		strangers: newPool(strangers, max(strangers/strangersShare/strangersShare, leastStrangers))}
}

// Accept returns the next connection that has a place.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if p := l.place(c); p != nil {
			return p, nil
		}
		if tcp, ok := c.(*net.TCPConn); ok {
			tcp.SetLinger(0) //nolint:errcheck // a reset leaves nothing behind; without it the kernel keeps a little, for a while
		}
		c.Close()
	}
}

func (l *listener) place(c net.Conn) *placed {
	tcp, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return nil // no other is listened for
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	p := &placed{Conn: c, l: l, pool: &l.nodes, who: ip.String()}
	if l.isNode == nil || !l.isNode(ip) {
		p.pool = &l.strangers
		if ip.Is6() {
			p.who = netip.PrefixFrom(ip, 64).Masked().String() // one host has all of it
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if p.pool.take(p.who) {
		return p
	}
	l.refused++
	if now := time.Now(); now.Sub(l.told) >= time.Second { // a flood of connections is no flood of lines
		l.log.Warn("connections are refused: too many are open, of one address or of all", zap.Int("refused", l.refused), zap.String("last", p.who),
			zap.Int("strangers", l.strangers.n), zap.Int("nodes", l.nodes.n))
		l.told, l.refused = now, 0
	}
	return nil
}

// placed is a connection that has a place until it is closed.
type placed struct {
	net.Conn
	l     *listener
	close sync.Once

	pool *pool  // guarded by l.mu; nil when closed
	who  string // guarded by l.mu
}

// authenticated moves a stranger who has shown that it is a known node to the
// places of nodes. False: there is none.
func (p *placed) authenticated(node identity.NodeName) bool {
	p.l.mu.Lock()
	defer p.l.mu.Unlock()
	switch who := "node " + string(node); {
	case p.pool == nil:
		return false
	case p.pool == &p.l.nodes:
		return true
	case !p.l.nodes.take(who):
		return false
	default:
		p.pool.give(p.who)
		p.pool, p.who = &p.l.nodes, who
		return true
	}
}

// Close gives the place back.
func (p *placed) Close() error {
	err := p.Conn.Close()
	p.close.Do(func() {
		p.l.mu.Lock()
		defer p.l.mu.Unlock()
		p.pool.give(p.who)
		p.pool = nil
	})
	return err
}
