package conformance

import (
	"encoding/json"
	"maps"
	"slices"
)

// narrow rewrites policies so that their ingress side means the same in fewer
// words: egress is left out, an expression "In" becomes one selector for each
// value, "the cluster label exists" (every pod of the corpus has it) is left
// out. What it leaves is for the parsers to take or refuse.
func narrow(objects []object) []object {
	var out []object
	for _, o := range objects {
		o = clone(o)
		spec, _ := o["spec"].(object)
		if spec == nil {
			continue
		}
		delete(spec, "egress")
		delete(spec, "egressDeny")
		if types, ok := spec["policyTypes"].([]any); ok {
			types = slices.DeleteFunc(types, func(t any) bool { return t == "Egress" })
			if len(types) == 0 {
				continue // speaks of egress only
			}
			spec["policyTypes"] = types
		}
		ingress, _ := spec["ingress"].([]any)
		for _, r := range ingress {
			rule := r.(object)
			for _, field := range []string{"from", "fromEndpoints"} {
				if peers, ok := rule[field].([]any); ok {
					rule[field] = unrollPeers(peers, field == "from")
				}
			}
		}
		field := "podSelector"
		if _, ok := spec["endpointSelector"]; ok {
			field = "endpointSelector"
		}
		if s, ok := spec[field].(object); ok {
			for i, one := range unroll(s) {
				each := clone(o)
				each["spec"].(object)[field] = one
				if i > 0 {
					meta := each["metadata"].(object)
					meta["name"] = meta["name"].(string) + "-" + string(rune('a'+i))
				}
				out = append(out, each)
			}
			continue
		}
		out = append(out, o)
	}
	return out
}

func unrollPeers(peers []any, nested bool) []any {
	out := []any{}
	for _, p := range peers {
		peer := p.(object)
		if !nested {
			for _, s := range unroll(peer) {
				out = append(out, s)
			}
			continue
		}
		todo := []object{peer}
		for _, field := range []string{"podSelector", "namespaceSelector"} {
			var next []object
			for _, q := range todo {
				s, ok := q[field].(object)
				if !ok {
					next = append(next, q)
					continue
				}
				for _, one := range unroll(s) {
					each := maps.Clone(q)
					each[field] = one
					next = append(next, each)
				}
			}
			todo = next
		}
		for _, q := range todo {
			out = append(out, q)
		}
	}
	return out
}

// unroll returns the selectors without "In" that together select the same.
func unroll(s object) []object {
	todo := []object{clone(s)}
	expressions, _ := s["matchExpressions"].([]any)
	var kept []any
	for _, e := range expressions {
		expr := e.(object)
		values, _ := expr["values"].([]any)
		switch {
		case expr["operator"] == "Exists" && expr["key"] == "io.cilium.k8s.policy.cluster":
		case expr["operator"] == "In" && len(values) > 0:
			var next []object
			for _, q := range todo {
				for _, v := range values {
					each := clone(q)
					labels, _ := each["matchLabels"].(object)
					if labels == nil {
						labels = object{}
					}
					labels[expr["key"].(string)] = v
					each["matchLabels"] = labels
					next = append(next, each)
				}
			}
			todo = next
		default:
			kept = append(kept, e)
		}
	}
	for _, q := range todo {
		delete(q, "matchExpressions")
		if len(kept) > 0 {
			q["matchExpressions"] = kept
		}
	}
	return todo
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
