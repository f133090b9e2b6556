package lease

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"portcullis/identity"
	"portcullis/ipcache"
)

// Mode watch is mode classic with a bound: what was told is believed only as
// long as it is proved that all was told. All its bindings are under one lease
// index of their own, whose deadline moves with each proof. When no proof comes
// the kernel ends them by itself (I2).
//
// It does not keep I1: between a change and the moment at which it is told, at
// most the bound, a new workload passes as the one that had its IP.

// NewWatchVerifier returns a verifier of mode watch, which listens to no owner:
// it believes what Told says, for bound after the time of the last Proved.
// Of the configuration it uses Node, Speaks and Waits. Bindings of evidence
// watch that were restored into the table stay, under the deadline that they have
// in the kernel.
func NewWatchVerifier(cfg VerifierConfig, table *ipcache.Table, bound time.Duration) (*ClassicVerifier, error) {
	if bound <= 0 {
		return nil, errors.New("lease: watch verifier without a bound")
	}
	v, err := NewClassicVerifier(cfg, table, nil)
	if err != nil {
		return nil, err
	}
	v.bound, v.lease = bound, 0
	for e := range table.All() {
		if e.Lease >= ipcache.LeaseFirst && e.Evidence == identity.EvidenceWatch {
			v.lease = e.Lease
		}
	}
	if v.lease == 0 {
		v.lease, err = table.AcquireLease()
	}
	return v, err
}

// Lease returns the lease index of everything that is believed.
func (v *ClassicVerifier) Lease() uint32 { return v.lease }

// live reports whether what is believed counts now.
func (v *ClassicVerifier) live() bool { return v.bound == 0 || v.deadline > v.now }

// proved moves the deadline. What is to be zeroed goes first: if one of these
// writes fails, nothing after it is done, and so nothing that was told to be over
// gets more time.
func (v *ClassicVerifier) proved(at Time) {
	d := at.Add(v.bound)
	if v.bound == 0 || d <= v.deadline {
		return
	}
	for _, e := range slices.Collect(v.table.All()) {
		if e.Condemned && e.Lease == v.lease {
			v.emit(Zero{IP: e.Binding.IP, Slot: e.Slot, Stamp: e.Stamp})
		}
	}
	v.deadline = d
	v.emit(SetDeadline{Lease: v.lease, Deadline: d})
	if !v.live() {
		return
	}
	for _, ip := range slices.SortedFunc(maps.Keys(v.waits), netip.Addr.Compare) {
		if e, ok := v.table.Get(ip); ok && e.Lease == v.lease {
			delete(v.waits, ip)
			v.emit(Answer{IP: ip, Live: true})
		}
	}
}
