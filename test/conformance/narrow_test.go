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
