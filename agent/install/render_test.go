package install

import (
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"text/template/parse"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"portcullis/deploy/helm"
)

func render(t *testing.T, namespace string, layers ...Layer) []*unstructured.Unstructured {
	t.Helper()
	v, err := Merge(layers...)
	if err != nil {
		t.Fatal(err)
	}
	r := Release{Namespace: namespace, Values: v}
	files, err := r.Render()
	if err != nil {
		t.Fatal(err)
	}
	cleanup, err := r.RenderCleanup()
	if err != nil {
		t.Fatal(err)
	}
	objects, err := Objects(append(files, cleanup)...)
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

func find(t *testing.T, objects []*unstructured.Unstructured, kind, name string) *unstructured.Unstructured {
	t.Helper()
	i := slices.IndexFunc(objects, func(o *unstructured.Unstructured) bool { return o.GetKind() == kind && o.GetName() == name })
	if i < 0 {
		t.Fatalf("no %s %s", kind, name)
	}
	return objects[i]
}

// Every object is found again by its label, and lies where the release is.
func TestEveryObjectIsOurs(t *testing.T) {
	objects := render(t, "net", layer(t, "image: {pullSecrets: [{name: s}]}\nagent: {nodeSelector: {a: b}}\nissuer: {nodeSelector: {c: d}}\nmetrics: {enabled: true}\nhubble: {listen: {enabled: true}}\nrelay: {enabled: true}"))
	if len(objects) < 23 {
		t.Errorf("%d objects only", len(objects))
	}
	for _, o := range objects {
		if o.GetLabels()[partOf] != product {
			t.Errorf("%s %s has no label %s=%s", o.GetKind(), o.GetName(), partOf, product)
		}
		k, ok := kindOf(o)
		if !ok {
			t.Fatalf("%s is of no kind that is known", o.GetKind())
		}
		if want := map[bool]string{true: "net"}[k.namespaced]; o.GetNamespace() != want {
			t.Errorf("%s %s is in %q, want %q", o.GetKind(), o.GetName(), o.GetNamespace(), want)
		}
		if b, _ := o.MarshalJSON(); strings.Contains(string(b), `"namespace":"portcullis"`) || strings.Contains(string(b), ".portcullis.svc") {
			t.Errorf("%s names the usual namespace: %s", o.GetName(), b)
		}
	}
	config := find(t, objects, "ConfigMap", "portcullis-agent")
	text, _, _ := unstructured.NestedString(config.Object, "data", "agent.yaml")
	for _, want := range []string{"metrics-address: \":4262\"\n", "hubble-listen: \":4244\"\n", "issuer: https://portcullis-issuer.net.svc.cluster.local:4261\n", "ttl: 30s\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in %s", want, text)
		}
	}
	for _, name := range []string{"portcullis-agent", "portcullis-cleanup"} {
		spec, _, _ := unstructured.NestedMap(find(t, objects, "DaemonSet", name).Object, "spec", "template", "spec")
		if s := fmt.Sprint(spec["nodeSelector"], spec["imagePullSecrets"]); s != "map[a:b] [map[name:s]]" {
			t.Errorf("%s: %s", name, s)
		}
	}
}

func TestRenderWithSPIRE(t *testing.T) {
	objects := render(t, "portcullis", layer(t, "issuer: {enabled: false}\nspire: {socketPath: /run/spire/agent-sockets/a.sock}\nhubble: {listen: {enabled: true}}\nrelay: {enabled: true}"))
	for _, o := range objects {
		if strings.Contains(o.GetName(), "issuer") || o.GetName() == "portcullis-bundle" {
			t.Errorf("%s %s is there", o.GetKind(), o.GetName())
		}
		b, err := o.MarshalJSON()
		if err != nil || strings.Contains(string(b), "issuer") || strings.Contains(string(b), "bundle.json") {
			t.Errorf("%s speaks of the issuer: %s, %v", o.GetName(), b, err)
		}
	}
	b, _ := find(t, objects, "DaemonSet", "portcullis-agent").MarshalJSON()
	if !strings.Contains(string(b), `{"mountPath":"/run/spire/agent-sockets","name":"spire","readOnly":true}`) {
		t.Errorf("the socket is not mounted: %s", b)
	}
	if strings.Contains(string(b), "spire-admin") {
		t.Errorf("an admin socket that nobody named is mounted: %s", b)
	}
}

// Where pods' SVIDs come from the SPIRE agent, its admin socket is mounted from
// the node, and agents are told of it.
func TestRenderWithDelegatedIdentity(t *testing.T) {
	objects := render(t, "portcullis", layer(t, "issuer: {enabled: false}\nspire: {socketPath: /run/spire/agent-sockets/a.sock, adminSocketPath: /run/spire/admin/b.sock}"))
	b, _ := find(t, objects, "DaemonSet", "portcullis-agent").MarshalJSON()
	for _, want := range []string{
		`{"mountPath":"/run/spire/admin","name":"spire-admin","readOnly":true}`,
		`{"hostPath":{"path":"/run/spire/admin","type":"DirectoryOrCreate"},"name":"spire-admin"}`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %s in %s", want, b)
		}
	}
	settings, _, _ := unstructured.NestedString(find(t, objects, "ConfigMap", "portcullis-agent").Object, "data", "agent.yaml")
	if !strings.Contains(settings, "\ndelegated-socket: \"unix:///run/spire/admin/b.sock\"\n") {
		t.Errorf("settings: %s", settings)
	}
}

// Without anybody who gives SVIDs, or with two, there is no installation.
func TestRenderRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"issuer: {enabled: false}":            "nobody would give agents their SVIDs",
		"spire: {socketPath: /run/spire/a.s}": "set issuer.enabled=false",
		"relay: {enabled: true}":              "relay.enabled needs hubble.listen.enabled",
		"issuer: {enabled: false}\nspire: {socketPath: /run/spire/a.s, adminSocketPath: /run/spire/b.s}": "a directory of its own",
	} {
		v, err := Merge(layer(t, text))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (Release{Namespace: "portcullis", Values: v}).Render(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "template:") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// Settings restart agents; nothing else does.
func TestSettingsAreInTheTemplate(t *testing.T) {
	annotation := func(text string) string {
		a, _, _ := unstructured.NestedString(find(t, render(t, "portcullis", layer(t, text)), "DaemonSet", "portcullis-agent").Object,
			"spec", "template", "metadata", "annotations", "portcullis/settings")
		return a
	}
	if a, b := annotation("{}"), annotation("config: {ttl: 31s}"); a == b || a == "" {
		t.Errorf("%q, %q", a, b)
	}
	if a, b := annotation("{}"), annotation("issuer: {replicas: 1}"); a != b {
		t.Errorf("%q, %q", a, b)
	}
}

// TestTemplatesUseWhatIsThere: a template that Helm alone could render would
// break `portcullis install`, and no function is kept that none uses.
func TestTemplatesUseWhatIsThere(t *testing.T) {
	builtin := []string{"and", "or", "not", "eq", "ne", "index", "print"}
	here := functions(nil)
	used := map[string]bool{}
	names, err := fs.Glob(helm.Chart, chartDir+"/templates/*")
	if err != nil || len(names) < 6 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		b, err := fs.ReadFile(helm.Chart, name)
		if err != nil {
			t.Fatal(err)
		}
		tree := parse.New(name)
		tree.Mode = parse.SkipFuncCheck
		set := map[string]*parse.Tree{}
		if _, err := tree.Parse(string(b), "", "", set); err != nil {
			t.Fatal(err)
		}
		for _, tree := range set {
			identifiers(tree.Root, used)
		}
	}
	for name := range used {
		if _, ok := here[name]; !ok && !slices.Contains(builtin, name) {
			t.Errorf("%s is used, which agent/install does not have", name)
		}
	}
	for name := range here {
		if !used[name] {
			t.Errorf("%s is not used", name)
		}
	}
}

// identifiers gathers the functions that a template calls.
func identifiers(n parse.Node, used map[string]bool) {
	switch n := n.(type) {
	case *parse.ListNode:
		if n != nil {
			for _, c := range n.Nodes {
				identifiers(c, used)
			}
		}
	case *parse.ActionNode:
		identifiers(n.Pipe, used)
	case *parse.IfNode:
		identifiers(n.Pipe, used)
		identifiers(n.List, used)
		identifiers(n.ElseList, used)
	case *parse.RangeNode:
		identifiers(n.Pipe, used)
		identifiers(n.List, used)
		identifiers(n.ElseList, used)
	case *parse.WithNode:
		identifiers(n.Pipe, used)
		identifiers(n.List, used)
		identifiers(n.ElseList, used)
	case *parse.PipeNode:
		for _, c := range n.Cmds {
			for _, a := range c.Args {
				identifiers(a, used)
			}
		}
	case *parse.TemplateNode:
		used["template"] = true // Helm has it, too, but include is what is used here
	case *parse.IdentifierNode:
		used[n.Ident] = true
	}
}
