package install

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"text/template"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

const (
	storeSettings = "/api/v1/namespaces/net/configmaps/portcullis-agent"
	storeIssuer   = "/apis/apps/v1/namespaces/net/deployments/portcullis-issuer"
)

// tryInstall installs with layers, and returns what it said and wrote.
func tryInstall(t *testing.T, s *store, c *Cluster, layers ...Layer) (said string, wrote []string, err error) {
	t.Helper()
	v, err := Merge(layers...)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	say := func(format string, args ...any) {
		b.WriteString(strings.TrimSpace(fmt.Sprintf(format, args...)) + "\n")
	}
	s.written()
	err = c.Install(t.Context(), Options{Release: Release{Namespace: "net", Values: v}, Say: say})
	return b.String(), s.written(), err
}

func setting(text string) func(*store) {
	return func(s *store) {
		if err := unstructured.SetNestedField(s.objects[storeSettings].Object, text, "data", "agent.yaml"); err != nil {
			s.t.Fatal(err)
		}
	}
}

// What an installation is known by to nodes and peers is not changed in silence,
// whoever has edited it; everything else is.
func TestInstallKeepsWhatItIsKnownBy(t *testing.T) {
	const mine = "trustDomain: mine.example\ncni: {binDir: /a/bin, confDir: /a/conf}"
	spire := mine + "\nissuer: {enabled: false}\nspire: {socketPath: /run/spire/a.sock}"
	for name, tt := range map[string]struct {
		first, then string
		between     func(*store)
		want        []string // in the refusal; none: it is done
	}{
		"the same":             {first: mine, then: mine},
		"the same, written so": {first: mine, then: "trustDomain: mine.example\ncni: {binDir: /a//bin/, confDir: /a/conf/}"},
		"other settings":       {first: mine, then: mine + "\nconfig: {ttl: 31s}\nimage: {tag: v2}"},
		"to SPIRE":             {first: mine, then: spire},
		"from SPIRE":           {first: spire, then: mine},
		"forgotten": {first: mine, then: "{}", want: []string{`trustDomain: is "mine.example" by ConfigMap portcullis-agent, would become "cluster.local": `,
			`cni.binDir: is "/a/bin" by DaemonSet portcullis-agent, would become "/opt/cni/bin": `, `cni.confDir: is "/a/conf"`, "the defaults again", "portcullis uninstall --namespace net", "--set cni.move=true"}},
		"domain":        {first: mine, then: strings.Replace(mine, "mine", "other", 1), want: []string{`would become "other.example"`, "no longer verified"}},
		"domain, SPIRE": {first: spire, then: strings.Replace(spire, "mine", "other", 1), want: []string{`is "mine.example"`}},
		"directory":     {first: mine, then: strings.Replace(mine, "/a/bin", "/b/bin", 1), want: []string{`cni.binDir: is "/a/bin"`, "no uninstall finds it"}},
		"no agents yet": {first: mine, then: "{}", between: func(s *store) { delete(s.objects, storeAgents) }, want: []string{`trustDomain: is "mine.example"`}},
		"edited to it":  {first: mine, then: strings.Replace(mine, "mine", "other", 1), between: setting("trust-domain: other.example\n"), want: []string{`is "mine.example" by Deployment portcullis-issuer`}},
		"edited away":   {first: mine, then: mine, between: setting("trust-domain: other.example\n"), want: []string{`is "other.example" by ConfigMap portcullis-agent`}},
		"a sidecar": {first: mine, then: mine, between: func(s *store) {
			at := []string{"spec", "template", "spec", "containers"}
			list, _, _ := unstructured.NestedSlice(s.objects[storeIssuer].Object, at...)
			list = append(list, map[string]any{"name": "mesh", "args": []any{"--trust-domain=mesh.example"}})
			if err := unstructured.SetNestedSlice(s.objects[storeIssuer].Object, list, at...); err != nil {
				s.t.Fatal(err)
			}
		}},
		"edited arguments": {first: mine, then: strings.Replace(mine, "/a/bin", "/b/bin", 1), between: func(s *store) {
			at := []string{"spec", "template", "spec", "containers"}
			list, _, _ := unstructured.NestedSlice(s.objects[storeAgents].Object, at...)
			list[0].(map[string]any)["args"] = []any{"agent", "--kubernetes", "--cni-bin-dir", "/a/bin", "--cni-conf-dir", "/a/conf"}
			if err := unstructured.SetNestedSlice(s.objects[storeAgents].Object, list, at...); err != nil {
				s.t.Fatal(err)
			}
		}, want: []string{`cni.binDir: is "/a/bin"`}},
		"no YAML":          {first: mine, then: mine, between: setting("trust-domain: [\n"), want: []string{"nothing was changed", "is no YAML", "kubectl -n net edit configmap portcullis-agent"}},
		"no trust domain":  {first: mine, then: mine, between: setting("ttl: 30s\n"), want: []string{"has no trust-domain"}},
		"a number":         {first: mine, then: mine, between: setting("trust-domain: 7\n"), want: []string{"has no trust-domain"}},
		"no agent.yaml":    {first: mine, then: mine, between: func(s *store) { delete(s.objects[storeSettings].Object, "data") }, want: []string{"has no agent.yaml"}},
		"settings removed": {first: mine, then: mine, between: func(s *store) { delete(s.objects, storeSettings) }},
		"removed, another": {first: mine, then: "cni: {binDir: /a/bin, confDir: /a/conf}", between: func(s *store) { delete(s.objects, storeSettings) }, want: []string{`is "mine.example" by Deployment portcullis-issuer`}},
		"removed, SPIRE":   {first: spire, then: spire, between: func(s *store) { delete(s.objects, storeSettings) }, want: []string{"cannot be told, for ConfigMap portcullis-agent is gone", "kubectl -n net create configmap portcullis-agent"}},
		"somebody else's agents": {first: mine, then: mine, between: func(s *store) {
			unstructured.RemoveNestedField(s.objects[storeAgents].Object, "spec", "template", "spec", "containers")
		}, want: []string{"has no container agent"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newStore(t)
			s.after = lives
			installed(t, c, layer(t, tt.first))
			if tt.between != nil {
				tt.between(s)
			}
			said, wrote, err := tryInstall(t, s, c, layer(t, tt.then))
			if len(tt.want) == 0 {
				if err != nil || strings.Contains(said, "left on the nodes") {
					t.Errorf("%v: %s", err, said)
				}
				return
			}
			if err == nil || len(wrote) != 0 || !strings.HasPrefix(err.Error(), "nothing was changed") {
				t.Fatalf("%v, and wrote %q", err, wrote)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in: %v", want, err)
				}
			}
			if strings.Count(err.Error(), "trustDomain: is") > 1 {
				t.Errorf("says the same twice: %v", err)
			}
		})
	}
}

// Nodes' runtimes can look elsewhere some day: that is done when it is asked for,
// and what stays is named. The trust domain cannot be had so.
func TestInstallMovesTheCNI(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	installed(t, c)
	said, wrote, err := tryInstall(t, s, c, layer(t, "trustDomain: other.example\ncni: {binDir: /new/bin, move: true}"))
	if err == nil || len(wrote) != 0 || strings.Contains(err.Error(), "cni.binDir") || strings.Contains(err.Error(), "cni.move") {
		t.Errorf("with another trust domain: %v, wrote %q, said %s", err, wrote, said)
	}
	said, wrote, err = tryInstall(t, s, c, layer(t, "cni: {binDir: /new/bin, confDir: /new/conf, move: true}"))
	if err != nil || !slices.Contains(wrote, "+daemonsets/portcullis-agent") {
		t.Fatalf("%v, wrote %q", err, wrote)
	}
	for _, want := range []string{"portcullis-cni in /opt/cni/bin:", "the plugin's entry in the network configurations in /etc/cni/net.d:"} {
		if !strings.Contains(said, want) {
			t.Errorf("does not say %q: %s", want, said)
		}
	}
	if said, wrote, err = tryInstall(t, s, c, layer(t, "cni: {binDir: /new/bin, confDir: /new/conf}")); err != nil || len(wrote) != 0 || strings.Contains(said, "left") {
		t.Errorf("the second time: %v, wrote %q, said %s", err, wrote, said)
	}
}

// An API server that does not tell what is there gets no other settings.
func TestInstallAsksWhatIsThere(t *testing.T) {
	for _, path := range []string{storeSettings, storeIssuer} {
		s, c := newStore(t)
		s.after = lives
		installed(t, c)
		s.forbidden = path
		if _, wrote, err := tryInstall(t, s, c); err == nil || len(wrote) != 0 || !strings.Contains(err.Error(), "may not read") {
			t.Errorf("%s: %v, wrote %q", path, err, wrote)
		}
	}
}

// The chart compares, too, where Helm asks the cluster; it is silent where nothing
// is there, and where nobody is asked.
func TestChartKeepsWhatItIsKnownBy(t *testing.T) {
	const mine = "trustDomain: mine.example\ncni: {binDir: /a/bin, confDir: /a/conf}"
	there := map[string]map[string]any{}
	for _, o := range render(t, "net", layer(t, mine)) {
		there[o.GetAPIVersion()+" "+o.GetKind()+" "+o.GetNamespace()+"/"+o.GetName()] = o.Object
	}
	config := "v1 ConfigMap net/portcullis-agent"
	for name, tt := range map[string]struct{ then, settings, want string }{
		"the same":    {then: mine},
		"written so":  {then: "trustDomain: mine.example\ncni: {binDir: /a//bin/, confDir: /a/conf/}"},
		"domain":      {then: strings.Replace(mine, "mine", "other", 1), want: `trustDomain: is "mine.example" by ConfigMap portcullis-agent, would become "other.example"`},
		"edited":      {then: strings.Replace(mine, "mine", "other", 1), settings: "trust-domain: other.example\n", want: "trustDomain: Deployment portcullis-issuer has --trust-domain=mine.example,"},
		"bin":         {then: strings.Replace(mine, "/a/bin", "/b/bin", 1), want: "DaemonSet portcullis-agent has --cni-bin-dir=/a/bin,"},
		"conf":        {then: strings.Replace(mine, "/a/conf", "/b/conf", 1), want: "DaemonSet portcullis-agent has --cni-conf-dir=/a/conf,"},
		"moved":       {then: "trustDomain: mine.example\ncni: {binDir: /b/bin, confDir: /b/conf, move: true}"},
		"moved, too":  {then: "cni: {binDir: /b/bin, confDir: /b/conf, move: true}", want: "trustDomain: is"},
		"no YAML":     {then: mine, settings: "trust-domain: [\n", want: `trustDomain: is ""`},
		"no domain":   {then: mine, settings: "ttl: 30s\n", want: `trustDomain: is ""`},
		"no settings": {then: mine, settings: "-", want: `trustDomain: is ""`},
	} {
		v, err := Merge(layer(t, tt.then))
		if err != nil {
			t.Fatal(err)
		}
		chart, data, err := Release{Namespace: "net", Values: v}.templates()
		if err != nil {
			t.Fatal(err)
		}
		chart.Funcs(template.FuncMap{"lookup": func(version, kind, namespace, name string) map[string]any {
			key := version + " " + kind + " " + namespace + "/" + name
			if key != config || tt.settings == "" {
				return there[key]
			}
			o := map[string]any{"kind": "ConfigMap"}
			if tt.settings != "-" {
				o["data"] = map[string]any{"agent.yaml": tt.settings}
			}
			return o
		}})
		_, err = execute(chart, "30-config.yaml", data)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasPrefix(strings.TrimPrefix(err.Error(), "cni.binDir and cni.confDir: "), tt.want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
