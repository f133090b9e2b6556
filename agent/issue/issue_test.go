package issue

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"go.uber.org/zap"

	"portcullis/agent/kube"
	"portcullis/identity"
	"portcullis/identity/issuer"
	"portcullis/identity/issuer/client"
	"portcullis/identity/svid"
)

const patience = time.Minute

// apiServer speaks the part of the Kubernetes API that the issuer uses, in the
// API's own JSON, and allows what issuer.Access lists, and nothing else.
type apiServer struct {
	t   *testing.T
	url string

	mu      sync.Mutex
	objects map[string]map[string]any // guarded by mu; by resource/name
	version int                       // guarded by mu
	tokens  map[string]map[string]any // guarded by mu; the status of each
	denied  []string                  // guarded by mu; what was asked beyond the list
	mounted string                    // the ConfigMap's file, as a kubelet would have it
}

func newAPIServer(t *testing.T) *apiServer {
	s := &apiServer{t: t, objects: map[string]map[string]any{}, tokens: map[string]map[string]any{}, mounted: filepath.Join(t.TempDir(), ConfigMapKey)}
	cfg := Default()
	for path, kind := range map[string]string{"secrets/" + cfg.Secret: "Secret", "configmaps/" + cfg.ConfigMap: "ConfigMap"} {
		_, name, _ := strings.Cut(path, "/")
		s.objects[path] = map[string]any{"apiVersion": "v1", "kind": kind, "metadata": map[string]any{"name": name, "namespace": "portcullis", "resourceVersion": "0", "labels": map[string]any{"kept": "yes"}}}
	}
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	s.url = h.URL
	return s
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	verb := map[string]string{http.MethodGet: "get", http.MethodPut: "update", http.MethodPost: "create"}[r.Method]
	group, resource, name := "", "", ""
	if r.URL.Path == "/apis/authentication.k8s.io/v1/tokenreviews" {
		group, resource = "authentication.k8s.io", "tokenreviews"
	} else if rest, ok := strings.CutPrefix(r.URL.Path, "/api/v1/namespaces/portcullis/"); ok {
		resource, name, _ = strings.Cut(rest, "/")
	}
	if !slices.ContainsFunc(issuer.Access(Default().Secret, Default().ConfigMap), func(a issuer.Rule) bool {
		return a.APIGroup == group && a.Resource == resource && slices.Contains(a.Verbs, verb) && (a.Names == nil || slices.Contains(a.Names, name))
	}) {
		s.denied = append(s.denied, r.Method+" "+r.URL.Path)
		s.fail(w, 403, "Forbidden")
		return
	}
	var body map[string]any
	if verb != "get" {
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			s.fail(w, 400, "BadRequest")
			return
		}
	}
	switch {
	case resource == "tokenreviews":
		s.review(w, body)
	case s.objects[resource+"/"+name] == nil:
		s.fail(w, 404, "NotFound")
	case verb == "get":
		json.NewEncoder(w).Encode(s.objects[resource+"/"+name])
	default:
		s.update(w, resource+"/"+name, body)
	}
}

func (s *apiServer) update(w http.ResponseWriter, at string, body map[string]any) {
	meta, _ := body["metadata"].(map[string]any)
	if meta["resourceVersion"] != s.objects[at]["metadata"].(map[string]any)["resourceVersion"] {
		s.fail(w, 409, "Conflict")
		return
	}
	s.version++
	meta["resourceVersion"] = strconv.Itoa(s.version)
	s.objects[at] = body
	if data, ok := body["data"].(map[string]any); ok && strings.HasPrefix(at, "configmaps/") {
		text, _ := data[ConfigMapKey].(string)
		if err := os.WriteFile(s.mounted, []byte(text), 0o600); err != nil {
			s.t.Error(err)
		}
	}
	json.NewEncoder(w).Encode(body)
}

// review answers as the API server does: audiences of both sides only.
func (s *apiServer) review(w http.ResponseWriter, body map[string]any) {
	spec, _ := body["spec"].(map[string]any)
	token, _ := spec["token"].(string)
	status, ok := s.tokens[token]
	asked, _ := spec["audiences"].([]any)
	if !ok || len(asked) != 1 || asked[0] != issuer.DefaultAudience {
		status = map[string]any{"error": "[invalid bearer token, token audiences are not among those asked for]", "user": map[string]any{}}
	}
	body["status"] = status
	w.WriteHeader(http.StatusCreated)
	json.NewEncoder(w).Encode(body)
}

func (s *apiServer) fail(w http.ResponseWriter, code int, reason string) {
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": reason, "code": code})
}

// agentToken is the status of the token of an agent's pod.
func agentToken(account, node string) map[string]any {
	return map[string]any{"authenticated": true, "audiences": []string{issuer.DefaultAudience}, "user": map[string]any{
		"username": account, "uid": "u", "groups": []string{"system:serviceaccounts"},
		"extra": map[string]any{
			"authentication.kubernetes.io/node-name": []string{node}, "authentication.kubernetes.io/node-uid": []string{"nu"},
			"authentication.kubernetes.io/pod-name": []string{"agent"}, "authentication.kubernetes.io/pod-uid": []string{"pu"},
			"authentication.kubernetes.io/credential-id": []string{"JTI=1"},
		}}}
}

func (s *apiServer) config(t *testing.T) Config {
	t.Helper()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"clusters":[{"name":"c","cluster":{"server":%q}}],"users":[{"name":"u","user":{}}]}`, s.url)
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := Default()
	cfg.TrustDomain, cfg.Namespace, cfg.Kubeconfig = "cluster.example", "portcullis", kubeconfig
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Listen = ln.Addr().String()
	ln.Close()
	return cfg
}

func background(t *testing.T, run func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func agentOf(t *testing.T, s *apiServer, cfg Config, node, token string) *svid.Source {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(token), 0o600); err != nil {
		t.Fatal(err)
	}
	id := spiffeid.RequireFromPath(spiffeid.RequireTrustDomainFromString(cfg.TrustDomain), identity.AgentSPIFFEPath(identity.NodeName(node)))
	from, err := client.New(client.Config{URL: "https://" + cfg.Listen, TokenFile: filepath.Join(dir, "token"), BundleFile: s.mounted, CacheFile: filepath.Join(dir, "kept"), ID: id, Poll: 20 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	source, err := svid.New(svid.Config{From: from, ID: id})
	if err != nil {
		t.Fatal(err)
	}
	background(t, source.Run)
	return source
}

// The whole issuer, with no more rights than it lists: agents get their SVIDs,
// strangers do not, and what others have put into the objects stays.
func TestIssuer(t *testing.T) {
	s := newAPIServer(t)
	cfg := s.config(t)
	const account = "system:serviceaccount:portcullis:portcullis-agent"
	s.tokens["one"] = agentToken(account, "n1")
	s.tokens["stranger"] = agentToken("system:serviceaccount:default:default", "n2")
	stop := background(t, func(ctx context.Context) error { return Run(ctx, cfg, zap.NewNop()) })
	one := agentOf(t, s, cfg, "n1", "one")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := one.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	v, err := one.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if id, _, err := x509svid.Verify(v.Certificates, one); err != nil || id.Path() != "/portcullis/node/n1" {
		t.Errorf("the SVID: %s, %v", id, err)
	}
	for token, want := range map[string]issuer.Refusal{"stranger": issuer.RefusedAccount, "unknown": issuer.RefusedToken} {
		source := agentOf(t, s, cfg, "n2", token)
		for deadline := time.Now().Add(patience); source.Problem() == nil || !strings.Contains(source.Problem().Error(), string(want)); {
			if time.Now().After(deadline) {
				t.Fatalf("token %s: %v, want %s", token, source.Problem(), want)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.denied) > 0 {
		t.Errorf("the issuer asked for what its list of rights does not have: %q", s.denied)
	}
	secret, _ := json.Marshal(s.objects["secrets/"+cfg.Secret])
	public, _ := json.Marshal(s.objects["configmaps/"+cfg.ConfigMap])
	if !strings.Contains(string(secret), `"kept":"yes"`) || !strings.Contains(string(public), `"kept":"yes"`) || !strings.Contains(string(secret), SecretKey) {
		t.Errorf("the objects: %s %s", secret, public)
	}
}

// Values of objects: versions hold, and errors are what identity/issuer knows.
func TestValues(t *testing.T) {
	s := newAPIServer(t)
	cfg := s.config(t)
	api, err := kube.NewAPI(cfg.Kubeconfig, "portcullis", "test")
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []*kube.Value{api.Secret(cfg.Secret, "k"), api.ConfigMap(cfg.ConfigMap, "k")} {
		st := store{o}
		value, version, err := st.Load(t.Context())
		if err != nil || value != nil || version == "" {
			t.Fatalf("%s is empty: %q %q %v", o, value, version, err)
		}
		if err := st.Save(t.Context(), []byte("v1"), version); err != nil {
			t.Fatal(err)
		}
		if err := st.Save(t.Context(), []byte("v2"), version); !errors.Is(err, issuer.ErrConflict) {
			t.Errorf("%s: an old version: %v", o, err)
		}
		if value, _, err := st.Load(t.Context()); err != nil || string(value) != "v1" {
			t.Errorf("%s: %q %v", o, value, err)
		}
	}
	s.mu.Lock()
	delete(s.objects, "secrets/"+cfg.Secret)
	s.mu.Unlock()
	gone := store{api.Secret(cfg.Secret, "k")}
	if _, _, err := gone.Load(t.Context()); !errors.Is(err, issuer.ErrMissing) || !strings.Contains(err.Error(), cfg.Secret) {
		t.Errorf("a Secret that is missing: %v", err)
	}
	if err := gone.Save(t.Context(), nil, "1"); !errors.Is(err, issuer.ErrConflict) {
		t.Errorf("a Secret that went: %v", err)
	}
	// Making one is not among the rights; the error is what the API server says.
	if err := gone.Save(t.Context(), nil, ""); err == nil || errors.Is(err, issuer.ErrConflict) {
		t.Errorf("making one: %v", err)
	}
}

func TestValidate(t *testing.T) {
	good := Default()
	good.TrustDomain, good.Namespace = "cluster.example", "portcullis"
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for want, change := range map[string]func(*Config){
		"--trust-domain":          func(c *Config) { c.TrustDomain = "A B" },
		"--listen":                func(c *Config) { c.Listen = "4261" },
		"--namespace":             func(c *Config) { c.Namespace = "A/B" },
		"--secret":                func(c *Config) { c.Secret = "" },
		"--bundle-configmap":      func(c *Config) { c.ConfigMap = "" },
		"--agent-service-account": func(c *Config) { c.ServiceAccount = "x:y" },
		"--audience":              func(c *Config) { c.Audience = "" },
		"--svid-ttl":              func(c *Config) { c.SVIDLife = time.Second },
		"--authority-ttl":         func(c *Config) { c.AuthorityLife = time.Hour },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
