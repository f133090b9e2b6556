package kube

import (
	"encoding/json"
	"fmt"

	"portcullis/authz/dialect/k8s"
)

// A service with a selector leads to pods, which policy knows by their labels.
// One without leads to the addresses that its EndpointSlices name, which somebody
// wrote by hand, or a program of his; the API server writes such of its own for
// default/kubernetes, and mirrors Endpoints objects.

// sliceDoc is as much of an EndpointSlice as says something to policy. What it
// says of conditions, zones and ports is left out: what changes often changes
// nothing here.
type sliceDoc struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Namespace string            `json:"namespace"`
		Name      string            `json:"name"`
		UID       string            `json:"uid,omitempty"`
		Labels    map[string]string `json:"labels,omitempty"`
	} `json:"metadata"`
	AddressType string          `json:"addressType"`
	Endpoints   []sliceEndpoint `json:"endpoints,omitempty"`
}

type sliceEndpoint struct {
	Addresses []string `json:"addresses"`
}

// toSlice reads an EndpointSlice.
func toSlice(content map[string]any) (*Object, error) {
	data, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	var doc sliceDoc
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("it is not an EndpointSlice: %w", err)
	}
	of, named := doc.Metadata.Labels[k8s.SliceService]
	if doc.Metadata.Labels = nil; named {
		doc.Metadata.Labels = map[string]string{k8s.SliceService: of}
	}
	source, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return parse(string(source))
}
