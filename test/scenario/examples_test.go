package scenario

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"portcullis/chaos/lab"
)

// The stories that docs/examples tells by hand, typed as they stand there, but
// for the name of the lab.
func TestExamplesByHand(t *testing.T) {
	text, err := os.ReadFile("../../docs/examples/README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(text), "```")
	told := 0
	for i := 1; i < len(blocks); i += 2 {
		if strings.Contains(blocks[i], "portcullis lab up") {
			told++
			t.Run(fmt.Sprint(told), func(t *testing.T) { byHand(t, blocks[i]) })
		}
	}
	if told != 5 {
		t.Errorf("%d stories, want 5", told)
	}
}

func byHand(t *testing.T, story string) {
	needRoot(t)
	t.Parallel()
	name := fmt.Sprintf("sc%d-%d", os.Getpid(), serial.Add(1))
	story = strings.ReplaceAll(story, "portcullis lab ", "portcullis lab --lab "+name+" ")
	story = strings.ReplaceAll(story, lab.DefaultRoot+"/lab/", lab.DefaultRoot+"/"+name+"/")
	var script strings.Builder
	var lines []string
	for line := range strings.SplitSeq(story, "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		lines = append(lines, line)
		if strings.HasSuffix(line, "&") {
			fmt.Fprintf(&script, "%s\n", line)
			continue
		}
		refused := 0
		if strings.Contains(line, "# refused") {
			refused = 1
		}
		if command, _, _ := strings.Cut(line, " #"); strings.Contains(command, " exec ") && strings.Contains(command, " probe ") {
			// Who types is slower than a server that was just started: a
			// connection that it refuses itself is tried again.
			fmt.Fprintf(&script, "for try in $(seq 50); do out=$(%s 2>&1); got=$?; case $out in *'connection refused'*) sleep 0.1;; *) break;; esac; done; echo \"$out\"\n", command)
		} else {
			fmt.Fprintf(&script, "%s\ngot=$?\n", line)
		}
		fmt.Fprintf(&script, "[ $got = %d ] || { echo \"line %d: status $got\"; bad=1; }\n", refused, len(lines))
	}
	// What runs beside it ends with the lab.
	fmt.Fprintf(&script, "wait; exit ${bad:-0}\n")
	cmd := exec.CommandContext(t.Context(), "bash", "-c", script.String())
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(program)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s\n%s", err, out, strings.Join(lines, "\n"))
		exec.Command(program, "lab", "down", "--lab", name).Run()
	}
	if left, _ := filepath.Glob(lab.DefaultRoot + "/" + name + "*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
