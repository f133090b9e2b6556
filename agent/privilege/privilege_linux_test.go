package privilege

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mode tells the program of the test that it is the one that is tried.
const mode = "PRIVILEGE_TEST"

var keep = Of(unix.CAP_NET_RAW, unix.CAP_BPF, unix.CAP_SETPCAP)

// The first thread runs TestMain, as it runs main in a program that uses this.
func init() { runtime.LockOSThread() }

func TestMain(m *testing.M) {
	var err error
	switch os.Getenv(mode) {
	case "limit":
		err = Limit(keep)
	case "cannot": // who may not change the bounding set
		if err = Drop(^Of(unix.CAP_SETPCAP)); err == nil {
			err = Limit(keep)
		}
	default:
		runtime.UnlockOSThread()
		os.Exit(m.Run())
	}
	var death int32
	if err := unix.Prctl(unix.PR_GET_PDEATHSIG, uintptr(unsafe.Pointer(&death)), 0, 0, 0); err != nil { //nolint:gosec // prctl(2) wants it
		panic(err)
	}
	runtime.UnlockOSThread()
	done := make(chan struct{})
	go func() { // so that there are more threads
		runtime.LockOSThread()
		close(done)
		select {}
	}()
	<-done
	fmt.Printf("args %q\ndeath %d\nerror %v\n", os.Args[1:], death, err)
	threads, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(threads) < 2 {
		panic(fmt.Sprint(threads, err))
	}
	for _, t := range threads {
		b, err := os.ReadFile(t)
		if err != nil {
			panic(err)
		}
		for line := range strings.Lines(string(b)) {
			if strings.HasPrefix(line, "Cap") {
				fmt.Print(line)
			}
		}
	}
	os.Exit(0)
}

func try(t *testing.T, how string, as *syscall.SysProcAttr) (lines []string) {
	t.Helper()
	if os.Geteuid() != 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	runtime.LockOSThread() // the death signal is sent when this thread ends
	defer runtime.UnlockOSThread()
	cmd := exec.Command("/proc/self/exe", "one", "two words")
	cmd.Env = append(os.Environ(), mode+"="+how)
	cmd.SysProcAttr = as
	as.Pdeathsig = syscall.SIGUSR1
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for s := bufio.NewScanner(out); s.Scan(); {
		lines = append(lines, s.Text())
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	return lines
}

// Every thread of the process that Limit returns nil in holds what is kept and
// nothing else, and can get nothing else; it is the same program, called in the same
// way, by the same parent.
func TestLimit(t *testing.T) {
	limited(t, try(t, "limit", &syscall.SysProcAttr{}),
		map[string]Set{"CapInh": 0, "CapPrm": keep, "CapEff": keep, "CapBnd": keep, "CapAmb": 0})
}

// A user who is not root keeps those of them that a service manager gave, too.
func TestLimitOfAnotherUser(t *testing.T) {
	given := []uintptr{unix.CAP_NET_RAW, unix.CAP_SETPCAP, unix.CAP_SYS_TIME}
	have := Of(unix.CAP_NET_RAW, unix.CAP_SETPCAP)
	limited(t, try(t, "limit", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}, AmbientCaps: given}),
		map[string]Set{"CapInh": have, "CapPrm": have, "CapEff": have, "CapBnd": keep, "CapAmb": have})
}

func limited(t *testing.T, lines []string, want map[string]Set) {
	t.Helper()
	text := strings.Join(lines, "\n")
	for _, want := range []string{`args ["one" "two words"]`, fmt.Sprintf("death %d", syscall.SIGUSR1), "error <nil>"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s", want)
		}
	}
	seen := map[string]int{}
	for _, l := range lines {
		var have Set
		name, rest, _ := strings.Cut(l, ":")
		if _, ok := want[name]; !ok {
			continue
		}
		if _, err := fmt.Sscanf(strings.TrimSpace(rest), "%x", &have); err != nil || have != want[name] {
			t.Errorf("%s: want %#x (%v)", l, uint64(want[name]), err)
		}
		seen[name]++
	}
	if len(seen) != len(want) {
		t.Error("not all sets were seen")
	}
	if t.Failed() {
		t.Log(text)
	}
}

func TestLimitThatCannot(t *testing.T) {
	lines := try(t, "cannot", &syscall.SysProcAttr{})
	if text := strings.Join(lines, "\n"); !strings.Contains(text, "error give up capability 0: operation not permitted") {
		t.Error(text)
	}
}
