package cilium

import (
	"regexp"
	"strconv"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/l7"
	"portcullis/bpf/abi"
)

// maxPorts bounds the ports of one element of toPorts and the fields of one of
// icmps, as Cilium does.
const maxPorts = 40

// ports collects the ports that a rule names.
type ports struct {
	dir    abi.Direction
	action authz.Action
	nodes  bool // the subjects are nodes

	some  bool // it names ports or ICMP types
	plain []authz.PortRange
	l7    []l7Ports
}

// l7Ports are ports where rules inside a protocol apply.
type l7Ports struct {
	index int // in toPorts
	ports []authz.PortRange
	rules *l7.Rules
}

func (p *ports) parse(v *dialect.Value) {
	v.List(func(i int, v *dialect.Value) {
		p.some = true
		ranges, rules := p.element(v)
		if rules != nil {
			p.l7 = append(p.l7, l7Ports{i, ranges, rules})
			return
		}
		p.plain = append(p.plain, ranges...)
	})
}

// element parses an element of toPorts.
func (p *ports) element(v *dialect.Value) (ranges []authz.PortRange, inside *l7.Rules) {
	var parsed []port
	fields := dialect.Fields{"ports": func(f *dialect.Value) {
		f.List(func(_ int, v *dialect.Value) {
			one := parsePort(v)
			parsed = append(parsed, one)
			ranges = append(ranges, one.ranges...)
		})
		switch {
		case !f.IsList():
		case f.Len() == 0:
			f.Refuse("want one port or more; for every port leave out toPorts")
		case f.Len() > maxPorts:
			f.Refuse("it has %d ports, and at most %d are allowed: use ranges, or more elements of toPorts", f.Len(), maxPorts)
		}
	}}
	if p.action == authz.Deny {
		for _, k := range []string{"rules", "serverNames", "listener", "terminatingTLS", "originatingTLS"} {
			fields[k] = refuse("a rule that denies cannot look inside a protocol: remove it, to deny the whole port")
		}
	} else {
		fields["rules"] = dialect.Accept       // below, when the ports are known
		fields["serverNames"] = dialect.Accept // below
		fields["listener"] = refuse("there are no listeners of Envoy; remove it, to allow the whole port")
		for _, k := range []string{"terminatingTLS", "originatingTLS"} {
			fields[k] = refuse("TLS is not opened; remove it, and name servers by serverNames")
		}
	}
	if !v.Object(fields) {
		return nil, nil
	}
	v.Require("ports")
	if p.action == authz.Deny {
		return ranges, nil
	}
	if r := v.Field("rules"); r != nil {
		inside = p.rules(r, parsed)
	}
	if s := v.Field("serverNames"); s != nil {
		if inside != nil {
			s.Refuse("it cannot be combined with rules: write an element of toPorts for each")
		}
		inside = p.serverNames(s, parsed)
	}
	return ranges, inside
}

// port is what an element of ports says.
type port struct {
	at       *dialect.Value
	ranges   []authz.PortRange
	protocol string // as it stands there
	zero     bool   // every port
	several  bool   // a range
}

var portNumber = regexp.MustCompile(`^[1-9][0-9]{0,4}$`)

// protocols are those that have ports.
var protocols = map[string][]uint8{
	"TCP": {authz.ProtoTCP}, "UDP": {authz.ProtoUDP}, "SCTP": {authz.ProtoSCTP},
	"ANY": anyProtocol, "": anyProtocol,
}

var anyProtocol = []uint8{authz.ProtoTCP, authz.ProtoUDP, authz.ProtoSCTP}

// portless are the protocols without ports that Cilium takes, by their numbers
// at IANA.
var portless = map[string]uint8{
	"IGMP": 2, "IPIP": 4, "IPV6": 41, "GRE": 47, "ESP": 50, "AH": 51, "VRRP": 112,
}

func parsePort(v *dialect.Value) port {
	p, number, name, end := port{at: v, zero: true}, 0, "", (*dialect.Value)(nil)
	v.Object(dialect.Fields{
		"port": func(f *dialect.Value) { number, name = portText(f) },
		"endPort": func(f *dialect.Value) {
			if n, ok := f.Number(); ok && n > 65535 {
				f.Refuse("want a port from 1 to 65535")
			} else if ok && n > 0 { // 0: no range
				end = f
			}
		},
		"protocol": func(f *dialect.Value) {
			s, ok := f.Text()
			switch {
			case !ok:
			case strings.HasPrefix(s, "ICMP"):
				f.Refuse("not supported: write a rule with icmps")
			case protocols[s] == nil && portless[s] == 0:
				f.Refuse("want TCP, UDP, SCTP, ANY, IGMP, IPIP, IPV6, GRE, ESP, AH or VRRP, in capitals")
			}
			p.protocol = s
		},
	})
	p.zero = number == 0 && name == ""
	if proto, ok := portless[p.protocol]; ok {
		if f := v.Field("port"); f != nil && !p.zero {
			f.Refuse("%s has no ports: remove it", p.protocol)
		}
		if end != nil {
			end.Refuse("%s has no ports: remove it", p.protocol)
		}
		p.ranges = []authz.PortRange{authz.AllPorts(proto)}
		return p
	}
	last := number
	if p.zero {
		last = 65535
	}
	if end != nil {
		n, _ := end.Number()
		switch {
		case name != "", p.zero:
			end.Refuse("a range begins with a number: write port as one, or remove endPort")
		case n < number:
			end.Refuse("the range ends before port, where it begins")
		default:
			last, p.several = n, n > number
		}
	}
	for _, proto := range protocols[p.protocol] {
		if name != "" {
			p.ranges = append(p.ranges, authz.PortNamed(proto, name))
			continue
		}
		p.ranges = append(p.ranges, authz.PortRange{Proto: proto, First: uint16(number), Last: uint16(last)})
	}
	return p
}

// portText parses a port: a number, of which 0 stands for every port, or a
// name.
func portText(f *dialect.Value) (number int, name string) {
	s, ok := f.Text()
	switch {
	case !ok, s == "0":
	case portNumber.MatchString(s):
		if number, _ = strconv.Atoi(s); number > 65535 {
			f.Refuse("want a port from 1 to 65535, or 0 for every port")
			return 0, ""
		}
	default:
		// Cilium compares names without regard to case.
		if name = strings.ToLower(s); !dialect.IsPortName(name) {
			f.Refuse("want a number from 1 to 65535 in decimal, 0 for every port, or the name of a container port (letters, digits and -, at most 15, one of them a letter)")
			return 0, ""
		}
	}
	return number, name
}

// icmps parses a rule's ICMP types.
func (p *ports) icmps(v *dialect.Value) {
	v.List(func(_ int, v *dialect.Value) {
		p.some = true
		v.Object(dialect.Fields{"fields": func(f *dialect.Value) {
			f.List(func(_ int, v *dialect.Value) { p.icmp(v) })
			switch {
			case !f.IsList():
			case f.Len() == 0:
				f.Refuse("want one type or more; for ICMP with all else leave out icmps")
			case f.Len() > maxPorts:
				f.Refuse("it has %d types, and at most %d are allowed: use more elements of icmps", f.Len(), maxPorts)
			}
		}})
		v.Require("fields")
	})
}

func (p *ports) icmp(v *dialect.Value) {
	proto, names, other := uint8(authz.ProtoICMP), icmpTypes, icmpv6Types
	var kind *dialect.Value
	v.Object(dialect.Fields{
		"family": func(f *dialect.Value) {
			switch s, ok := f.Text(); {
			case !ok, s == "IPv4":
			case s == "IPv6":
				proto, names, other = authz.ProtoICMPv6, icmpv6Types, icmpTypes
			default:
				f.Refuse("want IPv4 or IPv6")
			}
		},
		"type": func(f *dialect.Value) { kind = f },
	})
	v.Require("type")
	if kind == nil {
		return
	}
	n, ok := 0, false
	if !kind.IsText() {
		n, ok = kind.Number()
	} else {
		s, _ := kind.Text()
		var err error
		if n, ok = names[s]; !ok {
			n, err = strconv.Atoi(s)
			ok = err == nil && strconv.Itoa(n) == s
		}
		if _, elsewhere := other[s]; !ok && elsewhere {
			kind.Refuse("there is no such type in this family: give the field another family, or the type as a number")
			return
		}
	}
	if kind.IsText() && !ok || ok && (n < 0 || n > 255) {
		kind.Refuse("want a type from 0 to 255, or its name as Cilium writes it, as in EchoRequest")
		return
	}
	if ok {
		p.plain = append(p.plain, authz.PortRange{Proto: proto, First: uint16(n) << 8, Last: uint16(n)<<8 | 0xff})
	}
}

// icmpTypes and icmpv6Types are the names that Cilium has for types, and the
// numbers that IANA gives them.
var icmpTypes = map[string]int{
	"EchoReply": 0, "DestinationUnreachable": 3, "Redirect": 5, "Echo": 8, "EchoRequest": 8,
	"RouterAdvertisement": 9, "RouterSelection": 10, "TimeExceeded": 11, "ParameterProblem": 12,
	"Timestamp": 13, "TimestampReply": 14, "Photuris": 40, "ExtendedEchoRequest": 42, "ExtendedEchoReply": 43,
}

var icmpv6Types = map[string]int{
	"DestinationUnreachable": 1, "PacketTooBig": 2, "TimeExceeded": 3, "ParameterProblem": 4,
	"EchoRequest": 128, "EchoReply": 129, "MulticastListenerQuery": 130, "MulticastListenerReport": 131,
	"MulticastListenerDone": 132, "RouterSolicitation": 133, "RouterAdvertisement": 134,
	"NeighborSolicitation": 135, "NeighborAdvertisement": 136, "RedirectMessage": 137, "RouterRenumbering": 138,
	"ICMPNodeInformationQuery": 139, "ICMPNodeInformationResponse": 140,
	"InverseNeighborDiscoverySolicitation": 141, "InverseNeighborDiscoveryAdvertisement": 142,
	"HomeAgentAddressDiscoveryRequest": 144, "HomeAgentAddressDiscoveryReply": 145,
	"MobilePrefixSolicitation": 146, "MobilePrefixAdvertisement": 147,
	"DuplicateAddressRequestCodeSuffix": 157, "DuplicateAddressConfirmationCodeSuffix": 158,
	"ExtendedEchoRequest": 160, "ExtendedEchoReply": 161,
}
