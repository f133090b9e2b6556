package scenario

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// agentProcess is an agent that the lab does not know of.
type agentProcess struct {
	w   *world
	cmd *exec.Cmd
	log string
	end func()
}

// again starts the verifier's agent a second time, as a running one was.
func (w *world) again(pid int) *agentProcess {
	w.t.Helper()
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	w.must(err)
	argv := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	p := &agentProcess{w: w, log: filepath.Join(w.t.TempDir(), "log")}
	f, err := os.Create(p.log)
	w.must(err)
	defer f.Close()
	w.must(w.InNode(verifier, func() error {
		p.cmd = exec.Command(argv[0], argv[1:]...)
		p.cmd.Stdout, p.cmd.Stderr = f, f
		return p.cmd.Start()
	}))
	ended := false
	p.end = func() {
		if !ended {
			ended = true
			p.cmd.Process.Signal(unix.SIGKILL)
			p.cmd.Wait()
		}
	}
	w.t.Cleanup(p.end)
	return p
}

// says waits until a word stands in the agent's log.
func (p *agentProcess) says(word string) {
	p.w.t.Helper()
	p.w.eventually("the agent says: "+word, func() error {
		b, err := os.ReadFile(p.log)
		if err == nil && !bytes.Contains(b, []byte(word)) {
			err = fmt.Errorf("it says: %s", b)
		}
		return err
	})
}
