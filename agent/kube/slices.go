package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"portcullis/authz"
)

// A service with a selector leads to pods, which policy knows by their labels.
// One without leads to the addresses that its EndpointSlices name, which somebody
// wrote by hand, or a program of his. (Kubernetes makes such slices of Endpoints
// objects, too.) They are watched as objects of their own, and told as a part of
// their service.

const sliceKind = "EndpointSlice"

// slice is what an EndpointSlice says.
type slice struct {
	service authz.ServiceName
	blocks  []netip.Prefix // single addresses, sorted
}

// sliceDoc is as much of an EndpointSlice as says that.
type sliceDoc struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Namespace string            `json:"namespace"`
		Name      string            `json:"name"`
		Labels    map[string]string `json:"labels,omitempty"`
	} `json:"metadata"`
	AddressType string          `json:"addressType"`
	Endpoints   []sliceEndpoint `json:"endpoints,omitempty"`
}

type sliceEndpoint struct {
	Addresses []string `json:"addresses"`
}

const serviceNameLabel = "kubernetes.io/service-name"

// toSlice reads an EndpointSlice. What it says of conditions, zones and ports is
// left out, for a backend that is not ready is the service's all the same, and so
// what changes often changes nothing here.
func toSlice(content map[string]any) (*Object, error) {
	data, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	return parseSlice(data)
}

func parseSlice(data []byte) (*Object, error) {
	var doc sliceDoc
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("it is not an EndpointSlice: %w", err)
	}
	if doc.Kind != sliceKind || doc.Metadata.Name == "" {
		return nil, errors.New("it is not an EndpointSlice")
	}
	of := doc.Metadata.Labels[serviceNameLabel]
	doc.Metadata.Labels = nil
	s := &slice{service: authz.ServiceName{Namespace: doc.Metadata.Namespace, Name: of}}
	if of != "" {
		doc.Metadata.Labels = map[string]string{serviceNameLabel: of}
	}
	if doc.AddressType != "FQDN" { // whose names nobody looks up
		for _, e := range doc.Endpoints {
			for _, text := range e.Addresses {
				ip, err := netip.ParseAddr(text)
				if err != nil || ip.Zone() != "" || ip.Is4In6() || ip.IsUnspecified() || ip.IsLoopback() || ip.IsMulticast() {
					return nil, fmt.Errorf("endpoints: %q is not the address of a backend", text)
				}
				s.blocks = append(s.blocks, netip.PrefixFrom(ip, ip.BitLen()))
			}
		}
	}
	slices.SortFunc(s.blocks, netip.Prefix.Compare)
	s.blocks = slices.Compact(s.blocks)
	source, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return &Object{Ref: authz.Ref{Kind: sliceKind, Namespace: doc.Metadata.Namespace, Name: doc.Metadata.Name}, Source: string(source), slice: s}, nil
}

// reparse reads what a snapshot has of an object.
func reparse(resource, source string) (*Object, error) {
	if resource == "endpointslices" {
		return parseSlice([]byte(source))
	}
	return parse(source)
}

// joinSlices puts in the place of each service without a selector one that says
// what its slices do: the same as the last time, if nothing of that has changed.
func (t *tables) joinSlices(objects []*Object) {
	said := map[authz.ServiceName][]netip.Prefix{}
	for _, e := range t.objects["endpointslices"] {
		if e.good != nil && e.good.slice.service.Name != "" {
			said[e.good.slice.service] = append(said[e.good.slice.service], e.good.slice.blocks...)
		}
	}
	former := t.behind
	t.behind = map[*Object]*Object{}
	for i, o := range objects {
		if o.Service == nil || len(o.Service.Selector) > 0 {
			continue
		}
		blocks := said[authz.ServiceName{Namespace: o.Ref.Namespace, Name: o.Ref.Name}]
		if len(blocks) == 0 {
			continue
		}
		slices.SortFunc(blocks, netip.Prefix.Compare)
		blocks = slices.Compact(blocks)
		joined := former[o]
		if joined == nil || !slices.Equal(joined.Service.Blocks, blocks) {
			service := *o.Service
			service.Blocks = blocks
			copied := *o
			copied.Service = &service
			joined = &copied
		}
		t.behind[o], objects[i] = joined, joined
	}
}
