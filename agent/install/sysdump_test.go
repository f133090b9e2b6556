package install

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"portcullis/observe/archive"
)

const planted = "planted-secret"

// archiveOf is what `portcullis sysdump` sends from a node.
func archiveOf(t *testing.T, node string) []byte {
	t.Helper()
	var b bytes.Buffer
	a := archive.New(&b, archive.Options{Top: "x", Limit: 1 << 20, Longest: 1 << 20, Timeout: time.Minute, Now: time.Now})
	err := a.Run(t.Context(), []archive.Part{
		{Name: "agent/status", Gather: func(_ context.Context, f *archive.Files) error {
			return f.JSON("agent/status.json", map[string]string{"node": node})
		}},
		{Name: "logs", Gather: func(context.Context, *archive.Files) error { return errors.New("no log here") }},
	}, 1)
	if err == nil {
		_, err = a.Close(archive.Manifest{Of: "node", Name: node, Began: time.Now()})
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// upgrade answers a request for a command.
func upgrade(t *testing.T, w http.ResponseWriter, frames ...[]byte) {
	conn, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer conn.Close()
	io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n") //nolint:errcheck // a test's
	for _, f := range frames {
		conn.Write(f) //nolint:errcheck // a test's
	}
}

// serverOf is a cluster of four nodes: n1 gathers, n2 says nothing for ever, n3
// has an older version, n4 no agent. hung is closed at the end.
func serverOf(t *testing.T, hung chan struct{}) *Cluster {
	t.Helper()
	runs := corev1.ContainerStatus{Ready: true, RestartCount: 1, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	var nodes []corev1.Node
	var pods []corev1.Pod
	for i := range 4 {
		name := fmt.Sprintf("n%d", i+1)
		nodes = append(nodes, aNode(name, fmt.Sprintf("10.0.%d.0/24", i), "6.12"))
		if i < 3 {
			p := agentPod(name, true, runs)
			p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "API_TOKEN", Value: planted}}
			pods = append(pods, p)
		}
	}
	reply := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(v) //nolint:errcheck // a test's
	}
	lists := map[string]any{
		"/api/v1/nodes": nodes, "/api/v1/pods": pods, "/api/v1/namespaces/net/pods": pods, "/api/v1/namespaces": []any{},
		"/api/v1/namespaces/net/configmaps": []any{map[string]any{"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "portcullis-agent"}, "data": map[string]any{"agent.yaml": "ttl: 30s\npassword: " + planted + "\n"}}},
		"/api/v1/events": []any{map[string]any{"apiVersion": "v1", "kind": "Event", "metadata": map[string]any{"namespace": "shop", "name": "ours"}, "reportingComponent": "portcullis"},
			map[string]any{"apiVersion": "v1", "kind": "Event", "metadata": map[string]any{"namespace": "shop", "name": "theirs"}}},
		"/apis/networking.k8s.io/v1/networkpolicies": []any{},
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "secrets") {
			t.Error("Secrets are read")
		}
		if items, is := lists[r.URL.Path]; is {
			reply(w, map[string]any{"apiVersion": "v1", "kind": "List", "items": items})
			return
		}
		w.WriteHeader(http.StatusForbidden)
		reply(w, map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Forbidden", "message": "you may not read " + r.URL.Path, "code": 403})
	})
	mux.HandleFunc("GET /version", func(w http.ResponseWriter, _ *http.Request) { reply(w, map[string]any{"gitVersion": "v1.36.4"}) })
	mux.HandleFunc("GET /api/v1/namespaces/net/pods/{pod}/log", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "the first line\nAuthorization: Bearer %s\nthe log of %s, previous %s\n", planted, r.PathValue("pod"), r.URL.Query().Get("previous"))
	})
	mux.HandleFunc("GET /api/v1/namespaces/net/pods/{pod}/exec", func(w http.ResponseWriter, r *http.Request) {
		command := strings.Join(r.URL.Query()["command"], " ")
		gather := strings.HasPrefix(command, "/portcullis sysdump --output-file - ")
		switch r.PathValue("pod") {
		case "agent-n1":
			if gather {
				b := archiveOf(t, "n1")
				upgrade(t, w, frame(2, "progress"), frame(1, string(b[:len(b)/2])), frame(1, string(b[len(b)/2:])), frame(3, `{"status":"Success"}`))
				return
			}
			upgrade(t, w, frame(1, `{"node":"n1","healthy":true}`), frame(3, `{"status":"Success"}`))
		case "agent-n2":
			if gather {
				select {
				case <-hung:
				case <-r.Context().Done():
				}
				return
			}
			upgrade(t, w, frame(1, `{"node":"n2","healthy":true}`), frame(3, `{"status":"Success"}`))
		case "agent-n3":
			if gather {
				upgrade(t, w, frame(2, `portcullis: there is no command "portcullis sysdump"`), frame(3, `{"status":"Failure","message":"exit code 2"}`))
				return
			}
			upgrade(t, w, frame(1, `{"node":"n3","healthy":true}`), frame(3, `{"status":"Success"}`))
		}
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	t.Cleanup(func() { close(hung) })
	return connectTo(t, server.URL)
}

// Each node is there or said to be missing, and none is waited for; secrets are
// gone; what may not be read ends nothing else.
func TestSysdumpOfACluster(t *testing.T) {
	c := serverOf(t, make(chan struct{}))
	o := SysdumpOptions{Nodes: []string{"n1", "n3", "n4"}, NodeTimeout: time.Minute, NodeLimit: 1 << 20, AtOnce: 2, LogBytes: 80, Flows: 10}
	gather := func(o SysdumpOptions) (map[string]string, archive.Manifest, error) {
		var b bytes.Buffer
		a := archive.New(&b, archive.Options{Top: "top", Limit: 8 << 20, Longest: 1 << 20, Timeout: time.Minute, Now: time.Now})
		if err := c.Sysdump(t.Context(), a, o); err != nil {
			return nil, archive.Manifest{}, err
		}
		m, err := a.Close(archive.Manifest{Of: "cluster", Began: time.Now()})
		files := map[string]string{}
		gz, opened := gzip.NewReader(&b)
		if err := errors.Join(err, opened); err != nil {
			t.Fatal(err)
		}
		for r := tar.NewReader(gz); ; {
			h, err := r.Next()
			if err != nil {
				return files, m, nil
			}
			text, err := io.ReadAll(r)
			if err != nil {
				t.Fatal(err)
			}
			files[strings.TrimPrefix(h.Name, "top/")] = string(text)
		}
	}
	files, m, err := gather(o)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"nodes/n1/agent/status.json":       `"node": "n1"`,
		"nodes/n1/manifest.json":           `"no log here"`,
		"nodes/n3/agent/status.json":       `"node": "n3"`,
		"cluster/version.json":             "v1.36.4",
		"cluster/nodes.json":               `"n4"`,
		"cluster/pods.json":                "API_TOKEN",
		"cluster/all-pods.jsonl":           "agent-n2",
		"cluster/configmaps.json":          "[removed]",
		"cluster/events.json":              `"ours"`,
		"logs/agent-n1/agent-current.log":  "the log of agent-n1, previous false",
		"logs/agent-n3/agent-previous.log": "previous true",
		"errors.txt":                       "nodes/n4: nothing here: no agent runs on this node",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s holds no %s:\n%s", name, want, files[name])
		}
	}
	for name, text := range files {
		if strings.Contains(text, planted) || strings.Contains(text, "theirs") {
			t.Errorf("%s:\n%s", name, text)
		}
	}
	if strings.Contains(files["logs/agent-n1/agent-current.log"], "the first line") {
		t.Error("a log is longer than asked for")
	}
	for part, want := range map[string]string{"nodes/n3": "there is no command", "cluster/clusterroles": "you may not read"} {
		if !strings.Contains(files["errors.txt"], part+": ") || !strings.Contains(files["errors.txt"], want) {
			t.Errorf("errors.txt does not say of %s that %s:\n%s", part, want, files["errors.txt"])
		}
	}
	if m.Of != "cluster" || len(m.Failed) == 0 {
		t.Errorf("%+v", m)
	}
	o.Nodes, o.NodeTimeout = []string{"n2"}, 10*time.Millisecond
	if files, _, err = gather(o); err != nil || !strings.Contains(files["errors.txt"], "nodes/n2: not done: it took longer than it may") || files["cluster/version.json"] == "" {
		t.Errorf("of a node that does not answer: %v\n%s", err, files["errors.txt"])
	}
	o.Nodes, o.NodeTimeout = []string{"n1"}, time.Minute
	if files, _, err = gather(o); err != nil || files["nodes/n1/manifest.json"] == "" || files["nodes/n3/agent/status.json"] != "" || files["logs/agent-n2/agent-current.log"] != "" {
		t.Errorf("of one node: %v", err)
	}
	o.Nodes = []string{"n9"}
	if _, _, err = gather(o); err == nil || !strings.Contains(err.Error(), `no node "n9"`) {
		t.Errorf("of a node that is none: %v", err)
	}
}
