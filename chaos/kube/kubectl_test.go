package kube

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A call that is not answered is made again; what it made in spite of that is
// found; and an answer is an answer.
func TestCallIsMadeAgain(t *testing.T) {
	const lost = "echo 'Unable to connect to the server: net/http: TLS handshake timeout' >&2; exit 1"
	const there = "echo 'Error from server (AlreadyExists): pods \"x\" already exists' >&2; exit 1"
	for what, c := range map[string]struct {
		answers []string // to the calls, one after the other; the last to all that follow
		args    string
		want    string // "": an error
		calls   string
	}{
		"answered":               {[]string{"echo yes"}, "get pods", "yes\n", "get pods"},
		"not answered once":      {[]string{lost, "echo yes"}, "get pods", "yes\n", "get pods|get pods"},
		"never answered":         {[]string{lost}, "get pods", "", "get pods|get pods|get pods|get pods"},
		"made, and not answered": {[]string{lost, there, "cat"}, "create -f - -o json", "pod x", "create -f - -o json|create -f - -o json|get -f - -o json"},
		"somebody else's":        {[]string{there}, "create -f -", "", "create -f -"},
		"forbidden":              {[]string{"echo 'Error from server (Forbidden): no' >&2; exit 1"}, "get pods", "", "get pods"},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			script := "#!/bin/sh\necho \"$@\" >>" + dir + "/calls\ncase $(wc -l <" + dir + "/calls) in\n"
			for i, a := range c.answers {
				n := fmt.Sprint(i + 1)
				if i == len(c.answers)-1 {
					n = "*"
				}
				script += n + ") " + a + ";;\n"
			}
			path := filepath.Join(dir, "kubectl")
			if err := os.WriteFile(path, []byte(script+"esac\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			k, err := newKubectl(Options{Kubectl: path})
			if err != nil {
				t.Fatal(err)
			}
			out, err := k.run(t.Context(), []byte("pod x"), strings.Fields(c.args)...)
			if string(out) != c.want || (err == nil) != (c.want != "") {
				t.Errorf("%q, %v", out, err)
			}
			calls, err := os.ReadFile(filepath.Join(dir, "calls"))
			if got := strings.ReplaceAll(strings.TrimSpace(string(calls)), "\n", "|"); err != nil || got != c.calls {
				t.Errorf("calls %q, %v, want %q", got, err, c.calls)
			}
		})
	}
}
