package install

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// store is an API server in little: it keeps objects by their paths, and
// nothing follows from them but what the test does. What a real one makes of all
// this is tried by test/e2e/install.
type store struct {
	t *testing.T

	mu      sync.Mutex
	objects map[string]*unstructured.Unstructured // guarded by mu; by path
	version int                                   // guarded by mu
	done    []string                              // guarded by mu; what was written, in order
	tried   []string                              // guarded by mu; what it was only asked about, in order
	refuse  map[string]string                     // why, by what; a try alone is refused; "": something is not found
	after   func(s *store, what string)           // called with mu held, after each write

	down      string // what no try has an answer for; set while nobody asks
	forbidden string // what nobody may read; set while nobody asks
}

func newStore(t *testing.T) (*store, *Cluster) {
	s := &store{t: t, objects: map[string]*unstructured.Unstructured{}, after: func(*store, string) {}}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return s, connectTo(t, server.URL)
}

// ServeHTTP implements http.Handler.
func (s *store) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	path := r.URL.Path
	o := s.objects[path]
	parts := strings.Split(path, "/")
	what := parts[len(parts)-2] + "/" + parts[len(parts)-1]
	switch {
	case path == s.forbidden:
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403,"message":"you may not read %s"}`, path)
		return
	case r.URL.Query().Has("dryRun"):
		s.tried = append(s.tried, what)
		if what == s.down {
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"InternalError","code":500,"message":"failed calling webhook"}`)
			return
		}
		why, refused := s.refuse[what]
		if refused && why == "" {
			o = nil
			break
		}
		if refused {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"BadRequest","code":400,"message":%q}`, why)
			return
		}
		o = &unstructured.Unstructured{Object: map[string]any{"kind": "Tried"}}
	case r.Method == http.MethodPatch:
		s.apply(r, path, what)
		o = s.objects[path]
	case r.Method == http.MethodDelete && o != nil:
		delete(s.objects, path)
		s.done = append(s.done, "-"+what)
		s.after(s, "-"+what)
	case r.Method == http.MethodGet && o == nil && s.isList(path):
		o = s.list(path, r.URL.Query().Get("labelSelector"))
	}
	if o == nil {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404,"message":"no %s"}`, path)
		return
	}
	if err := json.NewEncoder(w).Encode(o.Object); err != nil {
		s.t.Error(err)
	}
}

func (s *store) apply(r *http.Request, path, what string) {
	if r.URL.Query().Get("fieldManager") != FieldManager || r.Header.Get("Content-Type") != "application/apply-patch+yaml" {
		s.t.Errorf("%s is written by %s %s", path, r.URL.RawQuery, r.Header.Get("Content-Type"))
	}
	b, err := io.ReadAll(r.Body)
	var m map[string]any
	if err != nil || yaml.Unmarshal(b, &m) != nil {
		s.t.Errorf("%s: %s, %v", path, b, err)
	}
	before, o := s.objects[path], &unstructured.Unstructured{Object: m}
	if before != nil && cmp.Equal(before.Object["spec"], m["spec"]) && cmp.Equal(before.Object["data"], m["data"]) {
		return
	}
	s.version++
	o.SetResourceVersion(fmt.Sprint(s.version))
	o.SetManagedFields([]metaFields{{Manager: FieldManager, Operation: "Apply"}})
	s.objects[path] = o
	s.done = append(s.done, "+"+what)
	s.after(s, "+"+what)
}

func (s *store) isList(path string) bool {
	last := path[strings.LastIndex(path, "/")+1:]
	return slices.ContainsFunc(kinds, func(k kind) bool { return k.resource.Resource == last }) ||
		slices.Contains([]string{"pods", "nodes", "statefulsets", "jobs", "persistentvolumeclaims", "ciliumnetworkpolicies", "ciliumclusterwidenetworkpolicies", "ciliumcidrgroups"}, last)
}

func (s *store) list(path, selector string) *unstructured.Unstructured {
	items := []any{}
	for _, p := range sortedKeys(s.objects) {
		o := s.objects[p]
		if strings.HasPrefix(p, path+"/") && (selector == "" || (selector == partOf+"="+product) == (o.GetLabels()[partOf] == product)) {
			items = append(items, o.Object)
		}
	}
	return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "List", "metadata": map[string]any{}, "items": items}}
}

// put puts an object there as somebody else does.
func (s *store) put(path string, o map[string]any) {
	s.objects[path] = &unstructured.Unstructured{Object: o}
}

const (
	storeAgents  = "/apis/apps/v1/namespaces/net/daemonsets/portcullis-agent"
	storeCleanup = "/apis/apps/v1/namespaces/net/daemonsets/portcullis-cleanup"
	storeCRDs    = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"
	storePods    = "/api/v1/namespaces/net/pods/"
)

// lives lets what is written have the consequences that an installation waits
// for: definitions are established, and the clean-up runs on one node.
func lives(s *store, what string) {
	if strings.HasPrefix(what, "+customresourcedefinitions/") {
		o := s.objects[storeCRDs+strings.TrimPrefix(what, "+customresourcedefinitions/")]
		o.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}
	}
	switch what {
	case "+daemonsets/portcullis-cleanup":
		s.objects[storeCleanup].Object["status"] = map[string]any{"desiredNumberScheduled": int64(1)}
		s.put(storePods+"c", map[string]any{"metadata": map[string]any{"name": "c", "labels": map[string]any{partOf: product, nameLabel: cleanupName}},
			"spec": map[string]any{"nodeName": "n1"}, "status": map[string]any{"conditions": []any{map[string]any{"type": "Ready", "status": "True"}}}})
	case "-daemonsets/portcullis-cleanup":
		delete(s.objects, storePods+"c")
	}
}

func installed(t *testing.T, c *Cluster, layers ...Layer) {
	t.Helper()
	v, err := Merge(layers...)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Install(t.Context(), Options{Release: Release{Namespace: "net", Values: v}, Say: t.Logf}); err != nil {
		t.Fatal(err)
	}
}

func (s *store) written() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := s.done
	s.done = nil
	return out
}

func TestInstallInOrder(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	foreign := storeCRDs + "ciliumnetworkpolicies.cilium.io"
	s.put(foreign, map[string]any{"kind": crdKind, "metadata": map[string]any{"name": "ciliumnetworkpolicies.cilium.io", "labels": map[string]any{partOf: product, ciliumSchema: "1"}},
		"spec": "somebody else's", "status": map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}})
	installed(t, c)
	did := s.written()
	if s.objects[foreign].Object["spec"] != "somebody else's" {
		t.Error("somebody else's definition was changed")
	}
	at := func(what string) int { return slices.Index(did, what) }
	if at("+customresourcedefinitions/ciliumcidrgroups.cilium.io") != 1 || at("+namespaces/net") != 2 || at("+daemonsets/portcullis-agent") != len(did)-1 ||
		at("+configmaps/portcullis-agent") < at("+serviceaccounts/portcullis-agent") {
		t.Errorf("the order is %q", did)
	}
	if installed(t, c); len(s.written()) != 0 {
		t.Error("the second time changes something")
	}
	// What is not part of it any more goes; what somebody else labelled so stays.
	s.put("/api/v1/namespaces/net/configmaps/mine", map[string]any{"kind": "ConfigMap", "metadata": map[string]any{"name": "mine", "labels": map[string]any{partOf: product}}})
	installed(t, c, layer(t, "issuer: {enabled: false}\nspire: {socketPath: /run/spire/a.sock}"))
	did = s.written()
	for _, what := range []string{"-deployments/portcullis-issuer", "-secrets/portcullis-issuer", "-configmaps/portcullis-bundle", "-clusterroles/portcullis-issuer"} {
		if !slices.Contains(did, what) {
			t.Errorf("no %s in %q", what, did)
		}
	}
	if slices.Contains(did, "-configmaps/mine") || slices.Contains(did, "-namespaces/net") {
		t.Errorf("removes what is not its own: %q", did)
	}
}

func TestInstallRefusesToFight(t *testing.T) {
	for want, object := range map[string]map[string]any{
		"helm upgrade":                     {"kind": "DaemonSet", "metadata": map[string]any{"name": agentName, "annotations": map[string]any{"meta.helm.sh/release-name": "r"}}},
		"the agents are being removed":     {"kind": "DaemonSet", "metadata": map[string]any{"name": agentName, "deletionTimestamp": "2026-01-01T00:00:00Z"}},
		"an uninstall was begun":           {"kind": "DaemonSet", "metadata": map[string]any{"name": cleanupName}},
		"installation in namespace theirs": {"kind": "ClusterRoleBinding", "metadata": map[string]any{"name": agentName}, "subjects": []any{map[string]any{"namespace": "theirs"}}},
	} {
		s, c := newStore(t)
		k, _ := kindOf(&unstructured.Unstructured{Object: object})
		name := object["metadata"].(map[string]any)["name"].(string)
		path := "/apis/" + k.resource.Group + "/v1/" + k.resource.Resource + "/" + name
		if k.namespaced {
			path = "/apis/" + k.resource.Group + "/v1/namespaces/net/" + k.resource.Resource + "/" + name
		}
		s.put(path, object)
		err := c.Install(t.Context(), Options{Release: Release{Namespace: "net", Values: Default()}, Say: t.Logf})
		if err == nil || !strings.Contains(err.Error(), want) || len(s.written()) != 0 {
			t.Errorf("%s: %v", want, err)
		}
	}
}

// What the API server would refuse of an upgrade keeps all of it from being done; what it
// cannot tell does not.
func TestInstallIsRehearsed(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	installed(t, c)
	s.mu.Lock()
	for _, what := range s.tried {
		if strings.HasPrefix(what, "daemonsets/") || strings.HasPrefix(what, "customresourcedefinitions/") {
			t.Errorf("%s was tried before its namespace was there, or has rules of its own", what)
		}
	}
	s.tried, s.refuse = nil, map[string]string{"daemonsets/portcullis-agent": "not this one", "services/portcullis-issuer": "nor this"}
	s.mu.Unlock()
	s.written()
	v, err := Merge(layer(t, "config: {ttl: 40s}"))
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Release: Release{Namespace: "net", Values: v}, Say: t.Logf}
	err = c.Install(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "nothing was changed") || !strings.Contains(err.Error(), "not this one") || !strings.Contains(err.Error(), "nor this") {
		t.Errorf("a part is refused: %v", err)
	}
	if did := s.written(); len(did) != 0 {
		t.Errorf("changed all the same: %q", did)
	}
	s.refuse = map[string]string{"daemonsets/portcullis-agent": `admission webhook "w" does not support dry run`, "rolebindings/portcullis-issuer": ""}
	if err := c.Install(t.Context(), o); err != nil || len(s.written()) == 0 {
		t.Errorf("a webhook that cannot be tried: %v", err)
	}
}

// In a namespace that has its labels by this installation only, what goes by them may
// refuse what it will not refuse then.
func TestInstallIsRehearsedBeforeLabels(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	s.put("/api/v1/namespaces/net", map[string]any{"kind": "Namespace", "metadata": map[string]any{"name": "net", "labels": map[string]any{"mine": "yes"}}})
	s.refuse = map[string]string{"daemonsets/portcullis-agent": "no privileged pods here"}
	said, wrote, err := tryInstall(t, s, c)
	if err != nil || !slices.Contains(wrote, "+daemonsets/portcullis-agent") || !strings.Contains(said, "DaemonSet portcullis-agent could not be tried: ") {
		t.Errorf("%v, wrote %q, said %s", err, wrote, said)
	}
	s.refuse["clusterroles/portcullis-agent"] = "you may not"
	s.put("/api/v1/namespaces/net", map[string]any{"kind": "Namespace", "metadata": map[string]any{"name": "net"}})
	if _, wrote, err := tryInstall(t, s, c, layer(t, "config: {ttl: 40s}")); err == nil || len(wrote) != 0 || !strings.Contains(err.Error(), "you may not") {
		t.Errorf("what is in no namespace is refused: %v, wrote %q", err, wrote)
	}
	s.refuse, s.down = nil, "daemonsets/portcullis-agent"
	if _, wrote, err := tryInstall(t, s, c, layer(t, "config: {ttl: 41s}")); err == nil || len(wrote) != 0 || !strings.Contains(err.Error(), "nothing was changed") {
		t.Errorf("a server that cannot try it now: %v, wrote %q", err, wrote)
	}
}

// Wherever an uninstall stops, another one ends it, and no order is wrong: no
// node is cleaned while agents are there, nothing else goes before the nodes
// are clean.
func TestUninstallInOrderFromAnywhere(t *testing.T) {
	for stop := 0; ; {
		s, c := newStore(t)
		s.after = lives
		installed(t, c, layer(t, "image: {repository: r.example.com/p, tag: v7}\ncni: {binDir: /other/bin}"))
		s.written()
		var all []string
		writes := 0
		ctx, cancel := context.WithCancel(t.Context())
		s.after = func(s *store, what string) {
			lives(s, what)
			if what == "+daemonsets/portcullis-cleanup" {
				b, err := s.objects[storeCleanup].MarshalJSON()
				if text := string(b); err != nil || !strings.Contains(text, `"r.example.com/p:v7"`) || !strings.Contains(text, "--cni-bin-dir=/other/bin") {
					t.Errorf("the clean-up is not of the agents that ran: %s", text)
				}
			}
			if writes++; writes == stop {
				cancel()
			}
		}
		options := UninstallOptions{Release: Release{Namespace: "net", Values: Default()}, Say: t.Logf}
		_, err := c.Uninstall(ctx, options)
		all = append(all, s.written()...)
		ended := err == nil
		if !ended && !strings.Contains(err.Error(), goesOn) {
			t.Errorf("stopped after %d writes it does not say that it can go on: %v", stop, err)
		}
		if _, err := c.Uninstall(t.Context(), options); err != nil {
			t.Fatalf("stopped after %d writes: %v", stop, err)
		}
		all = append(all, s.written()...)
		cancel()
		checkUninstall(t, stop, all, s)
		if stop > 0 && ended {
			if stop < 15 {
				t.Errorf("an uninstall writes %d times only", stop)
			}
			return
		}
		if stop++; stop > 6 { // the objects go one after another there
			stop += 6
		}
	}
}

func checkUninstall(t *testing.T, stop int, did []string, s *store) {
	t.Helper()
	at := func(what string) int { return slices.Index(did, what) }
	agents, clean, done := at("-daemonsets/portcullis-agent"), at("+daemonsets/portcullis-cleanup"), slices.Index(did, "-daemonsets/portcullis-cleanup")
	for i, what := range did {
		record := strings.HasSuffix(what, "configmaps/portcullis-uninstall")
		if strings.HasPrefix(what, "-") && !strings.HasPrefix(what, "-daemonsets/") && i < done {
			t.Errorf("stopped after %d writes: %s before the nodes are clean: %q", stop, what, did)
		}
		if what == "-configmaps/portcullis-uninstall" && i != len(did)-2 || what == "-namespaces/net" && i != len(did)-1 || record && i < agents && what[0] == '-' {
			t.Errorf("stopped after %d writes: %s too early: %q", stop, what, did)
		}
	}
	if agents < 0 || at("+configmaps/portcullis-uninstall") != 0 || clean < agents || done < clean {
		t.Errorf("stopped after %d writes: the order is %q", stop, did)
	}
	for path := range s.objects {
		t.Errorf("stopped after %d writes: %s is left", stop, path)
	}
}

func TestUninstallLeavesWhatIsNotItsOwn(t *testing.T) {
	s, c := newStore(t)
	s.after = lives
	installed(t, c)
	policy := "/apis/cilium.io/v2/ciliumnetworkpolicies/mine" // the real path has the namespace in it; a list over all has not
	s.put(policy, map[string]any{"kind": "CiliumNetworkPolicy", "metadata": map[string]any{"name": "mine", "namespace": "default"}})
	other := "/api/v1/namespaces/net/pods/other"
	s.put(other, map[string]any{"kind": "Pod", "metadata": map[string]any{"name": "other"}})
	o := UninstallOptions{Release: Release{Namespace: "net", Values: Default()}, Say: t.Logf}
	stay, err := c.Uninstall(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ciliumnetworkpolicies.cilium.io: there is default/mine", "Namespace net: there is something else in it: Pod other"} {
		if !strings.Contains(strings.Join(stay, "\n"), want) {
			t.Errorf("no %q in %q", want, stay)
		}
	}
	if s.objects[storeCRDs+"ciliumnetworkpolicies.cilium.io"] == nil || s.objects["/api/v1/namespaces/net"] == nil || s.objects[storeCRDs+"ciliumcidrgroups.cilium.io"] != nil {
		t.Error("removed what is in use, or left what is not")
	}
	delete(s.objects, other)
	o.RemovePolicies = true
	if stay, err = c.Uninstall(t.Context(), o); err != nil || len(stay) != 0 || s.objects[storeCRDs+"ciliumnetworkpolicies.cilium.io"] != nil || s.objects["/api/v1/namespaces/net"] != nil {
		t.Errorf("%q, %v", stay, err)
	}
}

// The issuer has no more pods than there are nodes.
func TestInstallFitsTheIssuer(t *testing.T) {
	for nodes, want := range []float64{2, 1, 2, 2} {
		s, c := newStore(t)
		s.after = lives
		for i := range nodes {
			name := fmt.Sprint("n", i)
			s.put("/api/v1/nodes/"+name, map[string]any{"kind": "Node", "metadata": map[string]any{"name": name}})
		}
		installed(t, c)
		got, _, err := unstructured.NestedFieldNoCopy(s.objects["/apis/apps/v1/namespaces/net/deployments/portcullis-issuer"].Object, "spec", "replicas")
		if fmt.Sprint(got) != fmt.Sprint(want) || err != nil {
			t.Errorf("with %d nodes %v, %v", nodes, got, err)
		}
		s.written()
		if installed(t, c); len(s.written()) != 0 {
			t.Errorf("with %d nodes the second time changes something", nodes)
		}
	}
}
