package k8s

import (
	"net/netip"
	"slices"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// ServiceKind is the kind of the objects that say what stands behind a service.
const ServiceKind = "Service"

// Services is the dialect of Service objects. Of one its labels, its selector, its
// addresses and its ports say something to policy.
var Services = dialect.Dialect{APIVersion: "v1", Kind: ServiceKind, Parse: parseService}

func parseService(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	m := doc.Meta(ServiceKind)
	s := &authz.ServiceObject{Ref: m.Ref, UID: m.UID, Source: doc.Source, Backends: authz.Backends{Labels: m.Labels}}
	add := func(v *dialect.Value) {
		text, ok := v.Text()
		if !ok || text == "" || text == "None" { // headless, or not given one yet
			return
		}
		ip, err := netip.ParseAddr(text)
		if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() {
			v.Refuse("%q is not the address of a service", text)
			return
		}
		if !slices.Contains(s.Addresses, ip) {
			s.Addresses = append(s.Addresses, ip)
		}
	}
	each := func(v *dialect.Value) { v.List(func(_ int, v *dialect.Value) { add(v) }) }
	spec := doc.Root().Field("spec")
	doc.Object(dialect.Fields{"spec": dialect.Accept})
	external := false
	if spec != nil && spec.IsObject() {
		if f := spec.Field("type"); f != nil {
			kind, _ := f.Text()
			external = kind == "ExternalName"
		}
		if f := spec.Field("externalName"); f != nil && external {
			s.External, _ = f.Text()
		}
		if f := spec.Field("selector"); f != nil {
			f.Each(func(key string, f *dialect.Value) {
				if value, ok := f.LabelValue(); ok && f.LabelKey(key) {
					if s.Selector == nil {
						s.Selector = map[string]string{}
					}
					s.Selector[key] = value
				}
			})
		}
		s.Ports = servicePorts(spec)
		if f := spec.Field("clusterIP"); f != nil {
			add(f)
		}
		for _, list := range []string{"clusterIPs", "externalIPs"} {
			if f := spec.Field(list); f != nil {
				each(f)
			}
		}
	}
	balancers(doc.Root(), add)
	if external { // the API server looks at nothing else of it
		if s.External == "" && len(doc.Problems()) == 0 {
			spec.Refuse("field externalName is missing")
		}
		s.Selector, s.Addresses, s.Ports = nil, nil, nil
	}
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	return dialect.Result{Services: []*authz.ServiceObject{s}}, nil
}

// balancers visits the addresses of load balancers that stand for the service.
func balancers(root *dialect.Value, ip func(*dialect.Value)) {
	f := root.Field("status")
	for _, key := range []string{"loadBalancer", "ingress"} {
		if f == nil || !f.IsObject() {
			return
		}
		f = f.Field(key)
	}
	if f != nil {
		f.List(func(_ int, v *dialect.Value) {
			if v.IsObject() && v.Field("ip") != nil {
				ip(v.Field("ip"))
			}
		})
	}
}

func servicePorts(spec *dialect.Value) (out []authz.ServicePort) {
	if f := spec.Field("ports"); f != nil {
		f.List(func(_ int, v *dialect.Value) {
			if port, ok := servicePort(v); ok {
				out = append(out, port)
			}
		})
	}
	return out
}

// servicePort parses one of a service's ports. ok: it is one that can be looked
// into.
func servicePort(v *dialect.Value) (p authz.ServicePort, ok bool) {
	if !v.IsObject() {
		v.Refuse("want a port of a service")
		return p, false
	}
	p.Protocol = authz.ProtoTCP
	if v.Has("protocol") {
		switch protocol, _ := v.Field("protocol").Text(); protocol {
		case "", "TCP":
		case "UDP":
			p.Protocol = authz.ProtoUDP
		default: // SCTP, or what comes to be known of services after it
			return p, false
		}
	}
	if !v.Has("port") {
		v.Require("port")
		return p, false
	}
	p.Port = uint16(portNumber(v.Field("port")))
	p.Target = p.Port
	if v.Has("targetPort") {
		if f := v.Field("targetPort"); f.IsText() {
			p.Target = 0
			p.TargetName, _ = f.Text()
		} else {
			p.Target = uint16(portNumber(f))
		}
	}
	return p, v.Fine()
}
