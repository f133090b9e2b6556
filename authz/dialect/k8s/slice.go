package k8s

import (
	"net/netip"
	"slices"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// SliceKind is the kind of the objects that say to which addresses a service
// without a selector leads.
const SliceKind = "EndpointSlice"

// SliceService is the label by which a slice names its service.
const SliceService = "kubernetes.io/service-name"

// Slices is the dialect of EndpointSlice objects. Of one its service and its
// addresses say something to policy, whether they are ready or not: one that is
// not is the service's all the same.
var Slices = dialect.Dialect{APIVersion: "discovery.k8s.io/v1", Kind: SliceKind, Parse: parseSlice}

func parseSlice(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	m := doc.Meta(SliceKind)
	s := &authz.SliceObject{Ref: m.Ref, UID: m.UID, Source: doc.Source, Service: m.Labels[SliceService]}
	kind := ""
	if f := doc.Root().Field("addressType"); f != nil {
		if kind, _ = f.Text(); kind != "IPv4" && kind != "IPv6" && kind != "FQDN" {
			f.Refuse("want IPv4, IPv6 or FQDN")
		}
	}
	address := func(_ int, v *dialect.Value) {
		text, ok := v.Text()
		if !ok || kind == "FQDN" { // whose names nobody looks up
			return
		}
		ip, err := netip.ParseAddr(text)
		// What the API server takes for a backend, and no more.
		if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip == broadcast {
			v.Refuse("%q is not the address of a backend: none that is loopback, link-local or multicast is", text)
			return
		}
		if ip.Is4() != (kind == "IPv4") {
			v.Refuse("%q is not of the slice's addressType, %s", text, kind)
			return
		}
		s.IPs = append(s.IPs, ip)
	}
	doc.Object(dialect.Fields{"addressType": dialect.Accept, "ports": dialect.Accept, "endpoints": func(v *dialect.Value) {
		v.List(func(_ int, v *dialect.Value) {
			fields := dialect.Fields{"addresses": func(v *dialect.Value) { v.List(address) }}
			for _, k := range []string{"conditions", "deprecatedTopology", "hints", "hostname", "nodeName", "targetRef", "zone"} {
				fields[k] = dialect.Accept
			}
			v.Object(fields)
		})
	}})
	doc.Root().Require("addressType")
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	slices.SortFunc(s.IPs, netip.Addr.Compare)
	s.IPs = slices.Compact(s.IPs)
	return dialect.Result{Slices: []*authz.SliceObject{s}}, nil
}

var broadcast = netip.AddrFrom4([4]byte{255, 255, 255, 255})
