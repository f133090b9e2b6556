package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/identity"
)

// Installation is the plugin's place on a node: its binary, and its entry in
// the network configuration that the container runtime uses. The zero does
// nothing.
type Installation struct {
	BinDir  string // directory of plugins; empty: the binary is not put anywhere
	ConfDir string // directory of network configurations; empty: they are left alone
	// Program is what is copied; empty: the running program.
	Program string

	// What the entry tells the plugin, in the node's own paths.
	Socket string
	PinDir string

	Log *zap.Logger
	// Tell notes a problem that an operator must know of, under its name; an empty
	// text: it is over. May be nil.
	Tell func(problem, text string)
}

// Problems that Tell is told of.
const (
	ProblemPlace = "cni-plugin"
	ProblemPods  = "pods-unenforced"
)

// How often Run looks, though it was told of no change, and how long it waits
// after an agent that did not answer or a step that failed.
const (
	installEvery = 10 * time.Second
	installRetry = time.Second
)

// Run puts the plugin in place when the agent answers, and again whenever it
// is lost: another program may write the network configuration anew. Pods that
// run and that the plugin did not register are registered. It returns
// when ctx ends and leaves everything where it is, so that no workload starts
// unenforced while an agent restarts; Remove takes it away. One goroutine.
func (i Installation) Run(ctx context.Context) error {
	if i.BinDir == "" && i.ConfDir == "" {
		<-ctx.Done()
		return nil
	}
	// Not before the agent can serve: the first installation must not stop
	// workloads that an agent which never comes up would have to admit.
	if !i.awaitAgent(ctx) {
		return nil
	}
	changes, stop, err := watch(ctx, i.ConfDir, i.BinDir)
	if err != nil {
		// Seen later, but seen.
		i.Log.Warn("watch the directories of the network configuration", zap.Error(err))
	}
	defer stop()
	sweepBeside(i.BinDir, i.ConfDir)
	told, toldOf := "", map[identity.UID]string{}
	for {
		wait := installEvery
		if err := i.Put(); err != nil {
			if text := err.Error(); text != told {
				i.Log.Error("the CNI plugin is not in place: workloads that start now are not registered by it", zap.Error(err))
				i.tell(ProblemPlace, "the CNI plugin is not in place, so workloads that start now are enforced some seconds later only, when they are found: "+text)
				told = text
			}
			wait = installRetry
		} else if told != "" {
			i.Log.Info("the CNI plugin is in place")
			i.tell(ProblemPlace, "")
			told = ""
		}
		// After the plugin is there, so that whoever starts meanwhile is one
		// of the two's.
		if err := i.adopt(ctx, toldOf); err != nil {
			wait = installRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
		case <-time.After(wait):
		}
	}
}

func (i Installation) tell(problem, text string) {
	if i.Tell != nil {
		i.Tell(problem, text)
	}
}

// With runs an agent, and Run beside it, and returns when both have ended.
func (i Installation) With(ctx context.Context, agent func(context.Context) error) error {
	beside, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- i.Run(beside) }()
	err := agent(ctx)
	stop()
	return errors.Join(err, <-done)
}

func (i Installation) awaitAgent(ctx context.Context) bool {
	for {
		if c, err := api.Dial(i.Socket); err == nil {
			_, err = c.Status(ctx, &api.StatusRequest{})
			c.Close()
			if err == nil {
				return true
			}
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(installRetry):
		}
	}
}

// Put puts binary and entry in place, the binary first. What is there already
// is not written.
func (i Installation) Put() error {
	if i.BinDir != "" {
		program := i.Program
		if program == "" {
			program = "/proc/self/exe"
		}
		wrote, err := copyProgram(program, filepath.Join(i.BinDir, BinaryName))
		if err != nil {
			return fmt.Errorf("the plugin's binary: %w", err)
		}
		if wrote {
			i.Log.Info("wrote the CNI plugin", zap.String("file", filepath.Join(i.BinDir, BinaryName)))
		}
	}
	if i.ConfDir == "" {
		return nil
	}
	entry, err := json.Marshal(map[string]any{"type": BinaryName, "socket": i.Socket, "pinDir": i.PinDir})
	if err != nil {
		return err
	}
	name, err := i.active()
	if err != nil {
		return errors.Join(fmt.Errorf("network configuration: %w", err), i.removeDerived(""))
	}
	path := filepath.Join(i.ConfDir, name)
	list, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("network configuration: %w", err)
	}
	chained := func(list []byte) ([]byte, error) {
		out, _, err := chain(list, entry)
		return out, err
	}
	target, wrote := path, false
	if filepath.Ext(name) == ".conflist" || isList(list) {
		err = edit(path, list, func(list []byte) ([]byte, error) {
			out, err := chained(list)
			wrote = wrote || !bytes.Equal(out, list)
			return out, err
		})
	} else {
		target = filepath.Join(i.ConfDir, derivedPrefix+strings.TrimSuffix(name, filepath.Ext(name))+".conflist")
		wrote, err = derive(target, list, chained)
	}
	if err != nil {
		return fmt.Errorf("network configuration %s: %w", path, err)
	}
	if wrote {
		i.Log.Info("the CNI plugin is the last of the network configuration", zap.String("file", target))
	}
	return i.removeDerived(target)
}

// derive writes the list that is made of a single plugin's configuration.
func derive(target string, single []byte, chained func([]byte) ([]byte, error)) (wrote bool, err error) {
	list, err := listOf(single)
	if err != nil {
		return false, err
	}
	out, err := chained(list)
	if err != nil {
		return false, err
	}
	if old, err := os.ReadFile(target); err == nil && bytes.Equal(old, out) {
		return false, nil
	}
	return true, replace(target, bytes.NewReader(out), 0o600)
}

// removeDerived removes the lists of configurations that are not in use any more,
// all but one: runtimes would find them first, and go on with a network that is
// no more.
func (i Installation) removeDerived(but string) error {
	names, err := configs(i.ConfDir)
	if err != nil {
		return err
	}
	var errs []error
	for _, n := range names {
		if path := filepath.Join(i.ConfDir, n); strings.HasPrefix(n, derivedPrefix) && path != but {
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
			i.Log.Info("a list of a network configuration that is not in use any more was removed", zap.String("file", path))
		}
	}
	return errors.Join(errs...)
}

func isList(b []byte) bool {
	var top map[string]json.RawMessage
	return json.Unmarshal(b, &top) == nil && top["plugins"] != nil
}

// active is the configuration that runtimes use: the first in the order of
// names that was not made by this plugin.
func (i Installation) active() (string, error) {
	names, err := configs(i.ConfDir)
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if !strings.HasPrefix(n, derivedPrefix) {
			return n, nil
		}
	}
	return "", fmt.Errorf("%s has none yet: whatever makes the workloads' devices must come first", i.ConfDir)
}

// configs are the names of network configurations, in the order in which
// runtimes look at them.
func configs(dir string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if isConfig(e.Name()) && !e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// Remove takes the plugin's entries out of all network configurations, then
// the binary away. Workloads that start from now on are not registered.
func (i Installation) Remove() error {
	var errs []error
	if i.ConfDir != "" {
		names, err := configs(i.ConfDir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, n := range names {
			errs = append(errs, i.removeFrom(filepath.Join(i.ConfDir, n)))
		}
	}
	// While an entry is left the binary stays: without it no workload would
	// start.
	if err := errors.Join(errs...); err != nil || i.BinDir == "" {
		return err
	}
	if err := os.Remove(filepath.Join(i.BinDir, BinaryName)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (i Installation) removeFrom(path string) error {
	if strings.HasPrefix(filepath.Base(path), derivedPrefix) {
		return os.Remove(path)
	}
	list, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !isList(list) || !bytes.Contains(list, []byte(BinaryName)) {
		return nil
	}
	if err := edit(path, list, func(list []byte) ([]byte, error) {
		out, _, err := unchain(list)
		return out, err
	}); err != nil {
		return fmt.Errorf("network configuration %s: %w", path, err)
	}
	i.Log.Info("the CNI plugin is out of the network configuration", zap.String("file", path))
	return nil
}

// copyProgram writes a program, unless the same is there.
func copyProgram(from, to string) (wrote bool, err error) {
	src, err := os.Open(from)
	if err != nil {
		return false, err
	}
	defer src.Close()
	if equal, err := sameContent(src, to); err != nil || equal {
		return false, err
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	// Beside and renamed: the old one may be running.
	return true, replace(to, src, 0o755)
}

func sameContent(a *os.File, path string) (bool, error) {
	b, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer b.Close()
	ai, err := a.Stat()
	if err != nil {
		return false, err
	}
	bi, err := b.Stat()
	if err != nil {
		return false, err
	}
	if ai.Size() != bi.Size() || bi.Mode().Perm() != 0o755 {
		return false, nil
	}
	p, q := make([]byte, 1<<16), make([]byte, 1<<16)
	for {
		n, err := io.ReadFull(a, p)
		m, _ := io.ReadFull(b, q) // of the same size; a change meanwhile is a difference
		if !bytes.Equal(p[:n], q[:m]) {
			return false, nil
		}
		if err != nil {
			return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF), nil
		}
	}
}

// Names of what is written beside its place: no configuration's.
const (
	besidePrefix = ".portcullis-"
	besideSuffix = ".tmp"
)

// replace writes a file as a whole or not at all. One that is there keeps its
// mode.
func replace(path string, content io.Reader, mode os.FileMode) error {
	beside, err := writeBeside(path, content, mode)
	if err != nil {
		return err
	}
	if err := os.Rename(beside, path); err != nil {
		return errors.Join(err, os.Remove(beside))
	}
	return nil
}

// writeBeside writes what is to take a file's place, under another name.
func writeBeside(path string, content io.Reader, mode os.FileMode) (name string, err error) {
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm() | mode&0o111
	}
	f, err := os.CreateTemp(filepath.Dir(path), besidePrefix+"*"+besideSuffix)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// watch tells of changes in directories, until stop is called. A change that
// comes while one waits is the same one. changes is nil with an error.
func watch(ctx context.Context, dirs ...string) (changes <-chan struct{}, stop func(), err error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, func() {}, err
	}
	f := os.NewFile(uintptr(fd), "inotify")
	for _, d := range dirs {
		if d == "" {
			continue
		}
		if _, err := unix.InotifyAddWatch(fd, d, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE); err != nil {
			return nil, func() {}, errors.Join(fmt.Errorf("%s: %w", d, err), f.Close())
		}
	}
	c := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() { // ends when f is closed
		defer close(done)
		buf := make([]byte, 1<<14)
		for {
			if _, err := f.Read(buf); err != nil {
				return
			}
			select {
			case c <- struct{}{}:
			default:
			}
		}
	}()
	unhook := context.AfterFunc(ctx, func() { f.Close() })
	return c, func() { unhook(); f.Close(); <-done }, nil
}
