package chaos

import (
	"testing"
	"time"

	"portcullis/chaos/check"
)

// A lease that was given for an upgrade stands when the next fault begins, as much
// of it as is left; and what came after it was over gave none.
func TestLeaseOfEarlierFaults(t *testing.T) {
	const ttl, long = time.Second, time.Minute
	r := newRecorder()
	begin := func(kind string, lease time.Duration) *check.Fault {
		f := r.begins(check.Fault{Kind: kind, Lease: lease}, ttl)
		r.began(f)
		return f
	}
	before := begin("partition", ttl)
	upgrade := begin("upgrade", long)
	during := begin("partition", ttl)
	r.set(func() { upgrade.Ended = now() - int64(20*time.Second) })
	after := begin("partition", ttl)
	r.set(func() { upgrade.Ended = now() - int64(2*long) })
	much := begin("partition", ttl)
	if before.Lease != ttl || upgrade.Lease != long || during.Lease != long || much.Lease != ttl {
		t.Errorf("before %v, at it %v, during it %v, long after it %v", before.Lease, upgrade.Lease, during.Lease, much.Lease)
	}
	if d := long - 20*time.Second - after.Lease; d < 0 || after.Lease <= ttl {
		t.Errorf("after it %v", after.Lease)
	}
}
