package relay

import (
	"fmt"
	"strings"
	"testing"

	peerpb "github.com/cilium/cilium/api/v1/peer"
)

func told(name, address string, kind peerpb.ChangeNotificationType) *peerpb.ChangeNotification {
	return &peerpb.ChangeNotification{Name: name, Address: address, Type: kind}
}

// However many nodes an agent makes up, the relay knows no more than it has room
// for, and goes on with those that it knows.
func TestPeersAreBounded(t *testing.T) {
	p := &peers{list: map[string]known{}}
	warnings := 0
	add := func(name, address string) {
		if !p.notice(told(name, address, peerpb.ChangeNotificationType_PEER_ADDED)) {
			warnings++
		}
	}
	for i := range maxPeers + 100 {
		add(fmt.Sprint("n", i), "a")
	}
	add("n0", "b") // it has its place
	add("n0", strings.Repeat("x", maxName+1))
	if all := p.all(); len(all) != maxPeers || all[0].Address != "b" || warnings != 1 {
		t.Errorf("%d nodes, %v, %d warnings", len(all), all[0], warnings)
	}
	p.notice(told("n0", "", peerpb.ChangeNotificationType_PEER_DELETED))
	add("new", "a")
	if _, ok := p.list["new"]; !ok || len(p.list) != maxPeers {
		t.Errorf("%d nodes after one went and one came", len(p.list))
	}
}

// A node that went while nobody listened is forgotten, by the stream that is heard.
func TestPeersThatWentUnseen(t *testing.T) {
	p := &peers{list: map[string]known{}}
	first := p.begin()
	for _, name := range []string{"a", "b"} {
		p.notice(told(name, "x", peerpb.ChangeNotificationType_PEER_ADDED))
	}
	second := p.begin()
	p.notice(told("a", "x", peerpb.ChangeNotificationType_PEER_ADDED))
	p.forget(first)
	if len(p.list) != 2 {
		t.Errorf("a stream that is over forgets: %v", p.list)
	}
	p.forget(second)
	if all := p.all(); len(all) != 1 || all[0].Name != "a" {
		t.Errorf("%v", all)
	}
}
