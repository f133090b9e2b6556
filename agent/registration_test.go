package agent

import (
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/identity"
)

func TestParseRegistration(t *testing.T) {
	uid := identity.NewUID().String()
	w, err := parseRegistration(&api.RegisterWorkloadRequest{Uid: uid, Namespace: "default", Name: "xwing", Labels: map[string]string{"org": "alliance"},
		Ips: []string{"10.1.1.2", "2001:db8::2"}, HostIfname: "veth0", Mac: "02:00:00:00:00:01", Ports: []*api.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}}, "td")
	if err != nil {
		t.Fatal(err)
	}
	if want := identity.New("td", "default", "default", map[string]string{"org": "alliance"}); !w.identity.Equal(want) {
		t.Errorf("identity %v, want %v", w.identity, want)
	}
	_, err = parseRegistration(&api.RegisterWorkloadRequest{Uid: "7", Ips: []string{"10.1.1.2", "10.1.1.3"}, HostIfname: "averyveryverylongname", Mac: "zz",
		Ports: []*api.NamedPort{{Name: "p", Port: 0, Protocol: "IPX"}}}, "td")
	for _, want := range []string{"uid", "namespace and name", "host_ifname", "one address of each family", "mac", "not a port number", "IPX"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("nothing about %q in: %v", want, err)
		}
	}
	for _, ip := range []string{"", "::ffff:10.1.1.2", "fe80::1%eth0", "fe80::1", "0.0.0.0", "127.0.0.1", "224.0.0.1"} {
		if _, err := parseIPs([]string{ip}); err == nil {
			t.Errorf("%q was accepted", ip)
		}
	}
}
