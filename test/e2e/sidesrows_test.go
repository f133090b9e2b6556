//go:build e2e

package e2e

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var updateFlag = flag.Bool("e2e.update", false, "write the table of docs/services.md as it came out")

// row is what a caller's calls of one kind came to: alike by TCP and UDP, IPv4 and
// IPv6, and whichever node it is that the row's words mean.
type row struct {
	kind, at string // how the server was called, and of which node
	who      string // name of the caller
	word     string // for people
	sees     string // whom the server takes for the client
	ingress  known  // of the server
	egress   string // of the caller, where it is a pod
	marked   known  // ingress, with --endpoint-mark-mask
}

// same: of the same calls.
func (r row) same(o row) bool { return r.kind == o.kind && r.at == o.at && r.who == o.who }

// known is as whom a packet is judged.
type known struct{ who, evidence, reason string }

func (k known) String() string {
	switch {
	case k.reason != "":
		return "nobody: `" + k.reason + "`"
	case k.who == "":
		return "-"
	}
	return k.who + ", `" + k.evidence + "`"
}

// entity is what a policy must name to let it in; "": it cannot.
func (k known) entity() string {
	switch {
	case k.reason != "" || k.who == "":
		return ""
	case strings.HasPrefix(k.who, "`"):
		return strings.Trim(k.who, "`")
	}
	return thePods
}

// at says whose NodePort or hostPort a caller calls.
func at(w way, c *caller) string {
	switch w.node {
	case "":
		return ""
	case serverNode:
		return "the server's node"
	case c.node:
		return "the caller's node"
	}
	return "another node"
}

// calls are those that the row tells of.
func (r row) calls(s *sides) (list []attemptOf) {
	for _, c := range s.callers {
		all, _ := s.calls(c)
		for _, a := range all {
			if w := ways[a.way]; c.name == r.who && w.kind == r.kind && at(w, c) == r.at {
				list = append(list, a)
			}
		}
	}
	return list
}

// rows measures every row once.
func (s *sides) rows(t *testing.T, seen map[attemptOf]outcome) (rows []row, err error) {
	t.Helper()
	told := map[string]judgedCalls{}
	for _, c := range s.callers {
		told[c.name] = s.watch(t, c)
	}
	for _, w := range ways {
		for _, c := range s.callers {
			r := row{kind: w.kind, at: at(w, c), who: c.name, word: c.word}
			calls := r.calls(s)
			if len(calls) == 0 || slices.ContainsFunc(rows, r.same) {
				continue
			}
			for n, a := range calls {
				one := r
				one.sees = s.sees(c, ways[a.way], seen[a])
				var failed error
				one.ingress, failed = s.ingress(c, a, told[c.name].ingress[a], seen[a].OK)
				err = errors.Join(err, failed)
				if c.isPod() {
					one.egress, failed = s.egress(c, a, told[c.name].egress[a])
					err = errors.Join(err, failed)
				}
				if n == 0 {
					r = one
				} else if one != r {
					err = errors.Join(err, fmt.Errorf("%v: %+v, and %v: %+v", calls[0], r, a, one))
				}
			}
			rows = append(rows, r)
		}
	}
	return rows, err
}

// sees says whom the server took for the client.
func (s *sides) sees(c *caller, w way, o outcome) string {
	if !o.OK {
		return "-"
	}
	_, ip, _ := strings.Cut(o.Name, " ")
	switch {
	case slices.Contains(c.ips, ip):
		return "the caller"
	case slices.Contains(s.nodes[serverNode], ip):
		return "its node"
	case w.node != "" && slices.Contains(s.nodes[w.node], ip):
		return "the node called"
	case c.node != "" && slices.Contains(s.nodes[c.node], ip):
		return "the caller's node"
	}
	return ip
}

// someone says who an end is by its identity.
func someone(c string, e flowEnd) string {
	for _, l := range e.Labels {
		if reserved, ok := strings.CutPrefix(l, "reserved:"); ok {
			return "`" + reserved + "`"
		}
		switch name, ok := strings.CutPrefix(l, "k8s:pod="); {
		case ok && name == c:
			return "the caller"
		case ok && name == "server":
			return "the server"
		}
	}
	return strings.Join(e.Labels, " ")
}

// brief is what of flows matters here.
func brief(flows []flow) string {
	var out []string
	for _, f := range flows {
		out = append(out, fmt.Sprintf("%s %s (%s) %s:%d -> %s:%d", f.Verdict, f.Reason, f.Evidence, f.Source.IP, f.Source.Port, f.Destination.IP, f.Destination.Port))
	}
	return "[" + strings.Join(out, ", ") + "]"
}

func (s *sides) ingress(c *caller, a attemptOf, flows []flow, answered bool) (k known, err error) {
	for _, f := range flows {
		one := known{who: someone(c.name, f.Source), evidence: f.Evidence}
		switch {
		case f.Verdict == "hold":
			continue
		case f.Verdict != "pass":
			one = known{reason: f.Reason}
		case f.NoEvidenceNeeded && one.entity() != "host": // who always gets in
			err = errors.Join(err, fmt.Errorf("%v: nobody asked who it is: %s", a, brief(flows)))
		}
		if k != (known{}) && one != k {
			err = errors.Join(err, fmt.Errorf("%v: judged as %v, and as %v: %s", a, k, one, brief(flows)))
		}
		k = one
	}
	if answered && k == (known{}) {
		err = errors.Join(err, fmt.Errorf("%v: nothing was told at the server", a))
	}
	return k, err
}

// egress lists as whom what was called is judged, and whom that leads to where the
// caller's node says so.
func (s *sides) egress(c *caller, a attemptOf, flows []flow) (text string, err error) {
	var steps [2]string
	for _, f := range flows {
		step, w := 0, ways[a.way]
		if f.Destination.Port == backendPort(a.way) {
			if step = 1; w.node != "" && w.node != c.node {
				continue // a reset of what came back by another way
			}
		}
		one := someone("", f.Destination) + ", `" + f.Evidence + "`"
		switch {
		case f.Verdict == "hold":
			continue
		case f.Verdict != "pass" || f.NoEvidenceNeeded || steps[step] != "" && steps[step] != one:
			err = errors.Join(err, fmt.Errorf("%v: told at the caller: %s", a, brief(flows)))
		}
		steps[step] = one
	}
	if steps == [2]string{} {
		err = errors.Join(err, fmt.Errorf("%v: nothing was told at the caller", a))
	}
	return strings.Join(slices.DeleteFunc(steps[:], func(s string) bool { return s == "" }), "; then "), err
}

// table writes rows as docs/services.md has them: callers that differ in nothing
// else stand in one line.
func table(rows []row) string {
	var lines []string
	callers := map[string][]string{}
	for _, r := range rows {
		marked := r.marked.String()
		if r.marked == r.ingress || r.marked == (known{}) {
			marked = ""
		}
		rest := []string{r.sees, r.ingress.String(), marked, r.egress}
		key := r.kind + "\x00" + r.at + "\x00" + strings.Join(rest, " | ")
		if callers[key] == nil {
			lines = append(lines, key)
		}
		callers[key] = append(callers[key], r.word)
	}
	var b strings.Builder
	b.WriteString("| called | of | by | the server sees | its ingress judges | with marks | the caller's egress judges |\n|---|---|---|---|---|---|---|\n")
	for _, key := range lines {
		parts := strings.Split(key, "\x00")
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", parts[0], parts[1], strings.Join(callers[key], "; "), parts[2])
	}
	return b.String()
}

const (
	tableBegins = "<!-- Measured: make e2e compares it, and go test -tags=e2e ./test/e2e -e2e.update writes it. -->\n"
	tableEnds   = "<!-- end -->\n"
)

// compareTable compares what came out with what the documentation says.
func compareTable(t *testing.T, rows []row) {
	t.Helper()
	path := filepath.Join(root, "docs", "services.md")
	text, err := os.ReadFile(path)
	must(t, err)
	before, rest, ok := strings.Cut(string(text), tableBegins)
	was, after, ended := strings.Cut(rest, tableEnds)
	if !ok || !ended {
		t.Fatalf("%s has no table between %q and %q", path, tableBegins, tableEnds)
	}
	now := table(rows)
	if was == now {
		return
	}
	if *updateFlag {
		must(t, os.WriteFile(path, []byte(before+tableBegins+now+tableEnds+after), 0o644))
		return
	}
	t.Errorf("docs/services.md says\n%s\nand it came out as\n%s", was, now)
}
