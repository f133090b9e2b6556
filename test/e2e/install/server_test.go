//go:build e2e

package install

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"portcullis/test/e2e/cluster"
)

// patience bounds everything that is waited for; nothing fails for being slow.
const patience = 3 * time.Minute

const adminToken = "admin-of-the-test"

// server is a control plane.
type server struct {
	url, kubeconfig, dir string
	client               *http.Client
}

// startServer starts a control plane that ends with the test.
func startServer(t *testing.T) *server {
	t.Helper()
	root, err := cluster.ModuleRoot(t.Context())
	must(t, err)
	parts, err := cluster.Build(t.Context(), root, os.Stderr)
	must(t, err)
	dir := t.TempDir()
	ports := freePorts(t, 3)
	s := &server{dir: dir, url: fmt.Sprintf("https://127.0.0.1:%d", ports[2]), kubeconfig: filepath.Join(dir, "kubeconfig"),
		// The test's own server, made a moment ago, with a certificate of its own.
		client: &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: patience}}
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		must(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	file("kubeconfig", fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"+
		"clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]\nusers: [{name: u, user: {token: %s}}]\n", s.url, adminToken))
	tokens := file("tokens", adminToken+",admin,admin,system:masters\n")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	private := file("sa.key", string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})))
	etcd, peer := fmt.Sprintf("http://127.0.0.1:%d", ports[0]), fmt.Sprintf("http://127.0.0.1:%d", ports[1])
	program := func(name string) string { return filepath.Join(parts.Kubernetes, name) }
	s.start(t, program("etcd"), "--data-dir="+filepath.Join(dir, "etcd"), "--listen-client-urls="+etcd, "--advertise-client-urls="+etcd,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer, "--unsafe-no-fsync", "--log-level=error")
	s.start(t, program("kube-apiserver"), "--etcd-servers="+etcd, "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", ports[2]),
		"--endpoint-reconciler-type=none", "--authorization-mode=RBAC", "--allow-privileged=true", "--token-auth-file="+tokens, "--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+private, "--service-account-signing-key-file="+private, "--service-cluster-ip-range=10.96.0.0/16",
		"--cert-dir="+filepath.Join(dir, "apiserver"), "--v=0")
	s.eventually(t, func() error { return s.ask(http.MethodGet, "/readyz", nil, nil) })
	s.start(t, program("kube-controller-manager"), "--kubeconfig="+s.kubeconfig, "--service-account-private-key-file="+private, "--leader-elect=false", "--secure-port=0",
		"--controllers=daemonset-controller,deployment-controller,replicaset-controller,garbage-collector-controller,namespace-controller,serviceaccount-controller", "--v=0")
	s.start(t, program("kube-scheduler"), "--kubeconfig="+s.kubeconfig, "--leader-elect=false", "--secure-port=0", "--v=0")
	return s
}

func freePorts(t *testing.T, n int) (ports []int) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer l.Close()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports
}

// start starts a program that dies with the test, however that ends.
func (s *server) start(t *testing.T, program string, args ...string) {
	t.Helper()
	log, err := os.Create(filepath.Join(s.dir, filepath.Base(program)+".log"))
	must(t, err)
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
		log.Close()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%s: %s", filepath.Base(program), b[max(0, len(b)-2000):])
		}
	})
}

// ask sends a request to the API server and decodes the answer.
func (s *server) ask(method, path string, body, answer any) error {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(b)
	}
	req, err := http.NewRequest(method, s.url+path, in)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+adminToken)
	req.Header.Set("Content-Type", "application/json")
	if method == http.MethodPatch {
		req.Header.Set("Content-Type", "application/merge-patch+json")
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return &refused{resp.StatusCode, fmt.Sprintf("%s %s: %s: %s", method, path, resp.Status, b)}
	}
	if answer != nil {
		return json.Unmarshal(b, answer)
	}
	return nil
}

// refused is an answer of the API server.
type refused struct {
	code int
	text string
}

func (r *refused) Error() string { return r.text }

// there reports whether an object exists.
func (s *server) there(t *testing.T, path string) bool {
	t.Helper()
	err := s.ask(http.MethodGet, path, nil, nil)
	var r *refused
	if errors.As(err, &r) && r.code == http.StatusNotFound {
		return false
	}
	must(t, err)
	return true
}

func (s *server) eventually(t *testing.T, f func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("not in time: %v", err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
