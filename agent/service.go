package agent

import (
	"net"
	"net/netip"
	"net/url"
	"os"
	"strings"
)

// withoutDNS returns the URL of a service of the agent's own namespace by the
// service's address, which the kubelet gives to every container. The cluster's
// DNS may be pods under policies that ask for leases: without SVIDs agents have
// none, and must not need DNS to get SVIDs. Whoever answers there is known by his
// SPIFFE ID, not by the name. Other URLs, and one whose service came after this
// container, are left as they are.
func withoutDNS(text, namespace string, getenv func(string) string) string {
	u, err := url.Parse(text)
	if err != nil {
		return text
	}
	labels := strings.Split(strings.TrimSuffix(u.Hostname(), "."), ".")
	if namespace == "" || len(labels) < 3 || labels[1] != namespace || labels[2] != "svc" {
		return text
	}
	ip, err := netip.ParseAddr(getenv(strings.ToUpper(strings.ReplaceAll(labels[0], "-", "_")) + "_SERVICE_HOST"))
	if err != nil {
		return text
	}
	port := u.Port()
	switch u.Host = ip.String(); {
	case port != "":
		u.Host = net.JoinHostPort(u.Host, port)
	case ip.Is6():
		u.Host = "[" + u.Host + "]"
	}
	return u.String()
}

// podNamespace is the namespace of the pod that this is; "" for none.
func podNamespace() string {
	b, err := os.ReadFile("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
