package sysdump

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"portcullis/datapath"
	"portcullis/ipcache/journal"
	"portcullis/observe/archive"
	"portcullis/observe/redact"
)

func (c *Config) versions(_ context.Context, out *archive.Files) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	text := func(path string) string {
		b, _ := read(path) // "": not told here
		return strings.TrimSpace(string(b))
	}
	return out.JSON("versions.json", map[string]any{
		"program": c.Program, "go": runtime.Version(), "architecture": runtime.GOARCH, "cpus": runtime.NumCPU(),
		"kernel":       unix.ByteSliceToString(u.Release[:]),
		"kernelBuild":  unix.ByteSliceToString(u.Version[:]),
		"host":         unix.ByteSliceToString(u.Nodename[:]),
		"distribution": text(hostRoot() + "/etc/os-release"), "ownDistribution": text("/etc/os-release"),
		"bootId": text("/proc/sys/kernel/random/boot_id"), "uptime": text("/proc/uptime"), "load": text("/proc/loadavg"),
		"memory": text("/proc/meminfo"), "kernelCommandLine": text("/proc/cmdline"), "time": time.Now().UTC(),
	})
}

// config is what the agent was told, and by whom.
func (c *Config) config(_ context.Context, out *archive.Files) error {
	var errs []error
	if c.Agent != nil {
		args, _ := redact.Args(c.Agent.Args)
		env := map[string]string{}
		for name, value := range c.Agent.Env {
			if strings.HasPrefix(name, "PORTCULLIS_") || name == "NODE_NAME" || strings.HasPrefix(name, "GO") {
				env[name] = value
			}
		}
		errs = append(errs, out.JSON("config/agent.json", map[string]any{"pid": c.Agent.PID, "args": args, "environment": env,
			"otherVariables": others(c.Agent.Env, env), "ownFiles": c.Agent.OwnFiles, "ownNetwork": c.Agent.OwnNetwork}))
	} else {
		out.Note("no agent runs: these are the settings that one would start with here (%v)", c.AgentProblem)
	}
	if c.Settings != nil {
		errs = append(errs, out.Text("config/settings.yaml", string(c.Settings)))
	}
	for name, path := range map[string]string{"config/agent.yaml": c.ConfigFile, "config/export.yaml": c.ExportConfig} {
		if path == "" {
			continue
		}
		b, err := read(c.Agent.path(path))
		if errors.Is(err, fs.ErrNotExist) && name == "config/agent.yaml" {
			out.Note("there is no %s", path)
			continue
		}
		if err == nil {
			err = out.YAML(name, b)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// hostRoot is where the files of the node's first process are, if they are not
// this one's own: who gathers may be in a container, and the node outside of it.
func hostRoot() string {
	if _, err := os.ReadDir("/proc/1/root/etc"); err != nil || same("/proc/1/ns/mnt", "/proc/self/ns/mnt") {
		return ""
	}
	return "/proc/1/root"
}

// others are the names of variables whose values are nobody's business.
func others(all, told map[string]string) []string {
	var out []string
	for name := range all {
		if _, is := told[name]; !is {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// audit is the end of the confirmation log.
func (c *Config) audit(_ context.Context, out *archive.Files) error {
	return tail(out, "confirmations.jsonl", c.Agent.path(c.AuditLog), auditBytes)
}

// tail puts in the last lines of a file, so many bytes of them.
func tail(out *archive.Files, name, path string, most int64) error {
	f, err := os.Open(path)
	if err != nil {
		return notHere(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	from := max(0, info.Size()-most)
	b := make([]byte, info.Size()-from)
	n, err := f.ReadAt(b, from)
	if err != nil && !errors.Is(err, io.EOF) { // it may have been cut off meanwhile
		return err
	}
	b = b[:n]
	if from > 0 {
		// What begins in the middle of a line, or of a key, is not shown.
		_, b, _ = bytes.Cut(b, []byte("\n"))
		out.Note("%s: the last %s of %s", path, archive.Size(int64(len(b))), archive.Size(info.Size()))
	}
	return out.Copy(name, bytes.NewReader(b))
}

// logs finds where the agent's log goes.
func (c *Config) logs(ctx context.Context, out *archive.Files) error {
	if c.Agent == nil {
		return journald(ctx, out, c.Logs, "-u", "portcullis", "-u", "portcullis-agent")
	}
	to, err := os.Readlink(c.Agent.proc("fd/2"))
	if err != nil {
		return err
	}
	switch {
	case strings.HasPrefix(to, "/") && !strings.HasPrefix(to, "/dev/"):
		return tail(out, "agent.log", c.Agent.proc("fd/2"), c.Logs)
	case strings.HasPrefix(to, "socket:"):
		return journald(ctx, out, c.Logs, fmt.Sprintf("_PID=%d", c.Agent.PID))
	}
	return archive.NotHere("the agent's log goes to %s, where only who started it can read it; of a pod, `kubectl logs` or `portcullis sysdump --cluster` has it", to)
}

func journald(ctx context.Context, out *archive.Files, most int64, which ...string) error {
	b, err := command(ctx, most, "journalctl", append([]string{"--no-pager", "-o", "short-iso-precise", "-n", "20000"}, which...)...)
	if err != nil {
		return err
	}
	return out.Copy("agent.log", bytes.NewReader(b))
}

// command runs a program of the node's; one that is not installed is nothing to
// gather. Of what it says the end is kept.
func command(ctx context.Context, most int64, name string, args ...string) ([]byte, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, archive.NotHere("there is no %s here", name)
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	said, complaint := archive.Tail{Most: most}, archive.Tail{Most: mostComplaint}
	cmd.Stdout, cmd.Stderr = &said, &complaint
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w: %.300s", name, strings.Join(args, " "), err, bytes.TrimSpace(complaint.Bytes()))
	}
	return said.Bytes(), nil
}

// mostComplaint bounds what a program's errors take, in bytes.
const mostComplaint = 4096

// process is what the kernel says of the agent's process.
func (c *Config) process(_ context.Context, out *archive.Files) error {
	if c.Agent == nil {
		return archive.NotHere("no agent runs")
	}
	var errs []error
	for _, name := range []string{"status", "limits", "cgroup", "io", "sched", "oom_score_adj"} {
		b, err := read(c.Agent.proc(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = out.Text("process/"+name+".txt", string(b))
		}
		errs = append(errs, err)
	}
	open := map[string]int{}
	fds, err := os.ReadDir(c.Agent.proc("fd"))
	for _, fd := range fds {
		to, err := os.Readlink(filepath.Join(c.Agent.proc("fd"), fd.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		kind, _, _ := strings.Cut(to, ":[")
		open[kind]++
	}
	return errors.Join(append(errs, err, out.JSON("process/open.json", open))...)
}

func (c *Config) objects(ctx context.Context, out *archive.Files) error {
	pinned, err := datapath.PinnedObjects(ctx, c.Agent.path(c.PinDir))
	if errors.Is(err, fs.ErrNotExist) {
		out.Note("nothing is pinned in %s", c.PinDir)
		err = nil
	}
	programs, links, all := datapath.AllObjects(ctx)
	return errors.Join(err, all, out.JSON("bpf/pinned.json", pinned), out.JSON("bpf/programs.json", programs), out.JSON("bpf/links.json", links))
}

func (c *Config) maps(ctx context.Context, out *archive.Files) error {
	dir := c.Agent.path(c.PinDir)
	if _, err := os.Stat(filepath.Join(dir, "maps")); err != nil {
		return notHere(err)
	}
	var problems []error
	for _, m := range datapath.DumpMaps(ctx, dir, mostLooked, mostShown) {
		if m.Problem != "" && !strings.Contains(m.Problem, "no such file") {
			problems = append(problems, fmt.Errorf("%s: %s", m.Map, m.Problem))
		}
		problems = append(problems, out.JSON("bpf/maps/"+m.Map+".json", m))
	}
	return errors.Join(problems...)
}

// journal tells of the journal's state, and of no record.
func (c *Config) journal(_ context.Context, out *archive.Files) error {
	dir := c.Agent.path(c.JournalDir)
	info, err := journal.Inspect(dir)
	files := map[string][]listed{}
	for name, d := range map[string]string{"journal": dir, "state": c.Agent.path(c.StateDir), "proxy": c.Agent.path(c.ProxyDir)} {
		files[name] = list(d)
	}
	said := out.JSON("journal.json", map[string]any{"directory": c.JournalDir, "knownFormat": journal.Format, "journal": info, "files": files})
	if errors.Is(err, fs.ErrNotExist) {
		out.Note("%v", err)
		err = nil
	}
	return errors.Join(err, said)
}

// listed is a file of which nothing but its being there is told.
type listed struct {
	Name     string    `json:"name"`
	Mode     string    `json:"mode"`
	Bytes    int64     `json:"bytes"`
	Modified time.Time `json:"modified"`
}

func list(dir string) (out []listed) {
	entries, _ := os.ReadDir(dir) // none: told as an empty list
	for _, e := range entries[:min(len(entries), 1000)] {
		if info, err := e.Info(); err == nil {
			out = append(out, listed{e.Name(), info.Mode().String(), info.Size(), info.ModTime().UTC()})
		}
	}
	return out
}

// cni is the network configurations, and which plugins there are.
func (c *Config) cni(_ context.Context, out *archive.Files) error {
	dir := c.Agent.path(c.CNIConfDir)
	if c.CNIConfDir == "" {
		dir = hostRoot() + "/etc/cni/net.d"
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return notHere(err)
	}
	var errs []error
	for _, e := range entries[:min(len(entries), 64)] {
		if !e.Type().IsRegular() {
			continue
		}
		b, err := read(filepath.Join(dir, e.Name()))
		switch {
		case err != nil:
		case json.Valid(b):
			err = out.JSON("cni/"+e.Name(), json.RawMessage(b))
		default: // also kubeconfigs, which plugins keep there
			err = out.YAML("cni/"+e.Name(), b)
		}
		errs = append(errs, err)
	}
	return errors.Join(append(errs, out.JSON("cni.json", map[string]any{"directory": dir, "files": list(dir)}))...)
}

// sorted writes "name: value" lines by name.
func sorted(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		fmt.Fprintf(&b, "%s = %s\n", k, m[k])
	}
	return b.String()
}
