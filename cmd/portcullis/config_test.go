package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// printConfig runs `agent --print-config` with a file and an environment.
func printConfig(t *testing.T, file string, env map[string]string, args ...string) result {
	t.Helper()
	path := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), &Env{
		Args: append([]string{"agent", "--print-config", "--config", path}, args...), Stdout: &stdout, Stderr: &stderr,
		Getenv: func(k string) string { return env[k] },
	})
	return result{code, stdout.String(), strings.ReplaceAll(stderr.String(), path, "FILE")}
}

const minimal = `
node: n1
node-ip: [192.0.2.1]
range: [10.1.0.0/24]
listen: 192.0.2.1:4260
trust-domain: example.org
`

// The example says what its comments claim, and what --print-config writes is
// a file that says the same.
func TestExampleConfig(t *testing.T) {
	example, err := os.ReadFile("../../docs/examples/agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	first := printConfig(t, string(example), nil)
	if first.code != exitOK || first.stderr != "" {
		t.Fatalf("%+v", first)
	}
	for _, want := range []string{"node: n1 # ", "- 10.1.0.0/24", "- {name: n2, address: '192.0.2.2:4260', ranges: [10.2.0.0/24, 'fd00:2::/64', '2001:db8::2/128']}",
		"ttl: 30s #", "hold-total: 4096 # default\n", "unsafe-classic: false # default\n", "agent.yaml:9: node\n"} {
		if !strings.Contains(first.stdout, want) {
			t.Errorf("no %q in\n%s", want, first.stdout)
		}
	}
	again := printConfig(t, first.stdout, nil)
	if diff := cmp.Diff(withoutComments(first.stdout), withoutComments(again.stdout)); diff != "" || again.code != exitOK {
		t.Errorf("status %d, %s; printed and read again it says (-first +again):\n%s", again.code, again.stderr, diff)
	}
}

func withoutComments(s string) string {
	var lines []string
	for line := range strings.Lines(s) {
		line, _, _ = strings.Cut(line, " #")
		if line = strings.TrimRight(line, " \n"); !strings.HasPrefix(strings.TrimSpace(line), "#") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

func TestFlagBeatsEnvironmentBeatsFile(t *testing.T) {
	got := printConfig(t, minimal+"ttl: 10s\nheartbeat: 1s\nuplink: [eth0, eth1]\nunsafe-classic: false\nhold-total: 7\n",
		map[string]string{"PORTCULLIS_TTL": "20s", "PORTCULLIS_UPLINK": "ens1 ens2", "PORTCULLIS_HEARTBEAT": "2s"}, "--heartbeat", "3s")
	if got.code != exitOK || got.stderr != "" {
		t.Fatalf("%+v", got)
	}
	for _, want := range []string{"ttl: 20s # PORTCULLIS_TTL\n", "heartbeat: 3s # --heartbeat\n", "  - ens1 # PORTCULLIS_UPLINK\n  - ens2 # PORTCULLIS_UPLINK\n", "hold-total: 7 # "} {
		if !strings.Contains(got.stdout, want) {
			t.Errorf("no %q in\n%s", want, got.stdout)
		}
	}
	if strings.Contains(got.stdout, "eth0") {
		t.Errorf("a list of the file was added to the environment's:\n%s", got.stdout)
	}
}

func TestSocketOfTheAgent(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		env        map[string]string
		args       []string
		want       string
	}{
		{"default", "", nil, nil, "/run/portcullis/agent.sock"},
		{"file", "api-socket: /run/f.sock\n", nil, nil, "/run/f.sock"},
		{"socket beats file", "api-socket: /run/f.sock\n", nil, []string{"--socket", "/run/s.sock"}, "/run/s.sock"},
		{"variable beats file", "api-socket: /run/f.sock\n", map[string]string{"PORTCULLIS_SOCKET": "/run/e.sock"}, nil, "/run/e.sock"},
		{"its own flag beats all", "api-socket: /run/f.sock\n", nil, []string{"--socket", "/run/s.sock", "--api-socket", "/run/a.sock"}, "/run/a.sock"},
	} {
		got := printConfig(t, minimal+tc.file, tc.env, tc.args...)
		if !strings.Contains(got.stdout, "api-socket: "+tc.want+" # ") {
			t.Errorf("%s: status %d, %s%s", tc.name, got.code, got.stderr, got.stdout)
		}
	}
}

// Everything that is wrong is told at once, with its line and path.
func TestConfigMistakes(t *testing.T) {
	for _, tc := range []struct {
		name, file string
		env        map[string]string
		want       []string
	}{
		{"unknown keys", minimal + "nodeIPs: [192.0.2.9]\npeers: []\ncolour: red\nconfig: x\n", nil, []string{
			"FILE:7: nodeIPs: unknown key: did you mean node-ip?", "FILE:8: peers: unknown key: did you mean peer?",
			"FILE:9: colour: unknown key: keys are the names of the flags", "FILE:10: config: unknown key"}},
		{"twice", minimal + "ttl: 3s\nttl: 4s\n", nil, []string{"FILE:8: ttl: stands here twice, first in line 7"}},
		{"kinds", minimal + "ttl: 30\nheartbeat: [1s]\nhold-total: many\nunsafe-classic: 1\nuplink: eth0\naudit-log:\nbindings: {}\n", nil, []string{
			`FILE:7: ttl: "30": time: missing unit in duration "30"`, "FILE:8: heartbeat: want one value", `FILE:9: hold-total: "many": `,
			"FILE:10: unsafe-classic: want true or false", "FILE:11: uplink: want a list", "FILE:12: audit-log: has no value", "FILE:13: bindings: want one value"}},
		{"values", "node: n1\nnode-ip: [192.0.2.1, nonsense]\nrange:\n- 10.1.0.0/24\n- 10.2\nlisten: here\ntrust-domain: example.org\nlog-level: loud\n", nil, []string{
			`FILE:2: node-ip[1] "nonsense": not an address`, `FILE:5: range[1] "10.2": not an address prefix`, `FILE:6: listen "here": want ADDRESS:PORT`,
			`FILE:8: log-level "loud": want debug`}},
		{"peers", minimal + `peer:
- {name: n2, adress: 192.0.2.2:4260}
- {name: "n3=x", address: 192.0.2.3, ranges: [10.3.0.0/24, 10.4]}
- n4=192.0.2.4:4260
- {name: n5}
- {address: 192.0.2.6:4260, ranges: 10.6.0.0/24}
`, nil, []string{"FILE:8: peer[0].adress: unknown key", `FILE:9: peer[1].name: "n3=x": want a DNS label`, `FILE:9: peer[1].address: "192.0.2.3": want ADDRESS:PORT`,
			`FILE:9: peer[1].ranges[1]: "10.4": not an address prefix`, "FILE:10: peer[2]: want {name, address, ranges}",
			"FILE:11: peer[3].address: is missing", "FILE:12: peer[4].ranges: want a list"}},
		{"together with the environment", minimal + "ttl: x\ncolour: red\n", map[string]string{"PORTCULLIS_HEARTBEAT": "y", "PORTCULLIS_EVIDENCE": "faith"}, []string{
			"FILE:7: ttl: ", "FILE:8: colour: ", `PORTCULLIS_HEARTBEAT="y": `, `--evidence "faith": want lease`}},
		{"wrong where it is not used", minimal + "uplink: eth0\n", map[string]string{"PORTCULLIS_UPLINK": "eth1"}, []string{"FILE:7: uplink: want a list"}},
		{"missing", "node: n1\n", nil, []string{"--node-ip is missing", "--range is missing", "--listen is missing", "--trust-domain"}},
		{"two documents", minimal + "---\nttl: 3s\n", nil, []string{"FILE: want one document"}},
		{"no mapping", "- a\n", nil, []string{"FILE:1: want keys and values"}},
		{"no YAML", "node: [\n", nil, []string{"FILE: yaml: "}},
		{"merge key", "base: &b {node: n1}\n<<: *b\n", nil, []string{"FILE:1: base: unknown key", "FILE:2: <<: unknown key"}},
	} {
		got := printConfig(t, tc.file, tc.env)
		if got.code != exitUsage || got.stdout != "" {
			t.Errorf("%s: status %d, stdout %q", tc.name, got.code, got.stdout)
		}
		for _, want := range tc.want {
			if !strings.Contains(got.stderr, want) {
				t.Errorf("%s: no %q in\n%s", tc.name, want, got.stderr)
			}
		}
		if tc.name == "values" && strings.Contains(got.stderr, "missing") {
			t.Errorf("what is wrong is also called missing:\n%s", got.stderr)
		}
	}
}

func TestConfigFileMissing(t *testing.T) {
	got := printConfig(t, minimal, nil, "--config", "/nonexistent/agent.yaml")
	if got.code != exitUsage || !strings.Contains(got.stderr, "/nonexistent/agent.yaml") {
		t.Errorf("a named file that is missing: %+v", got)
	}
	got = printConfig(t, "node: [", map[string]string{}, "--config=", "--node", "n1", "--node-ip", "192.0.2.1", "--range", "10.1.0.0/24",
		"--listen", "192.0.2.1:4260", "--trust-domain", "example.org")
	if got.code != exitOK {
		t.Errorf("no file wanted: %+v", got)
	}
	s := newSettings(newAgentCmd(&Env{}).Flags(), newAgentCmd(&Env{}).Flags())
	if err := s.fromFile("/nonexistent/agent.yaml", false); err != nil {
		t.Errorf("the default file is missing: %v", err)
	}
}

func TestConfigFileFromEnvironment(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.yaml")
	if err := os.WriteFile(path, []byte(minimal+"ttl: 11s # "), 0o600); err != nil {
		t.Fatal(err)
	}
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), &Env{Args: []string{"agent", "--print-config"}, Stdout: &stdout, Stderr: &stderr,
		Getenv: func(k string) string { return map[string]string{"PORTCULLIS_CONFIG": path}[k] }})
	if code != exitOK || !strings.Contains(stdout.String(), "ttl: 11s # ") {
		t.Errorf("status %d, %s%s", code, stderr.String(), stdout.String())
	}
}

// Whatever the bytes are, reading them ends, and what is accepted can be
// printed and read again.
func FuzzConfig(f *testing.F) {
	f.Add(minimal)
	f.Add("peer: [{name: n2, address: 192.0.2.2:4260, ranges: [10.2.0.0/24]}]")
	f.Add("a: &a [*a]")
	f.Fuzz(func(t *testing.T, text string) {
		read := func(text string) (string, error) {
			flags := newAgentCmd(&Env{}).Flags()
			s := newSettings(flags, flags)
			if err := s.fromYAML("f", []byte(text)); err != nil {
				return "", err
			}
			var out bytes.Buffer
			if err := s.write(&out); err != nil {
				t.Fatalf("%q was accepted and cannot be printed: %v", text, err)
			}
			return out.String(), nil
		}
		first, err := read(text)
		if err != nil {
			return
		}
		again, err := read(first)
		if err != nil || withoutComments(again) != withoutComments(first) {
			t.Fatalf("%q prints\n%sand that again\n%s%v", text, first, again, err)
		}
	})
}
