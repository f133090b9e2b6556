package demo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/chaos/lab"
	"portcullis/docs/examples"
)

func TestClusters(t *testing.T) {
	for _, mode := range []string{"lease", "classic"} {
		c := cluster(mode)
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
		if c.Evidence != mode {
			t.Errorf("%s: evidence %s", mode, c.Evidence)
		}
	}
	files, err := examples.Files.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f.Name(), ".cluster.yaml") {
			if _, err := lab.ParseConfig(examples.Read(f.Name())); err != nil {
				t.Errorf("%s: %v", f.Name(), err)
			}
		}
	}
}

// A step fails when what was seen is not what was expected, and when it could
// not be done; one failed step fails the report.
func TestVerdict(t *testing.T) {
	var out bytes.Buffer
	s := &story{out: &out, begun: time.Now()}
	s.do(Step{Name: "good", Expected: landed}, func(st *Step) error { st.Observed, st.OK = landed, true; return nil })
	s.finish()
	if !s.report.OK || !strings.Contains(out.String(), "All 1 steps") {
		t.Errorf("%+v\n%s", s.report, &out)
	}
	s.do(Step{Name: "bad", Expected: dropped}, func(st *Step) error { st.OK = true; return errors.New("no lab") })
	s.finish()
	if st := s.report.Steps[1]; s.report.OK || st.OK || st.Observed != "failed" || st.Detail != "no lab" {
		t.Errorf("%+v", s.report)
	}
	if !strings.Contains(out.String(), "1 of 2 steps went OTHERWISE") || !strings.Contains(out.String(), "NOT AS EXPECTED") {
		t.Errorf("the story hides it:\n%s", &out)
	}
}

// The whole demo, with real agents; then once more, interrupted.
func TestDemo(t *testing.T) {
	if testing.Short() {
		t.Skip("takes most of a minute")
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root: it makes network namespaces")
		}
		t.Skip("needs root: it makes network namespaces")
	}
	binary := filepath.Join(t.TempDir(), "portcullis")
	if out, err := exec.Command("go", "build", "-o", binary, "portcullis/cmd/portcullis").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var out bytes.Buffer
	r, err := Run(t.Context(), Options{Out: &out, Binary: binary})
	if err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	if !r.OK {
		t.Errorf("not as expected:\n%s", &out)
	}
	if len(r.Steps) != 36 {
		t.Errorf("only %d steps", len(r.Steps))
	}
	nothingLeft(t)

	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if _, err := Run(ctx, Options{Binary: binary}); err == nil {
		t.Error("an interrupted demo says nothing")
	}
	nothingLeft(t)
}

func nothingLeft(t *testing.T) {
	t.Helper()
	for _, glob := range []string{"/run/netns/pc.demo-*", lab.DefaultRoot + "/demo-*", "/sys/fs/bpf/portcullis-lab/demo-*"} {
		if left, _ := filepath.Glob(glob); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
}
