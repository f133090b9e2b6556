package hubble

import (
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// Every field of the published filter means something: set alone, it does not
// match a flow of which nothing is known, or it is refused.
func TestNoFilterIsIgnored(t *testing.T) {
	one := map[string]string{"source_ip": "10.0.0.1", "destination_ip": "10.0.0.1", "source_ip_xlated": "10.0.0.1", "http_status_code": "404", "protocol": "tcp", "source_port": "80", "destination_port": "80"}
	fields := (&flowpb.FlowFilter{}).ProtoReflect().Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		ff := &flowpb.FlowFilter{}
		m := ff.ProtoReflect()
		if !fd.IsList() {
			m.Set(fd, protoreflect.ValueOfMessage((&flowpb.FlowFilter_Experimental{CelExpression: []string{"true"}}).ProtoReflect()))
		} else {
			list := m.Mutable(fd).List()
			switch fd.Kind() {
			case protoreflect.StringKind:
				v := one[string(fd.Name())]
				if v == "" {
					v = "x"
				}
				list.Append(protoreflect.ValueOfString(v))
			case protoreflect.Uint32Kind:
				list.Append(protoreflect.ValueOfUint32(7))
			case protoreflect.Uint64Kind:
				list.Append(protoreflect.ValueOfUint64(7))
			case protoreflect.BoolKind:
				list.Append(protoreflect.ValueOfBool(true))
			case protoreflect.EnumKind:
				list.Append(protoreflect.ValueOfEnum(fd.Enum().Values().Get(1).Number()))
			case protoreflect.MessageKind:
				list.Append(list.NewElement())
			}
		}
		f, err := Compile([]*flowpb.FlowFilter{ff}, nil)
		if fd.Name() == "experimental" {
			if err == nil {
				t.Error("an expression is taken, and nobody evaluates it")
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", fd.Name(), err)
			continue
		}
		if f.Match(&flowpb.Flow{}) {
			t.Errorf("%s matches a flow of which nothing is known", fd.Name())
		}
	}
}

// A filter of a later version is refused, not ignored.
func TestFiltersOfALaterVersion(t *testing.T) {
	ff := &flowpb.FlowFilter{}
	ff.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 4711, protowire.VarintType), 1))
	if _, err := Compile([]*flowpb.FlowFilter{ff}, nil); err == nil {
		t.Error("a field that nobody knows is ignored")
	}
}

func TestMalformedFilters(t *testing.T) {
	for name, ff := range map[string]*flowpb.FlowFilter{
		"source_ip": {SourceIp: []string{"10.0.0"}}, "destination_ip": {DestinationIp: []string{"10.0.0.0/33"}},
		"source_pod": {SourcePod: []string{""}}, "source_port": {SourcePort: []string{"http"}}, "destination_port": {DestinationPort: []string{"65536"}},
		"source_label": {SourceLabel: []string{"a in b"}}, "protocol": {Protocol: []string{"quic"}}, "http_status_code": {HttpStatusCode: []string{"4++"}},
		"http_path": {HttpPath: []string{"("}}, "http_url": {HttpUrl: []string{"["}}, "dns_query": {DnsQuery: []string{"("}}, "node_name": {NodeName: []string{"a/b/c"}},
		"source_fqdn": {SourceFqdn: []string{"a b"}}, "source_cluster_name": {SourceClusterName: []string{""}},
		"http_method": {HttpMethod: []string{"GET"}, EventType: []*flowpb.EventTypeFilter{{Type: eventDrop}}},
	} {
		if _, err := Compile(nil, []*flowpb.FlowFilter{ff}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%v: %v, want one that names %s", ff, err, name)
		}
	}
}

func TestMask(t *testing.T) {
	//lint:ignore SA1019 hubble's clients still read it
	full := &flowpb.Flow{NodeName: "n1", Summary: "x", Verdict: flowpb.Verdict_DROPPED, Source: &flowpb.Endpoint{ID: 3, Identity: 7, Labels: []string{"k8s:a"}, PodName: "p"}, IP: &flowpb.IP{Source: "10.0.0.1", Destination: "10.0.0.2"}}
	m, err := NewMask(&fieldmaskpb.FieldMask{Paths: []string{"source.pod_name", "IP.source", "IP", "verdict", "source.identity", "destination.identity", "l7"}})
	if err != nil {
		t.Fatal(err)
	}
	got := m.Apply(full)
	want := &flowpb.Flow{Verdict: flowpb.Verdict_DROPPED, Source: &flowpb.Endpoint{Identity: 7, PodName: "p"}, IP: full.IP}
	if got.String() != want.String() {
		t.Errorf("%v, want %v", got, want)
	}
	if full.Source.ID != 3 || len(full.Source.Labels) != 1 {
		t.Error("the flow itself was changed")
	}
	if m, err := NewMask(nil); m != nil || err != nil || m.Apply(full) != full {
		t.Error("no mask is not all fields")
	}
	for _, path := range []string{"", "sauce", "source.", "source.labels.x", "verdict.x"} {
		if _, err := NewMask(&fieldmaskpb.FieldMask{Paths: []string{path}}); err == nil {
			t.Errorf("path %q was taken", path)
		}
	}
}

// A few bytes may ask for a great deal of memory: that is refused before it is there.
func TestLargePatternsAreRefused(t *testing.T) {
	for what, words := range map[string][]string{
		"one that repeats": {strings.Repeat("[a-z]{1000}", 50)},
		"a long one":       {strings.Repeat("a", maxPattern+1)},
		"many":             slices.Repeat([]string{"x{500}"}, 100),
	} {
		for field, ff := range map[string]*flowpb.FlowFilter{"path": {HttpPath: words}, "url": {HttpUrl: words}, "query": {DnsQuery: words}} {
			if _, err := Compile(nil, []*flowpb.FlowFilter{ff}); err == nil {
				t.Errorf("%s of %s is compiled", what, field)
			}
		}
	}
	var each []*flowpb.FlowFilter
	for range 100 {
		each = append(each, &flowpb.FlowFilter{DnsQuery: []string{"x{500}"}})
	}
	if _, err := Compile(each[:50], each[50:]); err == nil {
		t.Error("many in a filter each are compiled")
	}
	if _, err := Compile([]*flowpb.FlowFilter{{HttpPath: []string{"/v1/.{0,200}", "(?i)^/a+$"}}}, nil); err != nil {
		t.Error(err)
	}
}
