package tree_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/tree"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

func parse(doc string) (*authz.Policy, error) {
	r, err := dialect.ParseFile("f", []byte(doc), tree.Dialect)
	if err != nil {
		return nil, err
	}
	return r.Policies[0], nil
}

func example(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("../../../docs/examples", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// world judges between some workloads and what is none.
type world struct {
	*authz.Repository
	who map[string]identity.Identity
}

func labelled(namespace string, labels ...string) identity.Identity {
	m := map[string]string{}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		m[k] = v
	}
	return identity.New("td", namespace, "default", m)
}

func newWorld(t *testing.T, who map[string]identity.Identity, docs ...string) world {
	t.Helper()
	w := world{authz.NewRepository(authz.Options{TrustDomain: "td"}), who}
	for _, name := range []string{"host", "world", "remote-node"} {
		w.who[name] = identity.Identity{Reserved: name}
	}
	for _, doc := range docs {
		p, err := parse(doc)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Put(p); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// verdict is that of both sides: X, 7 or a dot.
func (w world) verdict(from, to string, proto uint8, port uint16) byte {
	const number = identity.Numeric(1 << 20)
	out := byte('.')
	for _, side := range []struct {
		subject, peer string
		dir           abi.Direction
	}{{to, from, abi.DirIngress}, {from, to, abi.DirEgress}} {
		subject := w.who[side.subject]
		if subject.Reserved != "" {
			continue // not a subject of these policies
		}
		set := w.Compile(subject, func(yield func(identity.Numeric, authz.Peer) bool) {
			yield(number, authz.Peer{Identity: w.who[side.peer]})
		})
		switch d := set.Judge(side.dir, number, proto, port); {
		case d.Verdict != abi.VerdictPass:
			return 'X'
		case d.L7:
			out = '7'
		}
	}
	return out
}

type flow struct {
	from, to string
	proto    uint8
	port     uint16
	want     byte
}

func (w world) check(t *testing.T, name string, flows []flow) {
	t.Helper()
	for _, f := range flows {
		if got := w.verdict(f.from, f.to, f.proto, f.port); got != f.want {
			t.Errorf("%s: %s -> %s, %d/%d: %q, want %q", name, f.from, f.to, f.proto, f.port, got, f.want)
		}
	}
}

const (
	tcp, udp = authz.ProtoTCP, authz.ProtoUDP
	icmp     = authz.ProtoICMP
	ping     = 8 << 8
)

// The three files of the story say of everybody what they said in 2017.
func TestExamples(t *testing.T) {
	who := func() map[string]identity.Identity {
		return map[string]identity.Identity{
			"deathstar": labelled("empire", "id.empire.deathstar"), "ship": labelled("default", "id.spaceship"),
			"xwing": labelled("alliance", "id.spaceship=red-five"), "stranger": labelled("empire", "id.asteroid"), "plain": labelled("default"),
		}
	}
	common := []flow{
		{"ship", "deathstar", icmp, ping, '.'}, {"xwing", "deathstar", icmp, ping, '.'},
		{"ship", "deathstar", tcp, 443, 'X'}, {"ship", "deathstar", udp, 80, 'X'}, {"xwing", "deathstar", tcp, 8080, 'X'},
		{"stranger", "deathstar", tcp, 80, 'X'}, {"stranger", "deathstar", icmp, ping, 'X'}, {"plain", "deathstar", tcp, 80, 'X'},
		{"world", "deathstar", tcp, 80, 'X'}, {"remote-node", "deathstar", tcp, 80, 'X'}, {"deathstar", "deathstar", tcp, 80, 'X'},
		{"stranger", "plain", tcp, 443, '.'}, {"stranger", "ship", tcp, 443, '.'}, {"host", "ship", tcp, 22, '.'}, {"ship", "xwing", icmp, ping, '.'},
		{"deathstar", "world", tcp, 443, '.'}, {"stranger", "world", tcp, 443, '.'},
	}
	l4 := []flow{
		{"ship", "deathstar", tcp, 80, '.'}, {"xwing", "deathstar", tcp, 80, '.'},
		{"host", "deathstar", tcp, 80, 'X'}, {"host", "deathstar", icmp, ping, 'X'},
		{"ship", "world", tcp, 443, '.'}, {"ship", "xwing", tcp, 443, '.'}, {"ship", "stranger", udp, 53, '.'},
	}
	http := []flow{
		{"ship", "deathstar", tcp, 80, '7'}, {"xwing", "deathstar", tcp, 80, '7'},
		{"host", "deathstar", tcp, 80, '.'}, {"host", "deathstar", tcp, 443, '.'}, {"host", "deathstar", icmp, ping, '.'},
		{"ship", "world", tcp, 443, 'X'}, {"ship", "world", tcp, 80, '7'}, {"ship", "xwing", tcp, 443, 'X'}, {"ship", "stranger", udp, 53, 'X'}, {"ship", "world", icmp, ping, '.'},
	}
	for name, flows := range map[string][]flow{"policy-tree-2017-l4.json": l4, "policy-tree-2017-http.json": http, "policy-tree-2017-jedi.json": http} {
		newWorld(t, who(), example(t, name)).check(t, name, append(common, flows...))
		p, err := parse(example(t, name))
		if err != nil || p.Ref != (authz.Ref{Kind: "PolicyTree", Name: "root"}) || p.Source != example(t, name) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
		if p.Enforceable() != nil {
			t.Errorf("%s: %v", name, p.Enforceable())
		}
		if later := p.NeedsProxy; len(later) > 0 != strings.Contains(p.Source, "l7-parser") {
			t.Errorf("%s: %v", name, later)
		} else if len(later) > 0 && (later[0].Path != "rules[1].l4[0].out-ports[0].l7-parser" || later[0].Line != 7) {
			t.Errorf("%s: %+v", name, later)
		}
	}
}

// What each word means, in both spellings.
func TestMeaning(t *testing.T) {
	who := func() map[string]identity.Identity {
		return map[string]identity.Identity{
			"a": labelled("x", "app=a", "env=prod"), "b": labelled("y", "app=b", "env=prod"), "c": labelled("x", "app=c", "env=qa"), "none": labelled("y"),
			"db": labelled("x", "id.db"), "web": labelled("x", "id.web"), "old-web": labelled("x", "id.web.old"),
		}
	}
	rules := func(s string) string { return `{"name": "root", "rules": [` + s + `]}` }
	for doc, flows := range map[string][]flow{
		rules(`{"coverage": ["app=a"], "allow": ["app=b"]}`): {{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}, {"c", "b", tcp, 1, '.'}, {"a", "c", tcp, 1, '.'}, {"world", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["k8s:app=a", "env"], "allow": [{"label": {"source": "k8s", "key": "app", "value": "b"}, "action": "accept"}]}`): {
			{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app", "env=qa"], "allow": [{"matchLabels": ["app", "env=prod"]}]}`): {{"b", "c", tcp, 1, '.'}, {"none", "c", tcp, 1, 'X'}, {"none", "a", tcp, 1, '.'}},
		rules(`{"coverage": ["app=a"], "allow": ["reserved:world", "reserved:host"]}`):            {{"world", "a", tcp, 1, '.'}, {"host", "a", tcp, 1, '.'}, {"b", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app=a"], "allow": ["reserved:all", "!app=b"]}`):                     {{"world", "a", tcp, 1, '.'}, {"none", "a", tcp, 1, '.'}, {"b", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app=a"], "allow": [{"action": "deny", "label": "app=b"}, "app"]}`):  {{"c", "a", tcp, 1, '.'}, {"none", "a", tcp, 1, 'X'}, {"b", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["reserved:all"], "allow": [{"key": "app", "value": "b"}]}`):          {{"b", "none", tcp, 1, '.'}, {"a", "none", tcp, 1, 'X'}},
		rules(`{"allow": ["app"]}`):                                                                              {{"b", "none", tcp, 1, '.'}, {"none", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app=a"], "allow": []}`):                                                            {{"b", "a", tcp, 1, 'X'}, {"a", "b", tcp, 1, '.'}},
		rules(`{"coverage": ["app=a"], "always-allow": ["app=b"]}`):                                              {{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app=a"], "allow": [{"action": "always-accept", "label": "app=b"}]}`):               {{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["io.kubernetes.pod.namespace=x"], "allow": ["k8s:io.kubernetes.pod.namespace=y"]}`): {{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}, {"c", "b", tcp, 1, '.'}},
		rules(`{"coverage": ["env=prod"], "requires": ["env=prod"]}, {"coverage": ["app=a"], "allow": ["reserved:all"]}`): {
			{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}, {"none", "a", tcp, 1, 'X'}, {"world", "a", tcp, 1, 'X'}, {"a", "b", tcp, 1, 'X'}, {"a", "c", tcp, 1, '.'}},
		rules(`{"coverage": ["app=a"], "requires": ["env", "app=b"]}, {"coverage": ["app=a"], "allow": ["app"]}`):           {{"b", "a", tcp, 1, '.'}, {"c", "a", tcp, 1, 'X'}},
		rules(`{"coverage": ["app=a"], "requires": ["reserved:host"]}, {"coverage": ["app=a"], "allow": ["reserved:all"]}`): {{"host", "a", tcp, 1, '.'}, {"b", "a", tcp, 1, 'X'}, {"world", "a", tcp, 1, 'X'}},
		// Limits are a union, of those that cover, and allow nothing.
		rules(`{"coverage": ["app=a"], "l4": [{"in-ports": [{"port": 80}, {"port": 53, "protocol": "UDP"}], "out-ports": [{"port": 1, "protocol": "any"}]}]}, {"coverage": ["env"], "l4": [{"in-ports": [{"port": 81, "protocol": "tcp"}]}]}`): {
			{"world", "a", tcp, 80, '.'}, {"world", "a", udp, 80, '.'}, {"world", "a", tcp, 81, '.'}, {"world", "a", udp, 81, 'X'}, {"none", "a", udp, 53, '.'}, {"none", "a", tcp, 53, 'X'},
			{"none", "a", icmp, ping, '.'}, {"none", "a", authz.ProtoSCTP, 9, '.'}, {"a", "none", tcp, 1, '.'}, {"a", "none", tcp, 80, 'X'}, {"a", "b", tcp, 81, 'X'}, {"b", "c", tcp, 80, 'X'}, {"b", "c", tcp, 81, '.'}},
		rules(`{"coverage": ["app=a"], "allow": ["app=b"]}, {"coverage": ["app=a"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp", "l7-parser": "http"}, {"port": 81, "protocol": "tcp", "l7-parser": "", "l7-rules": []}]}]}`): {
			{"b", "a", tcp, 80, '7'}, {"c", "a", tcp, 80, 'X'}, {"b", "a", tcp, 81, '.'}, {"b", "a", tcp, 82, 'X'}, {"b", "a", icmp, ping, '.'}, {"c", "a", icmp, ping, 'X'}},
		// In a child labels are below its path.
		`{"name": "root", "children": {"id": {"name": "id", "rules": [{"coverage": ["db"], "allow": ["web", "root.app=a", "../env=qa"]}], "children": {"web": {"rules": [{"coverage": ["old"], "allow": ["../db"]}]}}}}}`: {
			{"web", "db", tcp, 1, '.'}, {"a", "db", tcp, 1, '.'}, {"c", "db", tcp, 1, '.'}, {"b", "db", tcp, 1, 'X'}, {"old-web", "db", tcp, 1, 'X'},
			{"db", "old-web", tcp, 1, '.'}, {"web", "old-web", tcp, 1, 'X'}, {"b", "web", tcp, 1, '.'}},
		`{"name": "id", "rules": [{"coverage": ["db"], "allow": ["web"]}]}`:             {{"web", "db", tcp, 1, '.'}, {"a", "db", tcp, 1, 'X'}},
		`{"name": "root.id.web", "rules": [{"coverage": ["old"], "allow": ["../db"]}]}`: {{"db", "old-web", tcp, 1, '.'}, {"a", "old-web", tcp, 1, 'X'}},
		`{"rules": [{"coverage": ["root.id.db"], "allow": ["id.web"]}]}`:                {{"web", "db", tcp, 1, '.'}, {"a", "db", tcp, 1, 'X'}},
	} {
		newWorld(t, who(), doc).check(t, doc, flows)
	}
}

// A tree stands beside other documents, and its name is its path.
func TestNames(t *testing.T) {
	const rules = `"rules": [{"coverage": ["a"], "allow": ["b"]}]}`
	for name, want := range map[string]string{`"name": "root", `: "root", ``: "root", `"name": "id", `: "root.id", `"name": "root.id.x", `: "root.id.x"} {
		p, err := parse("{" + name + rules)
		if err != nil || p.Ref != (authz.Ref{Kind: tree.Kind, Name: want}) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
	r, err := dialect.ParseFile("f", []byte("{"+rules+"\n---\n{\"name\": \"id\", "+rules), tree.Dialect)
	if err != nil || len(r.Policies) != 2 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := dialect.ParseFile("f", []byte("{"+rules+"\n---\n{\"name\": \"root\", "+rules), tree.Dialect); err == nil {
		t.Error("two trees of one name are taken")
	}
}

// What is not obeyed is refused where it stands.
func TestRefused(t *testing.T) {
	one := func(rule string) string { return `{"name": "root", "rules": [` + rule + `]}` }
	port := func(s string) string {
		return one(`{"coverage": ["a"], "l4": [{"in-ports": [` + s + `]}]}`)
	}
	expr := func(s string) string {
		return port(fmt.Sprintf(`{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [{"expr": %q}]}`, s))
	}
	const at = "rules[0].l4[0].in-ports[0]"
	for doc, want := range map[string]string{
		`{"rules": {}}`:                      "rules",
		`{"rules": [1]}`:                     "rules[0]",
		`{"rules": [], "Rules": []}`:         "Rules",
		`{"name": "io.cilium", "rules": []}`: "name", `{"name": "", "rules": []}`: "name", `{"name": "root.", "rules": []}`: "name", `{"name": 1, "rules": []}`: "name",
		`{"name": "` + strings.Repeat("a", 64) + `", "rules": []}`: "name",
		`{"children": []}`: "children", `{"children": {"a.b": {}}}`: `children["a.b"]`, `{"children": {"a": 1}}`: "children.a", `{"children": {"a": {"name": "b"}}}`: "children.a.name",
		one(`{}`): "rules[0]", one(`{"coverage": ["a"]}`): "rules[0]", one(`{"coverage": ["a"], "allow": ["b"], "l4": [{"in-ports": [{"port": 1}]}]}`): "rules[0]",
		one(`{"coverage": ["a"], "drop-privileges": []}`): "rules[0].drop-privileges, rules[0]",
		one(`{"requires": ["a"]}`):                        "rules[0]",
		one(`{"coverage": "a", "allow": []}`):             "rules[0].coverage", one(`{"coverage": ["a"], "allow": "b"}`): "rules[0].allow",
		one(`{"coverage": ["reserved:world"], "allow": []}`): "rules[0].coverage[0]", one(`{"coverage": ["!a"], "allow": []}`): "rules[0].coverage[0]",
		one(`{"coverage": ["$world", "reserved:nobody", "reserved:host=x", "", "a b", "a=b c", "mesos:a", {"keys": "a"}, 1, "../a", "io.cilium.x", {"key": "a", "value": 1}], "allow": []}`): "rules[0].coverage[0], rules[0].coverage[1], rules[0].coverage[2], rules[0].coverage[3], " +
			"rules[0].coverage[4], rules[0].coverage[5], rules[0].coverage[6], rules[0].coverage[7].keys, rules[0].coverage[7], rules[0].coverage[8], rules[0].coverage[9], rules[0].coverage[10], rules[0].coverage[11].value",
		one(`{"coverage": ["a"], "allow": [{}, {"action": "accept"}, {"label": "a", "matchLabels": ["b"]}, {"matchLabels": []}, {"label": "a", "action": "undecided"}, {"label": "!a"}, {"matchSelector": {}}, {"matchLabels": ["a", "reserved:host"]}, "io.kubernetes.pod.namespace=A"]}`): "rules[0].allow[0], rules[0].allow[1], " +
			"rules[0].allow[2], rules[0].allow[3].matchLabels, rules[0].allow[4].action, rules[0].allow[5].label, rules[0].allow[6].matchSelector, rules[0].allow[6], rules[0].allow[7], rules[0].allow[8]",
		one(`{"coverage": ["a"], "requires": []}`): "rules[0].requires", one(`{"coverage": ["a"], "requires": ["reserved:all"]}`): "rules[0].requires[0]",
		one(`{"coverage": ["a"], "always-allow": ["b"]}, {"coverage": ["a"], "requires": ["c"]}`):                        "rules[0].always-allow",
		one(`{"coverage": ["a"], "allow": ["!b", {"action": "always-accept", "label": "c"}]}`):                           "rules[0].allow[1].action",
		`{"children": {"id": {"rules": [{"allow": ["a"]}]}}}`:                                                            "children.id.rules[0]",
		`{"children": {"id": {"rules": [{"coverage": ["root.a", "../id2", "../id", "reserved:all"], "allow": ["a"]}]}}}`: "children.id.rules[0].coverage[0], children.id.rules[0].coverage[1]",
		one(`{"coverage": ["a"], "l4": []}`):                                                                             "rules[0].l4", one(`{"coverage": ["a"], "l4": {}}`): "rules[0].l4", one(`{"coverage": ["a"], "l4": [{}]}`): "rules[0].l4[0]",
		one(`{"coverage": ["a"], "l4": [{"in-ports": []}]}`): "rules[0].l4[0].in-ports", one(`{"coverage": ["a"], "l4": [{"ports": []}]}`): "rules[0].l4[0].ports",
		port(`{}`): at, port(`{"port": 0}`): at + ".port", port(`{"port": 65536}`): at + ".port", port(`{"port": "80"}`): at + ".port", port(`80`): at,
		port(`{"port": 80, "protocol": "icmp"}`): at + ".protocol", port(`{"port": 80, "protocol": 6}`): at + ".protocol",
		port(`{"port": 80, "redirect": "http", "rules": []}`):                                                        at + ".redirect, " + at + ".rules",
		port(`{"port": 80, "l7-parser": "kafka"}`):                                                                   at + ".l7-parser, " + at,
		port(`{"port": 80, "protocol": "any", "l7-parser": "http"}`):                                                 at,
		port(`{"port": 80, "protocol": "tcp", "l7-rules": [{"expr": "Method(\"GET\")"}]}`):                           at + ".l7-rules",
		port(`{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [{}, {"expr": 1}, {"exp": "x"}, 1]}`): at + ".l7-rules[0], " + at + ".l7-rules[1].expr, " + at + ".l7-rules[2].exp, " + at + ".l7-rules[2], " + at + ".l7-rules[3]",
		expr(`Method("GET"`): at + ".l7-rules[0].expr",
	} {
		_, err := parse(doc)
		var problems authz.Problems
		if !errors.As(err, &problems) {
			t.Errorf("%s is taken", doc)
			continue
		}
		var paths []string
		for _, p := range problems {
			paths = append(paths, p.Path)
			if p.Message == "" {
				t.Errorf("%s: %+v", doc, p)
			}
		}
		if got := strings.Join(paths, ", "); got != want {
			t.Errorf("%s\n got %s\nwant %s", doc, got, want)
		}
	}
}

// Who is denied by a label that nobody can be seen to bear is not enforced.
func TestNotEnforced(t *testing.T) {
	p, err := parse(`{"rules": [{"coverage": ["a"], "allow": ["!reserved:health", "!reserved:host"]}]}`)
	if err != nil || len(p.NotEnforced) != 1 || p.NotEnforced[0].Path != "rules[0].allow[0]" {
		t.Errorf("%+v, %v", p, err)
	}
}

func TestExpressions(t *testing.T) {
	for s, wrong := range map[string]string{
		`Method("GET")`: "", `Method("GET") && Path("/v1/")`: "", ` Method( "GET" )&&Path("/v1/<name>") `: "", "Path(`/a`)": "",
		`Method("PUT") && Header("X-Has-Force", "true") && Path("/v1/exhaust-port")`:                                   "",
		`PathRegexp("/v[0-9]+/.*") || HostRegexp(".*\\.example") || !MethodRegexp("POST|PUT")`:                         "",
		`!(Host("<sub>.localhost") || (!Header("Content-Type", "application/<subtype>"))) && HeaderRegexp("A", "b.*")`: "",
		"": "character 1: want Method", "Method": "character 7: want (", `Method(GET)`: "character 8: want a string", `Method("GET"`: "want ) behind", `Method("GET", "PUT")`: "takes 1",
		`Header("A")`: "takes 2 strings", `Method('G')`: "character 8: want a string", `Path("v1")`: "begins with /", `Method("A B")`: "want a method", `Method("")`: "want a method",
		`Header("a b", "c")`: "name of a header", `Host("")`: "name of a host", `Host("a/b")`: "name of a host", `Path("/\n")`: "control character", `PathRegexp("(")`: "not a regular expression",
		`Method("GET") Path("/")`: "character 15: want &&", `Method("GET") && `: "want Method", `&& Method("GET")`: "character 1: want Method", `(Method("GET")`: "want )", `Method("GET"))`: "character 14: want &&",
		`Cookie("a")`: "character 1: want Method", `method("GET")`: "character 1: want Method", `Method("GET") & Path("/")`: "want &&", `Path("/` + strings.Repeat("a", 4096) + `")`: "at most 4096",
		strings.Repeat("(", 65) + `Method("A")` + strings.Repeat(")", 65): "nested more than 64", strings.Repeat("!", 4000) + `Method("A")`: "nested more than 64",
		strings.Repeat("!", 64) + `Method("A")`: "", `Method("\x`: "want a string",
	} {
		_, err := parse(fmt.Sprintf(`{"rules": [{"coverage": ["a"], "l4": [{"in-ports": [{"port": 80, "protocol": "tcp", "l7-parser": "http", "l7-rules": [{"expr": %q}]}]}]}]}`, s))
		if (err == nil) != (wrong == "") || err != nil && !strings.Contains(err.Error(), wrong) {
			t.Errorf("%.100s: %v, want %q", s, err, wrong)
		}
	}
}
