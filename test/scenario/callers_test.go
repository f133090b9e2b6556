package scenario

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
	"portcullis/datapath"
)

const alsoToMain = `
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: server-main}
spec:
  endpointSelector: {matchLabels: {app: server}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "5000", protocol: ANY}]}]
`

// callers is a cgroup for the processes of one test, so that agents see no
// others.
type callers struct {
	w      *world
	cgroup string
}

// seenCgroup makes it; the flags for the agents that look at it.
func seenCgroup(t *testing.T) (dir string, flags []string) {
	t.Helper()
	needRoot(t)
	root, err := datapath.Cgroup2()
	if errors.Is(err, datapath.ErrNoCgroup2) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(root, fmt.Sprintf("portcullis-scenario-%d-%d", os.Getpid(), serial.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir, []string{"--processes", "--process-arguments", "--process-cgroup", dir}
}

// run runs a command in a workload and that cgroup, and returns its pid; it has
// ended by then.
func (c *callers) run(ctx context.Context, workload string, argv ...string) (pid int, err error) {
	var out, errs bytes.Buffer
	code, err := c.w.Exec(ctx, workload, append([]string{"sh", "-c", `echo $$ >"$0/cgroup.procs" && echo $$ && cd / && exec "$@"`, c.cgroup}, argv...), lab.Streams{Out: &out, Err: &errs})
	if err == nil && code != 0 {
		err = fmt.Errorf("%v: exit %d: %s", argv, code, &errs)
	}
	if _, serr := fmt.Sscan(out.String(), &pid); err == nil {
		err = serr
	}
	return pid, err
}

// told is one line of `observe -o process`.
type told struct {
	Connect, Accept *opened
}

type opened struct {
	Process struct {
		PID                    int
		Binary, CWD, Arguments string
		UID                    *uint32
		ExecID                 string `json:"exec_id"`
		Start                  string `json:"start_time"`
	}
	Source      netip.Addr `json:"source_ip"`
	Destination netip.Addr `json:"destination_ip"`
	SourcePort  uint16     `json:"source_port"`
	Port        uint16     `json:"destination_port"`
	Protocol    string
	Verdict     string
}

func (t *told) UnmarshalJSON(b []byte) error {
	var fields map[string]json.RawMessage
	err := json.Unmarshal(b, &fields)
	for name, to := range map[string]any{"process_connect": &t.Connect, "process_accept": &t.Accept} {
		if raw := fields[name]; err == nil && raw != nil {
			err = json.Unmarshal(raw, to)
		}
	}
	return err
}

// observed asks a node's agent for all that it keeps.
func (w *world) observed(node string, flags ...string) (out []told, err error) {
	cmd := exec.Command(program, append([]string{"--socket", w.Socket(node), "observe", "--all", "-o", "process"}, flags...)...)
	cmd.Stderr = os.Stderr
	text, err := cmd.Output()
	for line := range strings.Lines(string(text)) {
		var x told
		if err == nil {
			err = json.Unmarshal([]byte(line), &x)
		}
		out = append(out, x)
	}
	return out, err
}

func written(all []told) string {
	b, _ := json.Marshal(all)
	return string(b)
}

// named makes the program under another name.
func named(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.Link(program, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// impostor runs a server in a network namespace of its own that has the addresses
// of a workload, until the test ends; it listens when this returns.
func (c *callers) impostor(t *testing.T, binary string, port uint16, ips ...netip.Addr) {
	t.Helper()
	cgroup, err := os.Open(c.cgroup)
	c.w.must(err)
	defer cgroup.Close()
	cmd := exec.Command(binary, "probe", "helloworld", "--addr", fmt.Sprint(":", port))
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- func() error {
			ns, err := netns.New()
			if err != nil {
				return err
			}
			defer ns.Close()
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			for _, ip := range ips {
				err = errors.Join(err, netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}, Flags: unix.IFA_F_NODAD}))
			}
			if err := errors.Join(err, netlink.LinkSetUp(lo), cmd.Start()); err != nil {
				return err
			}
			for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
				conn, err := net.Dial("tcp", netip.AddrPortFrom(ips[0], port).String()) // a socket of this thread
				if err == nil {
					return conn.Close()
				}
				if time.Now().After(deadline) {
					return err
				}
			}
		}()
	}()
	err = <-done
	t.Cleanup(func() {
		if cmd.Process != nil {
			cmd.Process.Kill() //nolint:errcheck // it may have ended
			cmd.Wait()         //nolint:errcheck // it was killed
		}
	})
	c.w.must(err)
}

// TestWhichProcess: of the real packets of real processes, who opened and who
// accepted is told at either end: by TCP and UDP, by both families, of two
// processes in one namespace, and of ones that have ended.
func TestWhichProcess(t *testing.T) {
	dir, flags := seenCgroup(t)
	w := newWorld(t, func(c *lab.Config) { c.AgentFlags = append(c.AgentFlags, flags...) })
	c := &callers{w: w, cgroup: dir}
	w.must(w.ImportPoliciesAt(t.Context(), verifier, &api.PolicyFile{Name: "main.yaml", Content: []byte(alsoToMain)}))
	server, first, second := named(t, "the-server"), named(t, "first"), named(t, "second")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		c.run(ctx, "server", server, "probe", "helloworld", "--addr", ":5000") //nolint:errcheck // it is killed
	}()
	defer func() { stop(); <-done }()

	to := map[string]string{"4": netip.AddrPortFrom(w.server.IP4(), 5000).String(), "6": netip.AddrPortFrom(w.server.IP6(), 5000).String()}
	pids := map[string]int{} // by protocol, family and binary
	for family, at := range to {
		for proto, argv := range map[string][]string{
			"TCP": {first, "probe", "get", "--timeout", "20s", "http://" + at + "/hello"},
			"UDP": {second, "probe", "udp", "--count", "1", at},
		} {
			w.eventually("an answer by "+proto+family, func() (err error) {
				pids[proto+family], err = c.run(t.Context(), "client", argv...)
				return err
			})
		}
	}
	ip := map[string][2]netip.Addr{"4": {w.client.IP4(), w.server.IP4()}, "6": {w.client.IP6(), w.server.IP6()}}
	for what, pid := range pids {
		proto, ends := what[:3], ip[what[3:]]
		binary := map[string]string{"TCP": first, "UDP": second}[proto]
		w.eventually("who opened "+what, func() error {
			all, err := w.observed(owner, "--process", filepath.Base(binary))
			for _, x := range all {
				if o := x.Connect; o != nil && o.Process.PID == pid && o.Process.Binary == binary && o.Protocol == proto && o.Source == ends[0] && o.Destination == ends[1] && o.Port == 5000 &&
					o.SourcePort != 0 && o.Process.CWD == "/" && strings.HasPrefix(o.Process.Arguments, binary+" probe ") && o.Process.UID != nil && o.Process.ExecID != "" && o.Process.Start != "" {
					return err
				}
			}
			return errors.Join(err, fmt.Errorf("process %d (%s) is not in %s", pid, binary, written(all)))
		})
		w.eventually("who accepted "+what, func() error {
			all, err := w.observed(verifier)
			for _, x := range all {
				if a := x.Accept; a != nil && a.Process.Binary == server && a.Protocol == proto && a.Source == ends[0] && a.Destination == ends[1] && a.Port == 5000 && a.Verdict == "FORWARDED" {
					return err
				}
			}
			return errors.Join(err, fmt.Errorf("%s is not in %s", server, written(all)))
		})
	}
	// Nobody else's: each is told with its own binary.
	all, err := w.observed(owner)
	w.must(err)
	for _, x := range all {
		if o := x.Connect; o != nil && o.Process.Binary != map[string]string{"TCP": first, "UDP": second}[o.Protocol] {
			t.Errorf("%s by %s", o.Protocol, o.Process.Binary)
		}
	}

	// Another process listens on the same addresses and port, in a namespace of its
	// own: it has accepted none of this, and accepts none of what follows.
	impostor := named(t, "impostor")
	c.impostor(t, impostor, 5000, w.server.IP4(), w.server.IP6())
	notThe := func(when string) {
		all, err := w.observed(verifier)
		w.must(err)
		for _, x := range all {
			if a := x.Accept; a != nil && a.Process.Binary == impostor {
				t.Errorf("%s: accepted by %s: %+v", when, impostor, a)
			}
		}
	}
	_, err = c.run(t.Context(), "client", first, "probe", "get", "--timeout", "20s", "http://"+to["4"]+"/hello")
	w.must(err)
	notThe("with another one of these addresses")

	// An agent that comes after the server finds it.
	w.kill(verifier)
	w.start(verifier)
	for family, at := range to {
		w.eventually("an answer after the agent's restart by IPv"+family, func() error {
			_, err := c.run(t.Context(), "client", first, "probe", "get", "--timeout", "20s", "http://"+at+"/hello")
			return err
		})
		w.eventually("who accepted after the agent's restart by IPv"+family, func() error {
			all, err := w.observed(verifier)
			for _, x := range all {
				if a := x.Accept; a != nil && a.Process.Binary == server && a.Destination == ip[family][1] && strings.HasPrefix(a.Process.Arguments, server+" probe ") {
					return err
				}
			}
			return errors.Join(err, fmt.Errorf("%s is not in %s", server, written(all)))
		})
	}
	notThe("after the agent's restart")
}
