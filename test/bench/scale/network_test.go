package main

import (
	"net/netip"
	"testing"
)

// Every address is in its owner's range, is found again by its number, and no
// two owners share one.
func TestAddresses(t *testing.T) {
	for _, owners := range []int{1, 2, wideOwners, wideOwners + 1, 1000, maxOwners} {
		seen := map[netip.Addr]bool{}
		for _, n := range []int{0, 1, owners - 1, owners, 2*owners + 1, owners*perOwner(owners) - 1} {
			a := remote(n, owners)
			if !ownerRange(n%owners, owners).Contains(a) || number(a, owners) != n {
				t.Errorf("%d of %d owners: %v in %v, number %d", n, owners, a, ownerRange(n%owners, owners), number(a, owners))
			}
		}
		for i := range owners {
			if ip := ownerIP(i); seen[ip] || i > 0 && ownerRange(i, owners).Overlaps(ownerRange(i-1, owners)) || ownerRange(i, owners).Overlaps(podRange) || ip == agentIP {
				t.Errorf("owner %d of %d: %v, %v", i, owners, ip, ownerRange(i, owners))
			} else {
				seen[ip] = true
			}
		}
	}
}
