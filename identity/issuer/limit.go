package issuer

import (
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"portcullis/identity"
)

// Each node may have burst SVIDs at once and one more each refill. An agent needs two in the life of
// an SVID, and one at each start.
const (
	burst  = 10
	refill = 30 * time.Second

	// limitedNodes is how many nodes are remembered. A forgotten one may begin
	// its burst anew.
	limitedNodes = 16384
)

// limiter counts what each node was given. Safe for concurrent use.
type limiter struct {
	mu    sync.Mutex
	nodes *lru.Cache[identity.NodeName, bucket] // guarded by mu, for read and write together
}

// bucket is full at the time full, and lacks one for each refill before that.
type bucket struct{ full time.Time }

func newLimiter() *limiter {
	nodes, err := lru.New[identity.NodeName, bucket](limitedNodes)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return &limiter{nodes: nodes}
}

// take returns how long the node must wait, 0 if it may have one now, which is
// then counted.
func (l *limiter) take(node identity.NodeName, now time.Time) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	b, _ := l.nodes.Get(node)
	if b.full.Before(now) {
		b.full = now
	}
	if after := b.full.Add(refill); after.Sub(now) <= burst*refill {
		l.nodes.Add(node, bucket{after})
		return 0
	}
	return b.full.Sub(now) - (burst-1)*refill
}
