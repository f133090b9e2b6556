package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/version"

	"portcullis/agent/api"
	"portcullis/agent/kube"
	"portcullis/datapath/doctor"
)

// frame is a message as a server of WebSocket sends it, in two fragments with
// a ping between them.
func frame(stream byte, text string) []byte {
	part := func(op byte, payload []byte) []byte {
		head := []byte{op, byte(len(payload))}
		if n := len(payload); n > 125 {
			head = []byte{op, 126, byte(n >> 8), byte(n)}
		}
		return append(head, payload...)
	}
	whole := append([]byte{stream}, text...)
	half := len(whole) / 2
	return bytes.Join([][]byte{part(2, whole[:half]), part(0x80|9, []byte("ping")), part(0x80, whole[half:])}, nil)
}

// clusterOf serves what Status and Checks ask, with these lists; a pod named
// agent-NODE answers the status of that node, or refuses.
func clusterOf(t *testing.T, nodes []corev1.Node, pods []corev1.Pod, agents map[string]*api.StatusResponse) *Cluster {
	t.Helper()
	mux := http.NewServeMux()
	reply := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			if err := json.NewEncoder(w).Encode(v); err != nil {
				t.Error(err)
			}
		}
	}
	mux.HandleFunc("GET /api/v1/nodes", reply(map[string]any{"apiVersion": "v1", "kind": "NodeList", "items": nodes}))
	mux.HandleFunc("GET /api/v1/namespaces/net/pods", reply(map[string]any{"apiVersion": "v1", "kind": "PodList", "items": pods}))
	mux.HandleFunc("GET /apis/apps/v1/namespaces/net/daemonsets/portcullis-agent", reply(map[string]any{"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": map[string]any{"name": agentName}}))
	mux.HandleFunc("GET /api/v1/namespaces/net/pods/{pod}/exec", func(w http.ResponseWriter, r *http.Request) {
		if got := fmt.Sprintf("%s %s %s", r.URL.Query()["command"], r.Header.Get("Authorization"), r.Header.Get("Sec-Websocket-Protocol")); got != "[/portcullis status -o json] Bearer secret v4.channel.k8s.io" {
			t.Errorf("asked by %s", got)
		}
		s := agents[strings.TrimPrefix(r.PathValue("pod"), "agent-")]
		if s == nil {
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, `{"kind":"Status","message":"you may not create pods/exec"}`) //nolint:errcheck // a test's
			return
		}
		b, err := protojson.Marshal(s)
		if err != nil {
			t.Error(err)
		}
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n") //nolint:errcheck // a test's
		result := `{"status":"Success"}`
		if !s.Healthy {
			result = `{"status":"Failure","message":"command terminated with exit code 1"}`
		}
		for _, f := range [][]byte{frame(1, ""), frame(1, string(b[:len(b)/2])), frame(2, "a warning"), frame(1, string(b[len(b)/2:])), frame(3, result)} {
			conn.Write(f) //nolint:errcheck // a test's
		}
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	return connectTo(t, server.URL)
}

// connectTo connects to a server of the test.
func connectTo(t *testing.T, url string) *Cluster {
	t.Helper()
	path := filepath.Join(t.TempDir(), "config")
	text := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\n"+
		"clusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]\nusers: [{name: u, user: {token: secret}}]\n", url)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Connect(Access{Kubeconfig: path}, "net")
	if err != nil {
		t.Fatal(err)
	}
	c.every, c.answer = time.Millisecond, time.Minute // no test fails because something was slow
	return c
}

func aNode(name, cidr, kernel string) (n corev1.Node) {
	n.Name = name
	if cidr != "" {
		n.Spec.PodCIDRs = strings.Fields(cidr)
	}
	n.Status.NodeInfo.KernelVersion = kernel
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
	return n
}

func agentPod(node string, ready bool, state corev1.ContainerStatus) (p corev1.Pod) {
	p.Name, p.Spec.NodeName = "agent-"+node, node
	p.Labels = map[string]string{nameLabel: agentName, partOf: product}
	p.Spec.Containers = []corev1.Container{{Name: "agent", Image: "portcullis:dev"}}
	state.Name = "agent"
	p.Status.ContainerStatuses = []corev1.ContainerStatus{state}
	if ready {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}
	return p
}

func TestStatusOfACluster(t *testing.T) {
	runs := corev1.ContainerStatus{Ready: true, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	crashed := corev1.ContainerStatus{RestartCount: 7, State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, Message: "first\nportcullis: the programs need tcx\n"}}}
	pulls := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ImagePullBackOff", Message: "no such image"}}}
	creates := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ContainerCreating"}}}
	var nodes []corev1.Node
	for i := range 8 {
		nodes = append(nodes, aNode(fmt.Sprintf("n%d", i+1), "", "6.12"))
	}
	nodes[7].Labels = map[string]string{kube.UnmanagedLabel: "true"}
	long := strings.Repeat("x", 300) // a frame whose length takes two bytes more
	agents := map[string]*api.StatusResponse{
		"n1": {Healthy: true, Node: "n1", Version: "v1", EvidenceMode: "lease", Endpoints: 3, Sessions: 4, SessionsUp: 4, Policies: 2, Alarms: []*api.Alarm{{Name: "policy-refused", Text: long, Count: 2}}},
		"n2": {Node: "n2", Version: "v1", Problems: []string{"no SVID yet"}},
	}
	pods := []corev1.Pod{agentPod("n1", true, runs), agentPod("n2", false, runs), agentPod("n3", true, runs), agentPod("n4", false, crashed), agentPod("n5", false, pulls), agentPod("n6", false, creates)}
	s, err := clusterOf(t, nodes, pods, agents).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []struct{ state, problem string }{
		{StateOK, ""}, {StateProblems, "no SVID yet"}, {StateNoAnswer, "you may not create pods/exec"},
		{StateFailing, "does not start (CrashLoopBackOff): back-off; ended with status 1: first | portcullis: the programs need tcx; what an agent before it put into the kernel goes on judging"},
		{StateFailing, "ImagePullBackOff): no such image"}, {StateStarting, "starts"}, {StateNoAgent, "owner-unreachable"}, {StateUnmanaged, ""},
	} {
		n := s.Nodes[i]
		problems := strings.Join(n.Problems, "; ")
		if n.State != want.state || !strings.Contains(problems, want.problem) || (want.problem == "") != (problems == "") {
			t.Errorf("%s is %s, %s; want %s, %s", n.Name, n.State, problems, want.state, want.problem)
		}
	}
	if n := s.Nodes[0]; n.Version != "v1" || n.Endpoints != 3 || n.SessionsUp != 4 || len(n.Alarms) != 1 || n.Alarms[0].Text != long {
		t.Errorf("%+v", n)
	}
	if s.Healthy || s.Nodes[3].Restarts != 7 {
		t.Errorf("%+v", s)
	}
	s, err = clusterOf(t, nodes[:1], pods[:1], agents).Status(t.Context())
	if err != nil || !s.Healthy {
		t.Errorf("%+v, %v", s, err)
	}
}

func readExec(t *testing.T, r io.Reader) ([]byte, error) {
	return io.ReadAll(&execStream{ctx: t.Context(), r: r, most: maxExec, left: maxExec})
}

// What a server sends that is no answer ends with an error, and soon.
func TestReadExecRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing": "", "half a head": "\x82", "half a frame": "\x82\x05\x01ab", "masked": "\x82\x85\x01abcdefgh", "closed": "\x88\x00",
		"too long": "\x82\x7f\x7f\xff\xff\xff\xff\xff\xff\xff", "no JSON": "\x82\x02\x03{",
	} {
		if out, err := readExec(t, strings.NewReader(text)); err == nil {
			t.Errorf("%s: %q", name, out)
		}
	}
	endless := io.MultiReader(strings.NewReader(strings.Repeat("\x82\x7e\xff\xff"+strings.Repeat("\x01", 0xffff), maxExec/0xffff+2)))
	if _, err := readExec(t, endless); err == nil || !strings.Contains(err.Error(), "longer than") {
		t.Errorf("endless: %v", err)
	}
}

func TestChecksOfNodes(t *testing.T) {
	without := aNode("n2", "", "6.12.1")
	unmanaged := aNode("n3", "", "6.12.1")
	unmanaged.Labels = map[string]string{kube.UnmanagedLabel: "true"}
	away := aNode("n4", "10.0.4.0/24", "6.12")
	away.Status.Conditions = nil
	windows := aNode("n5", "10.0.5.0/24", "10.0.17763.1")
	windows.Status.NodeInfo.OperatingSystem = "windows"
	old := aNode("n6", "", "5.15.0")
	old.Labels = unmanaged.Labels
	good := aNode("n1", "10.0.1.0/24 fd00:1::/64", "6.6.0-generic")
	for name, c := range map[string]struct {
		check doctor.Check
		want  doctor.Status
		say   string
	}{
		"good":            {checkRanges([]corev1.Node{good, unmanaged}), doctor.OK, "2 ranges"},
		"one without":     {checkRanges([]corev1.Node{good, without}), doctor.Warn, "n2"},
		"all without":     {checkRanges([]corev1.Node{without}), doctor.Fail, "no node has"},
		"overlap":         {checkRanges([]corev1.Node{good, aNode("n9", "10.0.0.0/16", "6.6")}), doctor.Fail, "overlap"},
		"no prefix":       {checkRanges([]corev1.Node{aNode("n9", "10.0.0.0", "6.6")}), doctor.Fail, "n9: 10.0.0.0"},
		"kernels":         {checkKernels([]corev1.Node{good, aNode("n9", "", "7.0")}), doctor.OK, "Linux 6.6, 7.0"},
		"old kernel":      {checkKernels([]corev1.Node{good, aNode("n9", "", "6.5.13-xyz"), aNode("n8", "", "5.15")}), doctor.Fail, "n9 (6.5.13-xyz), n8 (5.15)"},
		"old, left out":   {checkKernels([]corev1.Node{good, old}), doctor.Warn, "n6 (5.15.0)"},
		"server":          {checkServer(version.Info{Major: "1", Minor: "28+", GitVersion: "v1.28.3-gke.1"}, nil), doctor.OK, "v1.28.3-gke.1"},
		"old server":      {checkServer(version.Info{Major: "1", Minor: "27", GitVersion: "v1.27.1"}, nil), doctor.Fail, "v1.27.1"},
		"silent server":   {checkServer(version.Info{}, errors.New("no")), doctor.Warn, "not told"},
		"unknown kernel":  {checkKernels([]corev1.Node{aNode("n9", "", "")}), doctor.Warn, "n9"},
		"nodes":           {checkNodes([]corev1.Node{good}), doctor.OK, "1 nodes"},
		"no nodes":        {checkNodes(nil), doctor.Warn, "no nodes"},
		"one is away":     {checkNodes([]corev1.Node{good, away}), doctor.Warn, "n4"},
		"one is no Linux": {checkNodes([]corev1.Node{good, windows}), doctor.Warn, "not Linux: n5"},
	} {
		if c.check.Status != c.want || !strings.Contains(c.check.What, c.say) || (c.want == doctor.OK) != (c.check.Why == "" && c.check.Do == "") {
			t.Errorf("%s: %+v", name, c.check)
		}
	}
}
