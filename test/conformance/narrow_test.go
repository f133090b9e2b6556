package conformance

import (
	"encoding/json"
	"slices"

	"portcullis/bpf/abi"
)

// side returns the policies as if they spoke of one direction only. What it
// leaves is for the parsers to take or refuse.
func side(objects []object, dir abi.Direction) []object {
	word, fields := "Ingress", []string{"egress", "egressDeny"}
	if dir == abi.DirEgress {
		word, fields = "Egress", []string{"ingress", "ingressDeny"}
	}
	var out []object
	for _, o := range objects {
		o = clone(o)
		spec, _ := o["spec"].(object)
		if o["kind"] == "NetworkPolicy" {
			if !slices.Contains(policyTypes(spec), word) {
				continue
			}
			spec["policyTypes"] = []any{word}
		}
		for _, f := range fields {
			delete(spec, f)
		}
		out = append(out, o)
	}
	return out
}

// policyTypes returns a NetworkPolicy's, or what stands for none.
func policyTypes(spec object) (types []string) {
	given, _ := spec["policyTypes"].([]any)
	for _, t := range given {
		types = append(types, t.(string))
	}
	if len(types) == 0 {
		types = []string{"Ingress"}
		if egress, _ := spec["egress"].([]any); len(egress) > 0 {
			types = append(types, "Egress")
		}
	}
	return types
}

// ownLabels rewrites a NetworkPolicy that speaks Cilium. There a
// NetworkPolicy can select by Cilium's own labels, and every pod meets "the
// cluster's label exists"; here, as in Kubernetes, it selects by the labels
// that pods have, and that one would select nobody.
func ownLabels(o object) object {
	if o["kind"] != "NetworkPolicy" {
		return o
	}
	o = clone(o)
	var walk func(any)
	walk = func(v any) {
		switch v := v.(type) {
		case object:
			if expressions, ok := v["matchExpressions"].([]any); ok {
				v["matchExpressions"] = slices.DeleteFunc(expressions, func(e any) bool {
					x := e.(object)
					return x["key"] == "io.cilium.k8s.policy.cluster" && x["operator"] == "Exists"
				})
			}
			for _, f := range v {
				walk(f)
			}
		case []any:
			for _, i := range v {
				walk(i)
			}
		}
	}
	walk(o)
	return o
}

func clone(o object) object {
	b, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	var out object
	if err := json.Unmarshal(b, &out); err != nil {
		panic(err)
	}
	return out
}
