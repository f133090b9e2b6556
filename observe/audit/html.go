package audit

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"maps"
	"slices"
	"strings"
	"time"
)

//go:embed report.tmpl
var reportPage string

// Sizes of the plots, in units of the SVG.
const (
	plotWidth, plotHeight = 720.0, 160.0
	laneHeight            = 22.0
	laneLeft              = 150.0
)

// A rectangle of a plot. Class is a colour's, 0 to 5.
type rect struct {
	X, Y, W, H float64
	Class      int
	Title      string
}

type lane struct {
	Y     float64
	Label string
	Rects []rect
}

type bar struct {
	Label string
	Count int
	Y, W  float64
}

// page is what the template draws.
type page struct {
	*Report
	Evidences []string // in the order of their colours
	OverTime  []rect
	MaxCount  int
	FlowKinds []string // in the order of their colours
	Flows     []rect
	MaxFlows  uint64
	Reasons   []bar
	Lanes     []lane
	LaneEnd   float64
	BarEnd    float64
	Broken    int
	Overlaps  int
	Generated time.Time
}

// HTML writes the report as one page that needs nothing else. Every text in it
// is escaped; it has no scripts.
func (r *Report) HTML(w io.Writer, now time.Time) error {
	p := &page{Report: r, Generated: now}
	for _, l := range r.Logs {
		if l.Broken != nil {
			p.Broken++
		}
	}
	for _, x := range r.Reuse {
		if x.Overlap > 0 {
			p.Overlaps++
		}
	}
	p.overTime()
	p.flows()
	p.reasons()
	p.lanes()
	t, err := template.New("report").Funcs(template.FuncMap{
		"when": func(t time.Time) string {
			if t.IsZero() {
				return "-"
			}
			return t.UTC().Format("2006-01-02 15:04:05Z")
		},
		"span": span, "join": func(s []string) string { return Plain(strings.Join(s, ", ")) },
		"class": func(evidence string) int { return slices.Index(p.Evidences, evidence) % colours },
		"flow":  func(kind string) int { return slices.Index(p.FlowKinds, kind) % colours },
		"add":   func(a, b float64) float64 { return a + b },
		"num":   func(v float64) string { return fmt.Sprintf("%.1f", v) },
		"plain": func(s any) string { return Plain(fmt.Sprint(s)) }, // texts of any type
	}).Parse(reportPage)
	if err != nil {
		return err
	}
	return t.Execute(w, p)
}

// colours is how many the page has.
const colours = 6

// span writes seconds for people.
func span(seconds float64) string {
	d := time.Duration(seconds * float64(time.Second))
	switch {
	case d <= 0:
		return "-"
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return d.Round(100 * time.Millisecond).String()
	}
	return d.Round(time.Second).String()
}

func (p *page) overTime() {
	p.Evidences = slices.Sorted(maps.Keys(p.Evidence))
	for _, b := range p.Buckets {
		n := b.Refusals
		for _, c := range b.Evidence {
			n += c
		}
		p.MaxCount = max(p.MaxCount, n)
	}
	if p.MaxCount == 0 {
		return
	}
	w := plotWidth / float64(len(p.Buckets))
	for i, b := range p.Buckets {
		y := plotHeight
		draw := func(n, class int, what string) {
			if n == 0 {
				return
			}
			h := plotHeight * float64(n) / float64(p.MaxCount)
			y -= h
			p.OverTime = append(p.OverTime, rect{float64(i) * w, y, w - 1, h, class, fmt.Sprintf("%s: %d %s", b.From.UTC().Format(time.RFC3339), n, what)})
		}
		for k, e := range p.Evidences {
			draw(b.Evidence[e], k%colours, "confirmed on "+e)
		}
		draw(b.Refusals, colours, "refused")
	}
}

// flows draws the admitted flows over time, by evidence.
func (p *page) flows() {
	p.FlowKinds = slices.Sorted(maps.Keys(p.Coverage))
	for _, b := range p.Buckets {
		n := uint64(0)
		for _, c := range b.Flows {
			n += c
		}
		p.MaxFlows = max(p.MaxFlows, n)
	}
	if p.MaxFlows == 0 {
		return
	}
	w := plotWidth / float64(len(p.Buckets))
	for i, b := range p.Buckets {
		y := plotHeight
		for k, kind := range p.FlowKinds {
			n := b.Flows[kind]
			if n == 0 {
				continue
			}
			h := plotHeight * float64(n) / float64(p.MaxFlows)
			y -= h
			p.Flows = append(p.Flows, rect{float64(i) * w, y, w - 1, h, k % colours, fmt.Sprintf("%s: %d flows, %s", b.From.UTC().Format(time.RFC3339), n, kind)})
		}
	}
}

func (p *page) reasons() {
	count := map[string]int{}
	most := 0
	for _, r := range p.Refusals {
		count[r.Reason] += r.Count
		most = max(most, count[r.Reason])
	}
	names := slices.SortedFunc(maps.Keys(count), func(a, b string) int {
		if count[a] != count[b] {
			return count[b] - count[a]
		}
		return strings.Compare(a, b)
	})
	for i, n := range names[:min(len(names), 20)] {
		p.Reasons = append(p.Reasons, bar{n, count[n], float64(i) * laneHeight, 400 * float64(count[n]) / float64(most)})
	}
	p.BarEnd = float64(len(p.Reasons)) * laneHeight
}

func (p *page) lanes() {
	whole := p.Until.Sub(p.Since).Seconds()
	if whole <= 0 {
		return
	}
	at := func(t time.Time) float64 {
		return (plotWidth - laneLeft) * min(1, max(0, t.Sub(p.Since).Seconds()/whole))
	}
	for i, ip := range slices.Sorted(maps.Keys(p.Tenures)) {
		l := lane{Y: float64(i) * laneHeight, Label: ip}
		for k, t := range p.Tenures[ip] {
			x := at(t.From)
			l.Rects = append(l.Rects, rect{laneLeft + x, l.Y + 3, max(1, at(t.Until)-x), laneHeight - 6, k % colours,
				fmt.Sprintf("%s held %s from %s to %s", t.Identity, ip, t.From.UTC().Format(time.RFC3339), t.Until.UTC().Format(time.RFC3339))})
		}
		p.Lanes = append(p.Lanes, l)
	}
	p.LaneEnd = float64(len(p.Lanes)) * laneHeight
}
