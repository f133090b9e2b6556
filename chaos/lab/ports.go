package lab

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"portcullis/identity"
)

// portName is what Kubernetes takes for the name of a container port.
var portName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?$`)

// ParsePort reads a named container port, "NAME=NUMBER" or
// "NAME=NUMBER/PROTOCOL"; the protocol is TCP (where none is given), UDP or
// SCTP.
func ParsePort(s string) (p identity.NamedPort, err error) {
	name, rest, ok := strings.Cut(s, "=")
	number, proto, given := strings.Cut(rest, "/")
	if !given {
		proto = "TCP"
	}
	n, err := strconv.ParseUint(number, 10, 16)
	switch {
	case !ok || err != nil || n == 0:
		return p, fmt.Errorf("%q is not NAME=NUMBER or NAME=NUMBER/PROTOCOL, with a number from 1 to 65535", s)
	case !portName.MatchString(name) || !strings.ContainsAny(name, "abcdefghijklmnopqrstuvwxyz"):
		return p, fmt.Errorf("%q: the name of a port is lower-case letters (at least one), digits and '-', at most 15", s)
	case proto != "TCP" && proto != "UDP" && proto != "SCTP":
		return p, fmt.Errorf("%q: the protocol is TCP, UDP or SCTP", s)
	}
	return identity.NamedPort{Name: name, Port: uint16(n), Protocol: proto}, nil
}

// checkPorts refuses what Kubernetes refuses: one name for two ports.
func checkPorts(ports []identity.NamedPort) error {
	seen := map[string]bool{}
	for _, p := range ports {
		if seen[p.Name] {
			return fmt.Errorf("ports: %q is given twice", p.Name)
		}
		seen[p.Name] = true
	}
	return nil
}
