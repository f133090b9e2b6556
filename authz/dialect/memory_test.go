package dialect_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/authz/dialect/tree"
	"portcullis/test/peak"
)

// maxPeak is what a process may have in memory at any time while it parses one
// file, itself included.
const maxPeak = 64 << 20

func fill(head, piece, tail string) string { return peak.Fill(dialect.MaxFile, head, piece, tail) }

func fillN(head, piece, tail string, n int) string {
	return peak.FillNumbered(dialect.MaxFile, head, piece, tail, n)
}

// hostile are files, as large as they may be, that ask for much memory.
func hostile() map[string]string {
	const netpol = "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: "
	const list = "apiVersion: v1\nkind: List\nitems:\n"
	const l7 = `{"rules": [{"coverage": ["a"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [`
	laughs := "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
	for i := range 20 {
		laughs += fmt.Sprintf("a%d: &a%d [%s]\n", i+1, i+1, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d,", i), 9), ","))
	}
	longItem := "&i {apiVersion: v1, kind: X, a: " + strings.Repeat("x", 500_000) + "}"
	return map[string]string{
		"nothing":                "",
		"scalar":                 fill("a: ", "x", ""),
		"scalar, quoted":         fill(`a: "`, `A`, `"`),
		"scalar, folded":         fill("a: >\n", "  x\n", ""),
		"scalar, lines":          fill("a: ", "x\n  ", ""),
		"key":                    fill("? ", "x", "\n: y"),
		"keys":                   fillN("{", "k%d: ,", "}", 1<<20),
		"keys, twice":            fill("{", "k: 1,", "}"),
		"keys, no values":        fill("", "? a\n", ""),
		"comments":               fill("", "#\n", "a: b"),
		"comments behind values": fill("[\n", "a, # x\n", "]"),
		"comments, long":         fill("a: b # ", "x", ""),
		"aliases":                laughs,
		"aliases of a scalar":    fill("a: &a "+strings.Repeat("x", 500_000)+"\nb: [", "*a,", "]"),
		"aliases, 100,000":       fill("a: &a x\nb: [", "*a,", "]"),
		"anchors":                fill("[", "&a a,", "]"),
		"cycle":                  "&a [*a, *a]",
		"depth, flow":            fill("", "[", ""),
		"depth, objects":         fill("", "{a: ", ""),
		"depth, block":           fill("", "- ", ""),
		"depth, closed":          strings.Repeat("[", 200_000) + strings.Repeat("]", 200_000),
		"list, flow":             fill("[", "a,", "]"),
		"list, empty objects":    fill("[", "{},", "]"),
		"list, empty lists":      fill("[", "[],", "]"),
		"list, small objects":    fill("[", "{a: 1},", "]"),
		"list, 49,000 objects":   "[" + strings.Repeat("{a: 1},", 49_000) + "]",
		"list, 74,000 strings":   "[" + strings.Repeat("abcdefgh,", 74_000) + "]",
		"list, 74,000 lists":     "[" + strings.Repeat("[],", 74_000) + "]",
		"list, JSON":             fill("[", `{"a":{"b":1}},`, "0]"),
		"list, block":            fill("", "- a\n", ""),
		"list, two deep":         fill("", "- - a\n", ""),
		"tags":                   fill("[", "!x a,", "]"),
		"merges":                 fill("a: &a {b: c}\nd: [", "{<<: *a},", "]"),
		"documents":              fill("", "---\na\n", ""),
		"documents, policies":    fillN("", netpol+"p%d}, spec: {podSelector: {}}}\n---\n", "", 1<<20),
		"documents, one name":    fill("", "---\n"+netpol+"p}, spec: {podSelector: {}}}\n", ""),
		"directives":             fill("", "%YAML 1.2\n", "---\na"),
		"line breaks of YAML":    fill("a: ", "\u2028b", ""),
		"bytes":                  fill("a: ", "\xff", ""),
		"labels":                 fillN(netpol+"p}, spec: {podSelector: {matchLabels: {", "k%d: v,", "}}}}", 1<<20),
		"labels, wrong":          fillN(netpol+"p}, spec: {podSelector: {matchLabels: {", "'k %d': v,", "}}}}", 1<<20),
		"unknown fields":         fillN(netpol+"p}, spec: {", "u%d: v,", "}}", 1<<20),
		"long unknown fields":    fillN(netpol+"p}, spec: {", "u%d"+strings.Repeat("x", 1000)+": v,", "}}", 1<<20),
		"rules":                  fill(netpol+"p}, spec: {podSelector: {}, ingress: [", "{},", "]}}"),
		"rules, 20,000":          netpol + "p}, spec: {podSelector: {}, ingress: [" + strings.Repeat("{},", 20_000) + "]}}",
		"peers":                  fill(netpol+"p}, spec: {podSelector: {}, ingress: [{from: [", "{podSelector: {}},", "]}]}}"),
		"peers, 15,000":          netpol + "p}, spec: {podSelector: {}, ingress: [{from: [" + strings.Repeat("{podSelector: {}},", 15_000) + "]}]}}",
		"ports":                  netpol + "p}, spec: {podSelector: {}, ingress: [{ports: [" + strings.Repeat("{port: 80},", 49_000) + "]}]}}",
		"blocks":                 netpol + "p}, spec: {podSelector: {}, ingress: [{from: [" + strings.Repeat("{ipBlock: {cidr: 10.0.0.0/8}},", 15_000) + "]}]}}",
		"exceptions":             netpol + "p}, spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [" + strings.Repeat("10.1.0.0/16,", 70_000) + "]}}]}]}}",
		"values":                 netpol + "p}, spec: {podSelector: {matchExpressions: [{key: a, operator: In, values: [" + strings.Repeat("a,", 99_000) + "]}]}}}",
		"expressions":            netpol + "p}, spec: {podSelector: {matchExpressions: [" + strings.Repeat("{key: a, operator: Exists},", 12_000) + "]}}}",
		"List":                   fillN(list, "- "+netpol+"p%d}, spec: {podSelector: {}}}\n", "", 1<<20),
		"List, 7,000":            fillN(list, "- "+netpol+"p%d}, spec: {podSelector: {}}}\n", "", 7_000),
		"List, nothing":          fill(list, "- {}\n", ""),
		"List, aliases":          list + "- " + longItem + "\n" + strings.Repeat("- *i\n", 50_000),
		"List, in lists":         fill("", "{apiVersion: v1, kind: List, items: [", ""),
		"List, in 30 lists":      strings.Repeat("{apiVersion: v1, kind: List, items: [", 30) + strings.Repeat("{a: b},", 20_000) + strings.Repeat("]}", 30),
		"List, of everything":    "a: &a {apiVersion: v1, kind: List, items: [{kind: X, b: " + strings.Repeat("x", 500_000) + "}]}\napiVersion: v1\nkind: List\nitems: [*a, *a, *a, *a]",
		"cilium, rules":          cnp + " endpointSelector: {}\n ingress: [" + strings.Repeat("{},", 30_000) + "]",
		"cilium, endpoints":      cnp + " endpointSelector: {}\n ingress: [{fromEndpoints: [" + strings.Repeat("{},", 30_000) + "]}]",
		"cilium, ports":          cnp + " endpointSelector: {}\n ingress: [" + strings.Repeat("{toPorts: [{ports: [{port: '80'}]}]},", 9_000) + "]",
		"cilium, patterns":       cnp + " endpointSelector: {}\n ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [" + strings.Repeat("{path: '((((a{1,1000}){1,1000}){1,1000}b|c)*d)*'},", 9_000) + "]}}]}]",
		"cilium, one pattern":    fill(cnp+" endpointSelector: {}\n ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{path: '", "(a|b)", "'}]}}]}]"),
		"cilium, 64 KiB pattern": cnp + " endpointSelector: {}\n ingress: [{toPorts: [{ports: [{port: '80', protocol: TCP}], rules: {http: [{path: '" + strings.Repeat("[a-z]", 13_000) + "'}]}}]}]",
		"cilium, blocks":         "apiVersion: cilium.io/v2\nkind: CiliumCIDRGroup\nmetadata: {name: g}\nspec: {externalCIDRs: [" + strings.Repeat("10.0.0.0/8,", 92_000) + "]}",
		"tree, labels":           `{"rules": [{"coverage": [` + strings.Repeat(`"a",`, 99_000) + `"a"], "allow": []}]}`,
		"tree, rules":            `{"rules": [` + strings.Repeat(`{"coverage":["a"],"allow":["b"]},`, 18_000) + `{"allow": []}]}`,
		"tree, depth":            fill("", `{"children": {"a": `, ""),
		"tree, wide":             fillN(`{"children": {`, `"c%d": {"rules": []},`, `"z": {}}}`, 25_000),
		"tree, ports":            `{"rules": [{"l4": [{"in-ports": [` + strings.Repeat(`{"port":80},`, 49_000) + `{"port": 80}]}]}]}`,
		"tree, expressions":      l7 + strings.Repeat(`{"expr": "Path(\"/\")"},`, 30_000) + `{"expr": "Path(\"/\")"}]}]}]}]}`,
		"tree, one expression":   l7 + `{"expr": "` + strings.Repeat("!", 900_000) + `"}]}]}]}]}`,
		"tree, deep expressions": l7 + strings.Repeat(`{"expr": "`+strings.Repeat("(", 4_000)+`"},`, 200) + `{"expr": "!"}]}]}]}]}`,
	}
}

// Parsing any file costs little memory, whatever is in it.
func TestPeakMemory(t *testing.T) {
	files := hostile()
	if testing.Short() {
		heavy := []string{"ports", "List", "tree, labels", "cilium, blocks", "cilium, patterns"}
		maps.DeleteFunc(files, func(name, _ string) bool { return !slices.Contains(heavy, name) })
	}
	for name, text := range files {
		if len(text) > dialect.MaxFile {
			t.Errorf("%s: %d bytes are refused before they are read", name, len(text))
		}
	}
	peak.Each(t, maxPeak, files, func(t *testing.T, data []byte) {
		if _, err := dialect.ParseFile("f", data, append(cilium.Dialects(), k8s.Dialect, tree.Dialect)...); err != nil && len(err.Error()) > 4<<20 {
			t.Errorf("%d bytes of problems", len(err.Error()))
		}
	})
}
