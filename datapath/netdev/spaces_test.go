package netdev

import (
	"errors"
	"os"
	"os/exec"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// A process in a namespace, and the device that leads there, have one number; and
// the cookie is that of the sockets there.
func TestNamespaces(t *testing.T) {
	newNamespace(t)
	addVeth(t, "both")
	here, err := netns.Get()
	must(t, err)
	defer here.Close()
	cookies := map[uint64]bool{}
	for _, name := range []string{"w1", "w2"} {
		ns, err := netns.New() // and the thread is in it
		must(t, err)
		defer ns.Close()
		sleeper := exec.Command("sleep", "600")
		must(t, sleeper.Start())
		defer func() {
			sleeper.Process.Kill() //nolint:errcheck // it may have ended
			sleeper.Wait()         //nolint:errcheck // it was killed
		}()
		want := cookieHere(t)
		must(t, netns.Set(here))
		must(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}))
		d, err := ByName(name)
		must(t, err)
		behind, err := NamespaceBehind(d.Ifindex)
		must(t, err)
		cookie, number, err := NamespaceOf(uint32(sleeper.Process.Pid))
		if err != nil || cookie != want || number != behind || cookies[cookie] {
			t.Errorf("%s: cookie %d, number %d, %v; want %d, %d", name, cookie, number, err, want, behind)
		}
		cookies[cookie] = true
	}
	d, err := ByName("both")
	must(t, err)
	if n, err := NamespaceBehind(d.Ifindex); !errors.Is(err, ErrNoNumber) {
		t.Errorf("a veth whose other end is here: %d, %v", n, err)
	}
	if n, err := NamespaceBehind(99999); !errors.Is(err, ErrNoDevice) {
		t.Errorf("no device: %d, %v", n, err)
	}
	if _, n, err := NamespaceOf(1 << 30); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no process: %d, %v", n, err)
	}
}

func cookieHere(t *testing.T) uint64 {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	must(t, err)
	defer unix.Close(fd)
	v, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	must(t, err)
	return v
}
