package netdev

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// newNamespace puts the test's thread into a network namespace of its own,
// and returns a second one.
func newNamespace(t *testing.T) (other netns.NsHandle) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("this test needs root, and CI must run it")
		}
		t.Skip("needs root: network namespaces")
	}
	runtime.LockOSThread() // never unlocked: the thread ends with the test's goroutine
	for _, h := range []*netns.NsHandle{&other, new(netns.NsHandle)} {
		ns, err := netns.New()
		must(t, err)
		*h = ns
		t.Cleanup(func() { ns.Close() })
	}
	return other
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func addVeth(t *testing.T, name string) netlink.Link {
	t.Helper()
	must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "p"}))
	l, err := netlink.LinkByName(name)
	must(t, err)
	return l
}

func TestDevices(t *testing.T) {
	newNamespace(t)
	l := addVeth(t, "one")
	must(t, netlink.LinkSetUp(l))
	d, err := ByName("one")
	must(t, err)
	if d.Name != "one" || d.Ifindex != uint32(l.Attrs().Index) || d.MAC != [6]byte(l.Attrs().HardwareAddr) || d.Kind != "veth" || !d.Up || d.MTU != 1500 {
		t.Errorf("%+v", d)
	}
	if again, err := ByIndex(d.Ifindex); err != nil || again.Name != "one" {
		t.Errorf("%+v, %v", again, err)
	}
	if _, err := ByName("two"); !errors.Is(err, ErrNoDevice) {
		t.Errorf("by name: %v", err)
	}
	if _, err := ByIndex(9999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("by index: %v", err)
	}
	if all, err := Devices(); err != nil || len(all) != 3 { // lo and both ends
		t.Errorf("%+v, %v", all, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Wait(ctx, "two"); !errors.Is(err, ErrNoDevice) || !errors.Is(err, context.Canceled) {
		t.Errorf("wait: %v", err)
	}
	if d, err := Wait(ctx, "one"); err != nil || d.Name != "one" {
		t.Errorf("wait: %+v, %v", d, err)
	}
}

func TestAddressesAndUplinks(t *testing.T) {
	newNamespace(t)
	for i, name := range []string{"under", "gw", "work"} {
		l := addVeth(t, name)
		must(t, netlink.LinkSetUp(l))
		peer, err := netlink.LinkByName(name + "p")
		must(t, err)
		must(t, netlink.LinkSetUp(peer))
		a, err := netlink.ParseAddr([]string{"192.0.2.1/24", "198.51.100.1/24", "10.0.0.1/24"}[i])
		must(t, err)
		must(t, netlink.AddrAdd(l, a))
	}
	must(t, netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("198.51.100.254")}))
	addrs, err := Addresses()
	must(t, err)
	want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1")}
	if !slices.Equal(addrs, want) {
		t.Errorf("addresses %v, want %v", addrs, want)
	}
	for _, tc := range []struct {
		nodeIPs []netip.Addr
		want    []string
	}{{nil, []string{"gw"}}, {want[1:2], []string{"under", "gw"}}} {
		up, err := Uplinks(tc.nodeIPs)
		must(t, err)
		var names []string
		for _, d := range up {
			names = append(names, d.Name)
		}
		slices.Sort(names)
		slices.Sort(tc.want)
		if !slices.Equal(names, tc.want) {
			t.Errorf("uplinks for %v: %v, want %v", tc.nodeIPs, names, tc.want)
		}
	}
}

func TestWatch(t *testing.T) {
	other := newNamespace(t)
	home, err := netns.Get()
	must(t, err)
	defer home.Close()
	addVeth(t, "old")
	ctx, cancel := context.WithCancel(context.Background())
	changes, done := make(chan Change, 64), make(chan error, 1)
	go func() {
		runtime.LockOSThread() // its thread ends with it
		if err := netns.Set(home); err != nil {
			done <- err
			return
		}
		done <- Watch(ctx, func(c Change) { changes <- c })
	}()
	wait := func(name string, gone bool) {
		t.Helper()
		for {
			select {
			case c := <-changes:
				if c.Device.Name == name && c.Gone == gone {
					return
				}
				if c.Gone && c.Device.Name == name {
					t.Fatalf("unexpected %+v", c)
				}
			case err := <-done:
				t.Fatalf("Watch ended: %v", err)
			case <-time.After(10 * time.Second):
				t.Fatalf("never heard of %s, gone %v", name, gone)
			}
		}
	}
	wait("old", false)
	l := addVeth(t, "new")
	wait("new", false)
	must(t, netlink.LinkDel(l))
	wait("new", true)
	// Moved away is gone too.
	l, err = netlink.LinkByName("old")
	must(t, err)
	must(t, netlink.LinkSetNsFd(l, int(other)))
	wait("old", true)
	// Leaving a bridge is not.
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br"}}
	must(t, netlink.LinkAdd(br))
	l, err = netlink.LinkByName("oldp")
	must(t, err)
	must(t, netlink.LinkSetMaster(l, br))
	must(t, netlink.LinkSetNoMaster(l))
	must(t, netlink.LinkSetAlias(l, "still here"))
	addVeth(t, "last")
	for seen := false; !seen; {
		select {
		case c := <-changes:
			if c.Gone {
				t.Errorf("gone: %+v", c.Device)
			}
			seen = c.Device.Name == "last"
		case <-time.After(10 * time.Second):
			t.Fatal("never heard of last")
		}
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("Watch: %v", err)
	}
}

// Messages that the kernel had to drop are made up for: what vanished
// meanwhile is found by listing.
func TestWatchAfterOverrun(t *testing.T) {
	newNamespace(t)
	addVeth(t, "here")
	known := map[uint32]Device{4711: {Name: "vanished", Ifindex: 4711}}
	var gone, seen []string
	ctx, cancel := context.WithCancel(context.Background())
	err := watchOnce(ctx, known, func(c Change) {
		if c.Gone {
			gone = append(gone, c.Device.Name)
			cancel()
		} else {
			seen = append(seen, c.Device.Name)
		}
	})
	if !errors.Is(err, context.Canceled) || !slices.Equal(gone, []string{"vanished"}) || !slices.Contains(seen, "here") {
		t.Errorf("gone %v, seen %v, %v", gone, seen, err)
	}
}
