package chaos

import (
	"cmp"
	_ "embed" // the page
	"fmt"
	"html/template"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"portcullis/chaos/check"
)

//go:embed page.tmpl
var pageText string

var pageTemplate = template.Must(template.New("page").Parse(pageText))

// Judged is a history with what the checker made of it.
type Judged struct {
	History *check.History
	Result  *check.Result
}

// Page writes one page of the runs, that needs nothing from elsewhere.
func Page(out io.Writer, runs []Judged) error {
	var pages []*drawing
	for i, r := range runs {
		d := &drawing{N: i + 1, R: r.Result, h: r.History}
		d.draw()
		pages = append(pages, d)
	}
	return pageTemplate.Execute(out, pages)
}

// Measures of the drawing, in its own units.
const (
	leftEdge  = 90.0
	rightEdge = 1095.0
	faultRow  = 16.0
	ipRow     = 30.0
	maxIPs    = 24
)

// drawing is a run as the page shows it.
type drawing struct {
	N       int
	R       *check.Result
	Height  float64
	Bands   []shape // of faults, over everything
	Shapes  []shape
	Texts   []shape
	MoreIPs int

	h *check.History
}

type shape struct {
	Class      string
	X, Y, W, H float64
	Title      string
}

// Faults, Seconds, Command and Dropped are what the page says in words.
func (d *drawing) Faults() string {
	if len(d.R.Faults) == 0 {
		return "none"
	}
	return strings.Join(d.R.Faults, ", ")
}

// Seconds is how long the run took.
func (d *drawing) Seconds() string {
	return fmt.Sprintf("%.1f", time.Duration(d.R.End-d.R.Begin).Seconds())
}

// Command runs it again.
func (d *drawing) Command() string {
	if d.R.Target == "kubernetes" {
		s := fmt.Sprintf("portcullis chaos run %s --target kubernetes --nodes %s --seed %d --events %d", d.R.Scenario, strings.Join(d.R.Nodes, ","), d.R.Seed, d.R.Reuses)
		if len(d.R.Faults) > 0 {
			s += " --fault " + strings.Join(d.R.Faults, ",")
		}
		return s
	}
	s := fmt.Sprintf("portcullis chaos run %s --evidence %s --seed %d --events %d", d.R.Scenario, d.R.Evidence, d.R.Seed, d.R.Reuses)
	if len(d.R.Faults) > 0 {
		s += " --fault " + strings.Join(d.R.Faults, ",")
	}
	return s
}

type dropped struct {
	Reason string
	N      uint64
}

// Dropped is what was dropped, by reason.
func (d *drawing) Dropped() (out []dropped) {
	for _, reason := range slices.Sorted(maps.Keys(d.R.Dropped)) {
		out = append(out, dropped{reason, d.R.Dropped[reason]})
	}
	return out
}

func (d *drawing) x(t int64) float64 {
	t = min(max(t, d.R.Begin), d.R.End)
	return leftEdge + (rightEdge-leftEdge)*float64(t-d.R.Begin)/float64(max(1, d.R.End-d.R.Begin))
}

func (d *drawing) bar(class string, from, to int64, y, h float64, title string) shape {
	if to == 0 {
		to = d.R.End
	}
	x := d.x(from)
	return shape{class, x, y, max(1, d.x(to)-x), h, title}
}

func (d *drawing) draw() {
	y := d.faults()
	ips := d.changed()
	d.MoreIPs = max(0, len(ips)-maxIPs)
	rows := map[netip.Addr]float64{}
	for _, ip := range ips[:min(len(ips), maxIPs)] {
		rows[ip] = y
		d.Texts = append(d.Texts, shape{X: 2, Y: y + 17, Title: ip.String()})
		y += ipRow
	}
	d.holders(rows)
	d.messages(rows)
	for i := range d.Bands {
		d.Bands[i].H = y
	}
	d.Height = y + 4
}

// faults draws a row for each kind, and a band under everything for each fault.
func (d *drawing) faults() (y float64) {
	rows := map[string]float64{}
	for _, f := range d.h.Faults {
		if _, ok := rows[f.Kind]; !ok {
			rows[f.Kind] = y
			d.Texts = append(d.Texts, shape{X: 2, Y: y + 12, Title: f.Kind})
			y += faultRow
		}
		title := fmt.Sprintf("%s %s for %v", f.Kind, strings.Join(f.Nodes, ", "), time.Duration(cmp.Or(f.Ended, d.R.End)-f.From).Round(time.Millisecond))
		d.Shapes = append(d.Shapes, d.bar("bar", f.From, f.Ended, rows[f.Kind]+3, faultRow-6, title))
		d.Bands = append(d.Bands, d.bar("fault", f.From, f.Ended, 0, 0, title))
	}
	return y + 6
}

// changed are the IPv4 addresses that changed hands, for each workload has one.
func (d *drawing) changed() (ips []netip.Addr) {
	holders := map[netip.Addr]int{}
	for _, w := range d.h.Workloads {
		for _, ip := range w.IPs {
			if ip.Is4() {
				holders[ip]++
			}
		}
	}
	for ip, n := range holders {
		if n > 1 {
			ips = append(ips, ip)
		}
	}
	slices.SortFunc(ips, netip.Addr.Compare)
	return ips
}

func (d *drawing) holders(rows map[netip.Addr]float64) {
	for _, w := range d.h.Workloads {
		for _, ip := range w.IPs {
			y, ok := rows[ip]
			if !ok || w.Asked == 0 {
				continue
			}
			ready := w.Ready
			if ready == 0 {
				ready = cmp.Or(w.Left, d.R.End)
			}
			d.Shapes = append(d.Shapes, d.bar("wait", w.Asked, ready, y+2, 10, w.Name+" waits for the IP"))
			if w.Ready == 0 {
				continue
			}
			for i, n := range w.Names {
				from, to := max(n.Since, w.Ready), cmp.Or(w.Left, d.R.End)
				if i+1 < len(w.Names) {
					to = w.Names[i+1].Since
				}
				class := map[string]string{SleepV1: "v1", SleepV2: "v2"}[n.Identity]
				d.Shapes = append(d.Shapes, d.bar(cmp.Or(class, "vn"), from, to, y+2, 10, fmt.Sprintf("%s is %s", w.Name, n.Identity)))
			}
		}
	}
}

// messages draws a mark for what passed and what did not, at most one of a kind
// for each unit.
func (d *drawing) messages(rows map[netip.Addr]float64) {
	wrong := map[uint64]bool{}
	for _, v := range d.R.Violations {
		wrong[v.Message] = true
	}
	type cell struct {
		class string
		x, y  int
	}
	drawn := map[cell]bool{}
	twin := d.families()
	for _, m := range d.h.Messages {
		if m.Answers != 0 && !wrong[m.ID] {
			continue
		}
		y, ok := rows[twin[m.From.Addr()]]
		if !ok {
			if y, ok = rows[twin[m.To.Addr()]]; !ok {
				continue
			}
		}
		class, dy, h := "no", 21.0, 5.0
		switch {
		case wrong[m.ID]:
			class, dy, h = "bad", 0, ipRow-2
		case len(m.Received) > 0 || m.Connected != 0:
			class, dy = "ok", 14
		}
		x := d.x(m.Sent)
		if c := (cell{class, int(x), int(y)}); drawn[c] {
			continue
		} else {
			drawn[c] = true
		}
		d.Shapes = append(d.Shapes, shape{class, float64(int(x)), y + dy, 1, h, fmt.Sprintf("message %d: %s from %s to %s", m.ID, m.Protocol, m.From, m.To)})
	}
}

// families leads from each address of a workload to its IPv4 one.
func (d *drawing) families() map[netip.Addr]netip.Addr {
	out := map[netip.Addr]netip.Addr{}
	for _, w := range d.h.Workloads {
		for _, ip := range w.IPs {
			if !ip.Is4() {
				continue
			}
			for _, other := range w.IPs {
				out[other] = ip
			}
		}
	}
	return out
}
