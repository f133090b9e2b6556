package sysdump

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portcullis/observe/archive"
)

// gathered is what one part puts into an archive, compressed, and what the
// manifest says of it.
func gathered(t *testing.T, p archive.Part) archive.Entry {
	t.Helper()
	var b bytes.Buffer
	a := archive.New(&b, archive.Options{Top: "x", Limit: 8 << 20, Longest: 8 << 20, Timeout: time.Minute, Now: time.Now})
	if err := a.Run(t.Context(), []archive.Part{p}, 1); err != nil {
		t.Fatal(err)
	}
	m, err := a.Close(archive.Manifest{Began: time.Now()})
	if err != nil || len(m.Parts) != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	return m.Parts[0]
}

func part(t *testing.T, c *Config, name string) archive.Part {
	t.Helper()
	for _, p := range Parts(c) {
		if p.Name == name {
			return p
		}
	}
	t.Fatalf("no part %s", name)
	return archive.Part{}
}

// Whoever listens on the socket is found, and is this process here.
func TestFind(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	if p, err := Find(socket); err == nil {
		t.Errorf("where nobody listens: %+v", p)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p, err := Find(socket)
	if err != nil || p.PID != os.Getpid() || p.OwnFiles || p.OwnNetwork || len(p.Args) != len(os.Args) || p.Env["PATH"] != os.Getenv("PATH") {
		t.Errorf("%+v, %v", p, err)
	}
	if got := p.Path("/x"); got != "/x" {
		t.Errorf("of the same files: %s", got)
	}
	p.OwnFiles = true
	if got := p.Path("/x/../y"); !strings.HasSuffix(got, "/root/y") {
		t.Errorf("of other files: %s", got)
	}
	if got := (*Process)(nil).Path("/x"); got != "/x" {
		t.Errorf("of none: %s", got)
	}
}

// The end of a log begins with a line, never with the rest of one.
func TestTail(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	c := &Config{AuditLog: log}
	if e := gathered(t, part(t, c, "audit")); e.NotHere == "" || e.Error != "" {
		t.Errorf("of none: %+v", e)
	}
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if e := gathered(t, part(t, c, "audit")); e.Error != "" || len(e.Files) != 1 || e.Files[0].Bytes != 0 {
		t.Errorf("of an empty one: %+v", e)
	}
	line := "password=" + strings.Repeat("x", 90) + "\n"
	if err := os.WriteFile(log, []byte(strings.Repeat(line, 3*auditBytes/len(line))), 0o600); err != nil {
		t.Fatal(err)
	}
	e := gathered(t, part(t, c, "audit"))
	if e.Error != "" || len(e.Files) != 1 || len(e.Notes) != 1 || e.Files[0].Removed != auditBytes/len(line) || e.Files[0].Bytes != int64(e.Files[0].Removed*len("password=[removed]\n")) {
		t.Errorf("of a long one: %+v", e)
	}
}
