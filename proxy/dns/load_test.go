package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// A client of glibc asks for both families from one socket, at once.
func TestOneSocketTwoQueries(t *testing.T) {
	var mu sync.Mutex
	seen := map[netip.AddrPort]int{}
	var held [][]byte
	g := start(t, rawServer(t, func(c *net.UDPConn, from netip.AddrPort, b []byte) {
		mu.Lock()
		seen[from]++
		mu.Unlock()
		if held = append(held, b); len(held) < 2 {
			return
		}
		for _, b := range slices.Backward(held) {
			b[2] |= bitQR
			c.WriteToUDPAddrPort(b, from)
		}
	}), nil)
	c, err := net.Dial("udp", g.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := map[uint16]uint16{}
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		m := ask("a.", qtype)
		want[m.Id] = qtype
		c.Write(packed(t, m))
	}
	c.SetReadDeadline(time.Now().Add(time.Minute))
	for range 2 {
		b := make([]byte, 512)
		n, err := c.Read(b)
		var m dns.Msg
		if err != nil || m.Unpack(b[:n]) != nil || want[m.Id] != m.Question[0].Qtype {
			t.Fatalf("%v %v", err, &m)
		}
		delete(want, m.Id)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(seen) != 1 {
		t.Errorf("the server was asked from %d sockets", len(seen))
	}
}

func TestPipelined(t *testing.T) {
	const n = 40
	var mu sync.Mutex
	var held []func()
	g := start(t, serve(t, func(w dns.ResponseWriter, m *dns.Msg) {
		mu.Lock()
		defer mu.Unlock()
		held = append(held, func() { w.WriteMsg(new(dns.Msg).SetReply(m)) })
		if len(held) == n {
			for _, do := range slices.Backward(held) {
				do()
			}
		}
	}), nil)
	c, err := net.Dial("tcp", g.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	var all []byte
	want := map[uint16]string{}
	for i := range n {
		m := ask(fmt.Sprintf("n%d.", i), dns.TypeA)
		m.Id = uint16(7 * i)
		want[m.Id] = m.Question[0].Name
		b := packed(t, m)
		all = append(binary.BigEndian.AppendUint16(all, uint16(len(b))), b...)
	}
	// In pieces that end anywhere.
	for ; len(all) > 0; all = all[min(23, len(all)):] {
		c.Write(all[:min(23, len(all))])
	}
	c.SetReadDeadline(time.Now().Add(time.Minute))
	for range n {
		b, err := readFrame(c)
		var m dns.Msg
		if err != nil || m.Unpack(b) != nil || want[m.Id] != m.Question[0].Name {
			t.Fatalf("%v %v", err, &m)
		}
		delete(want, m.Id)
	}
}

func TestFlood(t *testing.T) {
	release := make(chan struct{})
	g := start(t, serve(t, func(w dns.ResponseWriter, m *dns.Msg) {
		if m.Question[0].Name != "other." {
			<-release
		}
		w.WriteMsg(new(dns.Msg).SetReply(m))
	}), func(c *Config) { c.PerClient, c.PerClientTCP = 4, 2 })
	defer close(release)
	c, err := net.Dial("udp", g.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	until := func(what string, so func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !so(); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	for i := range 10 {
		c.Write(packed(t, ask(fmt.Sprintf("n%d.", i), dns.TypeA)))
	}
	until("the bound of one client does not hold", func() bool { return g.relay.Stats().Overloaded.Load() == 6 })
	// Another client is served meanwhile.
	other := dns.Client{Timeout: time.Minute, Dialer: &net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 2)}}}
	if _, _, err := other.Exchange(ask("other.", dns.TypeA), g.addr.String()); err != nil {
		t.Error("another client suffers:", err)
	}
	for range 5 {
		if c, err := net.Dial("tcp", g.addr.String()); err == nil { // else it was reset already
			defer c.Close()
		}
	}
	until("the bound of connections does not hold", func() bool { return g.relay.Stats().Overloaded.Load() == 9 })
}
