package tools

import (
	"bufio"
	"crypto/sha256"
	_ "embed" // the page's style and script
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"slices"
)

//go:embed page.css
var pageStyle string

//go:embed page.js
var pageScript string

// Page is what a page says beside the matrix.
type Page struct {
	Judge     *Judge
	Externals []Party
}

// pageData is what the page's script works with.
type pageData struct {
	Workloads int        `json:"workloads"` // how many of the names are theirs
	Names     []string   `json:"names"`     // workloads, then externals
	Reasons   []string   `json:"reasons"`
	Ports     []pagePort `json:"ports"`
}

type pagePort struct {
	Name     string     `json:"name"`
	Combined []string   `json:"combined"`
	Ingress  []string   `json:"ingress"`
	Egress   []string   `json:"egress"`
	From     []string   `json:"from"`
	To       []string   `json:"to"`
	Why      [][]uint32 `json:"why"` // by view: reason, count, reason, count, ...
}

// runs writes a list as value, count, value, count, ...
func runs(list []uint32) []uint32 {
	out := []uint32{}
	for i, x := range list {
		if i > 0 && list[i-1] == x {
			out[len(out)-1]++
			continue
		}
		out = append(out, x, 1)
	}
	return out
}

func (m *Matrix) data(names []string) pageData {
	d := pageData{Workloads: len(m.Workloads), Names: names}
	for _, r := range m.reasons {
		d.Reasons = append(d.Reasons, visible(r.Text))
	}
	for _, name := range m.order {
		t := m.Ports[name]
		p := pagePort{Name: name, Combined: t.Combined, Ingress: t.Ingress, Egress: t.Egress, From: t.FromExternal, To: t.ToExternal}
		for _, why := range t.why {
			p.Why = append(p.Why, runs(why))
		}
		d.Ports = append(d.Ports, p)
	}
	return d
}

// HTML writes the matrix as one page that needs nothing from elsewhere. It may
// run the one script that is in it and no other, whatever names it shows. It
// holds no time: the same input makes the same page.
func (m *Matrix) HTML(out io.Writer, page Page) error {
	names := slices.Concat(m.Workloads, m.Externals)
	for i, n := range names {
		names[i] = visible(n)
	}
	data, err := json.Marshal(m.data(names)) // < > and & are written as \u003c and so on
	if err != nil {
		return err
	}
	w := &writer{Writer: bufio.NewWriter(out)}
	hash := func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return base64.StdEncoding.EncodeToString(sum[:])
	}
	w.say("<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n")
	w.say("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'\">\n", hash(pageStyle), hash(pageScript))
	w.say("<title>Who may call whom</title>\n<style>%s</style>\n</head>\n<body>\n", raw(pageStyle))
	m.header(w, page)
	m.controls(w)
	w.say("<main>\n")
	for i, name := range m.order {
		m.section(w, i, name, names)
	}
	w.say("</main>\n<aside id=\"why\" aria-live=\"polite\" aria-label=\"Why\" hidden><p class=\"dim\">Click a cell, or use the arrow keys in a table, to see which rule of which policy decided.</p></aside>\n")
	w.say("<script type=\"application/json\" id=\"data\">%s</script>\n<script>%s</script>\n</body>\n</html>\n", raw(data), raw(pageScript))
	if w.err != nil {
		return w.err
	}
	return w.Flush()
}

// raw is text that is HTML already.
type raw string

// writer writes HTML; what is not raw is escaped.
type writer struct {
	*bufio.Writer
	err error
}

func (w *writer) say(format string, args ...any) {
	for i, a := range args {
		switch a := a.(type) {
		case raw:
			args[i] = string(a)
		case int:
		default:
			args[i] = html.EscapeString(visible(fmt.Sprint(a)))
		}
	}
	if _, err := fmt.Fprintf(w, format, args...); err != nil && w.err == nil {
		w.err = err
	}
}

func (m *Matrix) header(w *writer, page Page) {
	world := page.Judge.World()
	count := func(n int, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprint(n, " ", many)
	}
	w.say("<header>\n<h1>Who may call whom</h1>\n<p>%s, %s, %s at %s.</p>\n",
		count(len(world.Policies), "policy", "policies"), count(len(m.Workloads), "workload", "workloads"),
		count(len(m.Externals), "other end", "other ends"), count(len(m.order), "port", "ports"))
	w.say("<ul class=\"legend\" aria-label=\"Legend\"><li><span>.</span>allowed</li><li><span>X</span>blocked</li><li><span>7</span>allowed as far as rules inside the protocol go (L7)</li><li><span>-</span>not judged</li></ul>\n")
	w.say("<details><summary>What was judged: %s</summary>\n<ul>\n", count(len(world.Files), "source", "sources"))
	for _, f := range world.Files {
		w.say("<li>%s</li>\n", f)
	}
	w.say("</ul></details>\n<details><summary>%s</summary>\n<table><thead><tr><th scope=\"col\">Policy</th><th scope=\"col\">From</th><th scope=\"col\">Workloads that it selects</th></tr></thead><tbody>\n", count(len(world.Policies), "policy", "policies"))
	for _, p := range world.Policies {
		w.say("<tr><td>%s</td><td>%s</td><td>%d</td></tr>\n", p.Ref, p.File, page.Judge.Selects(p))
	}
	w.say("</tbody></table></details>\n")
	if notes := world.Notes; len(notes) > 0 {
		w.say("<details><summary>%s</summary>\n<ul>\n", count(len(notes), "note", "notes"))
		for _, n := range notes {
			w.say("<li>%s</li>\n", n)
		}
		w.say("</ul></details>\n")
	}
	if len(page.Externals) > 0 {
		w.say("<details><summary>Who the other ends are</summary>\n<ul>\n")
		for _, x := range page.Externals {
			w.say("<li>%s: %s</li>\n", x.Title, x.Is)
		}
		w.say("</ul></details>\n")
	}
	w.say("</header>\n")
}

func (m *Matrix) controls(w *writer) {
	w.say("<div class=\"controls\" role=\"group\" aria-label=\"Port\" hidden>\n")
	for i, name := range m.order {
		w.say("<button type=\"button\" class=\"port\" aria-pressed=\"false\" aria-controls=\"port-%d\">%s</button>\n", i, name)
	}
	w.say("</div>\n<div class=\"controls\" role=\"group\" aria-label=\"View\" hidden>\n" +
		"<label>Filter by name <input type=\"search\" id=\"filter\" autocomplete=\"off\" spellcheck=\"false\"></label>\n" +
		"<label>in <select id=\"side\"><option value=\"both\">rows and columns</option><option value=\"rows\">rows (callers)</option><option value=\"columns\">columns (called)</option></select></label>\n" +
		"<label>By the policies of <select id=\"view\"><option value=\"combined\">both sides</option><option value=\"egress\">the caller alone</option><option value=\"ingress\">the called alone</option></select></label>\n</div>\n")
}

var cellClasses = map[byte]string{Allowed: "", Blocked: " class=\"x\"", ThroughL7: " class=\"l\"", NotJudged: " class=\"n\""}

func (m *Matrix) section(w *writer, i int, name string, names []string) {
	t, inside := m.Ports[name], len(m.Workloads)
	w.say("<section class=\"port\" id=\"port-%d\" aria-labelledby=\"head-%d\">\n<h2 id=\"head-%d\">%s</h2>\n<p class=\"dim\">%s</p>\n", i, i, i, name, m.sum(t))
	w.say("<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Matrix of %s\">\n<table class=\"matrix\">\n<caption>Each row may call the columns as their cells say, at %s</caption>\n<thead><tr><td class=\"corner\">caller \u2193 called \u2192</td>", name, name)
	kind := func(i int) raw {
		if i >= inside {
			return " class=\"outside\""
		}
		return ""
	}
	for k, n := range names {
		w.say("<th scope=\"col\"%s><span>%s</span></th>", kind(k), n)
	}
	w.say("</tr></thead>\n<tbody>\n")
	for r, n := range names {
		w.say("<tr><th scope=\"row\"%s>%s</th>", kind(r), n)
		for c := range names {
			var ch byte
			switch {
			case r < inside && c < inside:
				ch = t.Combined[r][c]
			case r < inside:
				ch = t.ToExternal[r][c-inside]
			case c < inside:
				ch = t.FromExternal[r-inside][c]
			default:
				w.WriteString("<td class=\"e\"></td>")
				continue
			}
			w.WriteString("<td" + cellClasses[ch] + ">")
			w.WriteByte(ch)
			w.WriteString("</td>")
		}
		w.say("</tr>\n")
	}
	w.say("</tbody></table></div>\n</section>\n")
}
