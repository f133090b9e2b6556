package agent

import (
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"portcullis/datapath/netdev"
)

// A network plugin's tunnel that comes after the agent's start lets other
// nodes' packets in, as long as it is there, where nobody named uplinks.
func TestTunnelThatComesLaterIsAnUplink(t *testing.T) {
	for _, found := range []bool{true, false} {
		n := newNode(t)
		n.veth("u1")
		n.cfg.Uplinks, n.cfg.uplinksFound = []string{"u1"}, found
		l := n.mustStart()
		change := func(c netdev.Change) []int {
			t.Helper()
			l.deviceChanges()(c)
			for len(l.inbox) > 0 {
				(<-l.inbox)()
			}
			indices, err := l.uplinks()
			if err != nil {
				t.Fatal(err)
			}
			slices.Sort(indices)
			return indices
		}
		u1 := int(n.device("u1").Ifindex)
		n.veth("other")
		if got := change(netdev.Change{Device: n.device("other")}); !slices.Equal(got, []int{u1}) {
			t.Errorf("found %v: uplinks %v after a veth came, want %d alone", found, got, u1)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "flannel.1"
		if err := netlink.LinkAdd(&netlink.Vxlan{LinkAttrs: attrs, VxlanId: 1, Port: 8472}); err != nil {
			t.Fatal(err)
		}
		tunnel := n.device("flannel.1")
		want := []int{u1}
		if found {
			want = append(want, int(tunnel.Ifindex))
			slices.Sort(want)
		}
		for range 2 { // told twice, it is one
			if got := change(netdev.Change{Device: tunnel}); !slices.Equal(got, want) {
				t.Errorf("found %v: uplinks %v after a tunnel came, want %v", found, got, want)
			}
		}
		if got := change(netdev.Change{Device: tunnel, Gone: true}); !slices.Equal(got, []int{u1}) {
			t.Errorf("found %v: uplinks %v after the tunnel went, want %d alone", found, got, u1)
		}
		if raised(l, "uplink") {
			t.Errorf("found %v: an alarm: %s", found, l.alarmText("uplink"))
		}
		n.crash(l)
	}
}
