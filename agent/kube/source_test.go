package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
)

// apiServer speaks as much of the Kubernetes API as a Source asks for: lists and
// watches in JSON, over real connections.
type apiServer struct {
	t       *testing.T
	address string

	mu      sync.Mutex
	server  *http.Server                         // guarded by mu; nil: down
	version int                                  // guarded by mu
	objects map[string]map[string]map[string]any // guarded by mu; by path, by namespace/name; a path that is missing is not served
	watches map[chan []byte]string               // guarded by mu; to their paths
	asked   []string                             // guarded by mu
	fails   map[string]bool                      // guarded by mu; paths that answer with an error
	aged    bool                                 // guarded by mu; old: no lists by watches, and "any version" is one of long ago, before there was anything
}

const (
	nodesPath, namespacesPath, podsPath = "/api/v1/nodes", "/api/v1/namespaces", "/api/v1/pods"
	servicesPath                        = "/api/v1/services"
	slicesPath                          = "/apis/discovery.k8s.io/v1/endpointslices"
	policiesPath                        = "/apis/networking.k8s.io/v1/networkpolicies"
	ciliumPath                          = "/apis/cilium.io/v2/ciliumnetworkpolicies"
)

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{t: t, objects: map[string]map[string]map[string]any{}, watches: map[chan []byte]string{}}
	for _, p := range []string{nodesPath, namespacesPath, servicesPath, slicesPath, podsPath, policiesPath} {
		s.objects[p] = map[string]map[string]any{}
	}
	s.up()
	t.Cleanup(s.down)
	return s
}

func (s *apiServer) up() {
	s.t.Helper()
	listen := s.address
	if listen == "" {
		listen = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.address, s.server = l.Addr().String(), &http.Server{Handler: s}
	go s.server.Serve(l) //nolint:errcheck // it ends with down
}

// down cuts every connection.
func (s *apiServer) down() {
	s.mu.Lock()
	server := s.server
	s.server = nil
	s.mu.Unlock()
	if server != nil {
		server.Close()
	}
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	s.mu.Lock()
	s.asked = append(s.asked, r.URL.Path+"?"+r.URL.RawQuery)
	all, served := s.objects[r.URL.Path]
	if s.fails[r.URL.Path] || s.aged && r.URL.Query().Get("sendInitialEvents") == "true" {
		s.mu.Unlock()
		w.WriteHeader(http.StatusUnprocessableEntity)
		json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Invalid", "code": http.StatusUnprocessableEntity})
		return
	}
	if s.aged && r.URL.Query().Get("resourceVersion") == "0" {
		all = nil
	}
	if r.URL.Path == "/apis/cilium.io/v2" {
		_, has := s.objects[ciliumPath]
		s.mu.Unlock()
		list := map[string]any{"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "cilium.io/v2", "resources": []any{}}
		if has {
			list["resources"] = []any{map[string]any{"name": "ciliumnetworkpolicies", "kind": "CiliumNetworkPolicy", "namespaced": true, "verbs": []string{"list", "watch"}}}
		}
		json.NewEncoder(w).Encode(list)
		return
	}
	if !served {
		s.mu.Unlock()
		w.WriteHeader(http.StatusNotFound)
		json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404})
		return
	}
	var items []any
	for _, o := range all {
		items = append(items, o)
	}
	kind := map[string]string{nodesPath: "Node", namespacesPath: "Namespace", servicesPath: "Service", slicesPath: "EndpointSlice", podsPath: "Pod", policiesPath: "NetworkPolicy", ciliumPath: "CiliumNetworkPolicy"}[r.URL.Path]
	group := strings.TrimPrefix(strings.TrimPrefix(r.URL.Path[:strings.LastIndex(r.URL.Path, "/")], "/apis/"), "/api/")
	version := strconv.Itoa(s.version)
	if watch, _ := strconv.ParseBool(r.URL.Query().Get("watch")); !watch {
		s.mu.Unlock()
		json.NewEncoder(w).Encode(map[string]any{"kind": kind + "List", "apiVersion": group, "metadata": map[string]any{"resourceVersion": version}, "items": append([]any{}, items...)})
		return
	}
	events := make(chan []byte, 1000)
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		for _, o := range items {
			events <- event("ADDED", o.(map[string]any))
		}
		events <- event("BOOKMARK", map[string]any{"kind": kind, "apiVersion": group,
			"metadata": map[string]any{"resourceVersion": version, "annotations": map[string]any{"k8s.io/initial-events-end": "true"}}})
	}
	s.watches[events] = r.URL.Path
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watches, events)
	}()
	w.(http.Flusher).Flush()
	for {
		select {
		case e := <-events:
			if _, err := w.Write(e); err != nil {
				return
			}
			w.(http.Flusher).Flush()
		case <-r.Context().Done():
			return
		}
	}
}

func event(what string, o map[string]any) []byte {
	b, err := json.Marshal(map[string]any{"type": what, "object": o})
	if err != nil {
		panic(err)
	}
	return append(b, '\n')
}

// put adds or replaces an object.
func (s *apiServer) put(path, text string) {
	s.t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	meta := o["metadata"].(map[string]any)
	meta["resourceVersion"] = strconv.Itoa(s.version)
	key := fmt.Sprint(meta["namespace"], "/", meta["name"])
	what := "ADDED"
	if s.objects[path][key] != nil {
		what = "MODIFIED"
	}
	s.objects[path][key] = o
	s.tell(path, event(what, o))
}

func (s *apiServer) remove(path, key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	o := s.objects[path][key]
	if o == nil {
		s.t.Fatalf("no %s in %s", key, path)
	}
	delete(s.objects[path], key)
	s.tell(path, event("DELETED", o))
}

// bookmark tells the watches over a path how far they are.
func (s *apiServer) bookmark(path, kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tell(path, event("BOOKMARK", map[string]any{"kind": kind, "apiVersion": "v1", "metadata": map[string]any{"resourceVersion": strconv.Itoa(s.version)}}))
}

func (s *apiServer) tell(path string, e []byte) {
	for c, p := range s.watches {
		if p == path {
			c <- e
		}
	}
}

func (s *apiServer) source(dir string) *Source {
	s.t.Helper()
	kubeconfig := filepath.Join(s.t.TempDir(), "kubeconfig")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: 'http://%s'}}]\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nusers: [{name: u, user: {}}]\n", s.address)
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	src, err := New(Config{Node: "n1", Kubeconfig: kubeconfig, StateDir: dir, UserAgent: "test", Log: zap.NewNop()})
	if err != nil {
		s.t.Fatal(err)
	}
	src.discoverEvery = 20 * time.Millisecond
	return src
}

// eventually waits for what the watches bring.
func eventually(t *testing.T, src *Source, what string, is func(*Picture) bool) *Picture {
	t.Helper()
	late := time.After(time.Minute)
	look := time.NewTicker(20 * time.Millisecond)
	defer look.Stop()
	for {
		p, changed := src.Next()
		if is(p) {
			return p
		}
		select {
		case <-changed:
		case <-look.C:
		case <-late:
			h, _ := json.MarshalIndent(src.Health(), "", " ")
			t.Fatalf("%s did not come: %+v\n%s", what, p, h)
		}
	}
}

func run(t *testing.T, src *Source) (stop func()) {
	ctx, done := t.Context(), make(chan struct{})
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		defer close(done)
		if err := src.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return stop
}

func nodeJSON(name, cidr, ip string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Node","metadata":{"name":%q,"uid":"u-%s"},"spec":{"podCIDRs":[%q]},"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, name, name, cidr, ip)
}

const (
	systemJSON = `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"kube-system","uid":"cluster-1"}}`
	shopJSON   = `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":"shop","uid":"ns-1","labels":{"team":"a"}}}`
	podJSON    = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web-1","namespace":"shop","uid":"` + podUID + `","labels":{"app":"web"}},"spec":{"nodeName":"n1","containers":[{"name":"c"}]}}`
	ciliumJSON = `{"apiVersion":"cilium.io/v2","kind":"CiliumNetworkPolicy","metadata":{"name":"c","namespace":"shop"},"spec":{"endpointSelector":{},"ingress":[{}]}}`
)

func refs(p *Picture) (out []string) {
	for _, o := range p.Objects {
		out = append(out, o.Ref.String())
	}
	slices.Sort(out)
	return out
}

// TestSource: what the API server says comes, stays while it is away, also for a
// source that begins then, and is made good when it is back.
func TestSource(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(nodesPath, nodeJSON("n2", "10.1.2.0/24", "192.0.2.2"))
	s.put(namespacesPath, systemJSON)
	s.put(namespacesPath, shopJSON)
	s.put(podsPath, podJSON)
	s.put(policiesPath, goodPolicy)
	dir := t.TempDir()
	src := s.source(dir)
	if ok, why := src.Usable(); ok || why == "" {
		t.Fatalf("usable before anything was listed: %v, %q", ok, why)
	}
	stop := run(t, src)
	p := eventually(t, src, "the first picture", func(p *Picture) bool { return p.Listed })
	if len(p.Nodes) != 2 || len(p.Pods) != 1 || !slices.Equal(refs(p), []string{"Namespace kube-system", "Namespace shop", "NetworkPolicy shop/web"}) {
		t.Fatalf("listed: %+v", p)
	}
	if ok, why := src.Usable(); !ok {
		t.Errorf("not usable: %s", why)
	}
	s.mu.Lock()
	if !slices.ContainsFunc(s.asked, func(q string) bool {
		return strings.HasPrefix(q, podsPath) && strings.Contains(q, "spec.nodeName%3Dn1") && strings.Contains(q, "sendInitialEvents=true") && strings.Contains(q, "allowWatchBookmarks=true")
	}) {
		t.Errorf("asked %q", s.asked)
	}
	if n := len(s.asked); n > 30 {
		t.Errorf("%d requests for %d resources: %q", n, len(resources("")), s.asked)
	}
	s.mu.Unlock()
	for _, w := range src.Health().Watches {
		want := "ok"
		if strings.HasPrefix(w.Resource, "cilium") {
			want = "missing"
		}
		if got := w.State(time.Now()); got != want {
			t.Errorf("%s is %s (%s), want %s", w.Resource, got, w.Err, want)
		}
	}
	// Events.
	s.put(policiesPath, refusedPolicy)
	eventually(t, src, "a refused update", func(p *Picture) bool { return len(p.Refused) == 1 && p.Refused[0].Kept && len(refs(p)) == 3 })
	s.put(namespacesPath, strings.Replace(shopJSON, `"a"`, `"b"`, 1))
	eventually(t, src, "a label of a namespace", func(p *Picture) bool {
		return slices.ContainsFunc(p.Objects, func(o *Object) bool { return o.Namespace != nil && o.Namespace.Labels["team"] == "b" })
	})
	// A resource that comes later.
	s.mu.Lock()
	s.objects[ciliumPath] = map[string]map[string]any{}
	s.mu.Unlock()
	s.put(ciliumPath, ciliumJSON)
	eventually(t, src, "a policy of a kind that was missing", func(p *Picture) bool { return slices.Contains(refs(p), "CiliumNetworkPolicy shop/c") })

	// The API server goes.
	last := refs(src.Picture())
	eventually(t, src, "the snapshot", func(*Picture) bool {
		snap, _, err := readSnapshot(src.path, "n1", src.authority)
		return err == nil && len(snap.Objects) == len(last)
	})
	s.down()
	eventually(t, src, "a stale watch", func(*Picture) bool {
		return slices.ContainsFunc(src.Health().Watches, func(w Watch) bool { return w.Resource == "nodes" && w.State(time.Now()) == "stale" && w.Err != "" })
	})
	if p := src.Picture(); !slices.Equal(refs(p), last) || len(p.Nodes) != 2 || len(p.Pods) != 1 {
		t.Errorf("without the API server: %+v", p)
	}
	stop()
	src = s.source(dir)
	run(t, src)
	if ok, why := src.Usable(); !ok {
		t.Errorf("the snapshot is not usable: %s", why)
	}
	if p := src.Picture(); p.Listed || !slices.Equal(refs(p), last) || len(p.Nodes) != 2 || len(p.Pods) != 1 || src.Health().Taken.IsZero() {
		t.Errorf("of the snapshot: %+v", p)
	}
	// It comes back, and says otherwise.
	s.remove(nodesPath, "<nil>/n2")
	s.remove(policiesPath, "shop/web")
	s.up()
	p = eventually(t, src, "the API server", func(p *Picture) bool { return p.Listed })
	if len(p.Nodes) != 1 || len(p.Departed) != 2 || len(p.Refused) != 0 || slices.Contains(refs(p), "NetworkPolicy shop/web") || p.Other {
		t.Errorf("after it came back: %+v", p)
	}
}

// TestSourceOfAnotherCluster: what a snapshot says of another cluster does not
// outlive the first word of this one.
func TestSourceOfAnotherCluster(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	dir := t.TempDir()
	src := s.source(dir)
	tb := someTables(t) // with a node that departed, and a policy
	if err := take(tb, src.authority, "cluster-0", time.Now()).write(src.path); err != nil {
		t.Fatal(err)
	}
	src = s.source(dir)
	if p := src.Picture(); len(p.Objects) != 2 || len(p.Departed) != 2 {
		t.Fatalf("of the snapshot: %+v", p)
	}
	run(t, src)
	p := eventually(t, src, "the API server", func(p *Picture) bool { return p.Listed })
	if !p.Other || len(p.Departed) != 0 || len(p.Nodes) != 1 || !slices.Equal(refs(p), []string{"Namespace kube-system"}) {
		t.Errorf("after the cluster was told: %+v", p)
	}
}

// TestSnapshotLater: what could not be written is written as soon as it can be,
// also if nothing changes.
func TestSnapshotLater(t *testing.T) {
	s := newAPIServer(t)
	s.put(nodesPath, nodeJSON("n1", "10.1.1.0/24", "192.0.2.1"))
	s.put(namespacesPath, systemJSON)
	src := s.source(t.TempDir())
	inTheWay := src.path + ".new"
	if err := os.Mkdir(inTheWay, 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, src)
	eventually(t, src, "that it cannot be written", func(*Picture) bool { return strings.Contains(src.Unwritten(), "is a directory") })
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	eventually(t, src, "the snapshot", func(*Picture) bool {
		_, _, err := readSnapshot(src.path, "n1", src.authority)
		return err == nil && src.Unwritten() == ""
	})
}
