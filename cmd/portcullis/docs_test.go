package main

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"portcullis/bpf/abi"
)

// pages returns the text of every Markdown file that users read, by its path.
func pages(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, root := range []string{"../../docs", "../../README.md", "../../ARCHITECTURE.md"} {
		err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() || filepath.Ext(name) != ".md" {
				return err
			}
			b, err := os.ReadFile(name)
			out[filepath.ToSlash(filepath.Clean(name))[len("../../"):]] = string(b)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

var (
	codeBlock  = regexp.MustCompile("(?ms)^ *```([a-z]*)[^\n]*\n(.*?)^ *```")
	inlineCode = regexp.MustCompile("`([^`\n]+)`")
	assignment = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*=`)
	separator  = regexp.MustCompile(`\s(?:\||\|\||&&|;|&)(?:\s|$)|;\s|[<>(){}]`)
)

// shown is a command of ours as a page shows it.
type shown struct {
	line   string
	words  []string // after the program's name
	inline bool     // in a sentence: arguments may be left out
}

// commandsIn finds the commands of ours: in blocks of code what stands after a
// prompt, and in sentences what is in backquotes and begins with the program.
func commandsIn(text string) (out []shown) {
	for _, m := range codeBlock.FindAllStringSubmatch(text, -1) {
		body := strings.ReplaceAll(m[2], "\\\n", " ")
		for line := range strings.Lines(body) {
			line = strings.TrimSpace(line)
			cmd, prompt := strings.CutPrefix(line, "$ ")
			if !prompt {
				cmd, prompt = strings.CutPrefix(line, "# ")
			}
			if m[1] == "sh" || m[1] == "bash" {
				cmd, prompt = line, !strings.HasPrefix(line, "#")
			}
			if prompt {
				out = append(out, ours(line, cmd, false)...)
			}
		}
	}
	for _, m := range inlineCode.FindAllStringSubmatch(codeBlock.ReplaceAllString(text, ""), -1) {
		out = append(out, ours(m[1], m[1], true)...)
	}
	return out
}

// ours returns the commands of ours in a line of a shell. What the shell would
// fill in is left out, and so is everything after "...".
func ours(line, cmd string, inline bool) (out []shown) {
	cmd, _, _ = strings.Cut(cmd, "  #") // a comment
	for _, part := range separator.Split(cmd, -1) {
		words := splitWords(part)
		words = slices.DeleteFunc(words, func(w string) bool { return strings.Contains(w, "$") || strings.HasPrefix(w, "{") })
		for len(words) > 0 && (assignment.MatchString(words[0]) || words[0] == "sudo" || words[0] == "!") {
			words = words[1:]
		}
		at := 0
		if len(words) > 0 && words[0] == "kubectl" {
			at = slices.Index(words, "--") + 1
		}
		if at >= len(words) || path.Base(words[at]) != "portcullis" {
			continue
		}
		words = words[at+1:]
		if i := slices.Index(words, "..."); i >= 0 {
			words = words[:i]
		}
		out = append(out, shown{line, words, inline})
	}
	return out
}

// splitWords splits at blanks that are not between quotes.
func splitWords(s string) (out []string) {
	var word strings.Builder
	var quote rune
	some := false
	for _, r := range s {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, some = r, true
		case quote == 0 && (r == ' ' || r == '\t'):
			if some {
				out = append(out, word.String())
			}
			word.Reset()
			some = false
		default:
			word.WriteRune(r)
			some = true
		}
	}
	if some {
		out = append(out, word.String())
	}
	return out
}

// parses tells why the command line would not take a command.
func (s shown) parses() error {
	env := &Env{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard, Getenv: func(string) string { return "" }, Now: time.Now}
	root := newRoot(env)
	root.InitDefaultHelpCmd()
	cmd, rest, err := root.Find(s.words)
	if err != nil {
		return err
	}
	cmd.InitDefaultHelpFlag()
	if err := cmd.ParseFlags(rest); err != nil {
		return err
	}
	args := cmd.Flags().Args()
	if s.inline && len(args) == 0 {
		return nil
	}
	return cmd.ValidateArgs(args)
}

// Every command that a page shows is one that this program takes.
func TestCommandsOfPagesParse(t *testing.T) {
	found := 0
	for page, text := range pages(t) {
		for _, s := range commandsIn(text) {
			found++
			if err := s.parses(); err != nil {
				t.Errorf("%s: %s: %v", page, s.line, err)
			}
		}
	}
	t.Logf("%d commands", found)
	if found < 100 {
		t.Errorf("found only %d commands in the pages: the search is broken", found)
	}
}

// The test above finds what is wrong.
func TestCommandsInPages(t *testing.T) {
	for text, want := range map[string]string{
		"```console\n$ portcullis status --cluster\n$ PORTCULLIS_SOCKET=/x bin/portcullis monitor --verdict drop | head\n```": "",
		"```console\n$ kubectl -n portcullis exec ds/portcullis-agent -- /portcullis observe --last 20\n```":                  "",
		"```console\n# portcullis agent ... --no-such-flag\nportcullis: no command, but what one says\n```":                   "",
		"`portcullis endpoint get`, `portcullis.io/agent-address` and `portcullis`":                                           "",
		"```console\n$ portcullis statsu\n```":                                          "no command",
		"```console\n$ portcullis status --clutser\n```":                                "unknown flag",
		"```console\n$ portcullis install \\\n    --wiat\n```":                          "unknown flag",
		"```console\n$ portcullis endpoint get\n```":                                    "endpoint get",
		"```sh\nfor i in 1 2; do sudo portcullis ipcache get --json; done\n```":         "",
		"```sh\nsudo portcullis ipcache get --json\n```":                                "unknown flag",
		"```console\n$ true && kubectl exec x -- /portcullis policy got\n```":           "no command",
		"`portcullis audit tail --line 3`":                                              "unknown flag",
		"```console\n$ portcullis monitor --endpoint web\n```":                          "invalid argument",
		"   ```console\n   # portcullis doctor --clustre\n   ```\n":                     "unknown flag",
		"```yaml\n# portcullis nonsense\n```":                                           "no command",
		"```console\n$ cp portcullis /opt/cni/bin/portcullis-cni; portcullis cn\n```":   "no command",
		"```console\n$ portcullis install --dry-run -o yaml >out.yaml 2>&1 --nope\n```": "",
	} {
		var said []string
		for _, s := range commandsIn(text) {
			if err := s.parses(); err != nil {
				said = append(said, err.Error())
			}
		}
		if all := strings.Join(said, "; "); want == "" && all != "" || !strings.Contains(all, want) {
			t.Errorf("%q: %q, want %q", text, all, want)
		}
	}
}

// docs/troubleshooting.md has one section for each reason of a drop and for
// each alarm, and none for anything else. Each says what it means, which
// commands to look with, and what to do.
func TestTroubleshootingHasAll(t *testing.T) {
	text := pages(t)["docs/troubleshooting.md"]
	_, drops, ok := strings.Cut(text, "\n## Drops\n")
	drops, alarms, also := strings.Cut(drops, "\n## Alarms\n")
	if !ok || !also {
		t.Fatal("docs/troubleshooting.md has no chapters Drops and Alarms, in this order")
	}
	alarms, _, _ = strings.Cut(alarms, "\n## ")
	var reasons []string
	for r := range abi.ReasonMax {
		if r != abi.ReasonNone {
			reasons = append(reasons, r.String())
		}
	}
	checkSections(t, "drop", drops, reasons)
	checkSections(t, "alarm", alarms, raisedAlarms(t))
}

func checkSections(t *testing.T, what, chapter string, want []string) {
	t.Helper()
	sections := map[string]string{}
	for _, s := range strings.Split(chapter, "\n### ")[1:] {
		name, body, _ := strings.Cut(s, "\n")
		name = strings.Trim(name, "`")
		if _, twice := sections[name]; twice {
			t.Errorf("docs/troubleshooting.md: the %s %q has two sections", what, name)
		}
		sections[name] = body
		if !slices.Contains(want, name) {
			t.Errorf("docs/troubleshooting.md: %q is no %s", name, what)
		}
	}
	for _, name := range want {
		body, ok := sections[name]
		switch {
		case !ok:
			t.Errorf("docs/troubleshooting.md has no section for the %s %q", what, name)
			continue
		case !strings.Contains(body, "\n*Do:* "):
			t.Errorf("docs/troubleshooting.md: the %s %q: it does not say what to do (*Do:*)", what, name)
		}
		before, _, look := strings.Cut(body, "```console\n")
		if !look || len(commandsIn(body)) == 0 {
			t.Errorf("docs/troubleshooting.md: the %s %q: it shows no command to look with", what, name)
		}
		if len(strings.TrimSpace(before)) < 20 {
			t.Errorf("docs/troubleshooting.md: the %s %q: it does not say what it means", what, name)
		}
		if link := fmt.Sprintf("](reasons.md#%s)", name); what == "drop" && !strings.Contains(body, link) {
			t.Errorf("docs/troubleshooting.md: the drop %q: no link %s", name, link)
		}
	}
}
