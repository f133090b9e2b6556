package agent

import (
	"strconv"
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

// What could not be confirmed to another agent is not registered: it would end
// the session in which it is asked for, and every lease on that.
func TestRegistrationRefusesWhatCannotBeConfirmed(t *testing.T) {
	good := func() *api.RegisterWorkloadRequest {
		return &api.RegisterWorkloadRequest{Uid: identity.NewUID().String(), Namespace: "default", Name: "xwing", Ips: []string{"10.1.1.2"}, HostIfname: "veth0",
			Labels: map[string]string{"app.kubernetes.io/name": "x-wing"}, Ports: []*api.NamedPort{{Name: "http", Port: 80, Protocol: "TCP"}}}
	}
	if _, err := parseRegistration(good(), "td"); err != nil {
		t.Fatal(err)
	}
	long, many := strings.Repeat("x", 1000), map[string]string{}
	for i := range 300 {
		many[strconv.Itoa(i)] = ""
	}
	for name, spoil := range map[string]func(*api.RegisterWorkloadRequest){
		"uid of zeros":                  func(r *api.RegisterWorkloadRequest) { r.Uid = identity.UID{}.String() },
		"name that writes to terminals": func(r *api.RegisterWorkloadRequest) { r.Name = "x\x1b[2J" },
		"long name":                     func(r *api.RegisterWorkloadRequest) { r.Name = long },
		"namespace with a slash":        func(r *api.RegisterWorkloadRequest) { r.Namespace = "a/b" },
		"long namespace":                func(r *api.RegisterWorkloadRequest) { r.Namespace = long },
		"service account with a space":  func(r *api.RegisterWorkloadRequest) { r.ServiceAccount = "a b" },
		"trust domain":                  func(r *api.RegisterWorkloadRequest) { r.TrustDomain = "Not A Domain" },
		"label without a key":           func(r *api.RegisterWorkloadRequest) { r.Labels[""] = "v" },
		"label with a line break":       func(r *api.RegisterWorkloadRequest) { r.Labels["k"] = "v\nw" },
		"long label":                    func(r *api.RegisterWorkloadRequest) { r.Labels["k"] = long },
		"many labels":                   func(r *api.RegisterWorkloadRequest) { r.Labels = many },
		"port without a name":           func(r *api.RegisterWorkloadRequest) { r.Ports[0].Name = "" },
		"long port name":                func(r *api.RegisterWorkloadRequest) { r.Ports[0].Name = long },
	} {
		r := good()
		spoil(r)
		if _, err := parseRegistration(r, "td"); err == nil {
			t.Errorf("%s: registered", name)
		}
	}
}
