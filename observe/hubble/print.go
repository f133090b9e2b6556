package hubble

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	flowpb "github.com/cilium/cilium/api/v1/flow"
	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/observe/flow"
)

// Form is how flows are printed.
type Form string

// The forms: a line for each flow, a block for each, columns, and JSON as other
// clients of Hubble's API write it.
const (
	Compact Form = "compact"
	Dict    Form = "dict"
	Table   Form = "table"
	JSON    Form = "json"
	Connect Form = "process" // process_connect and process_accept, see ConnectJSON
)

// Printer writes what a server answers. Not safe for concurrent use.
type Printer struct {
	Form   Form
	Colour bool // of verdicts; never of a table, whose columns are counted in bytes
	Node   bool // the node's name too
	// Out gets flows; Err what is not one: lost flows, nodes that do not answer.
	Out, Err io.Writer
	Location *time.Location // nil: local time

	tab   *tabwriter.Writer
	lines int
}

// Close writes what is left.
func (p *Printer) Close() error {
	if p.tab == nil {
		return nil
	}
	return p.tab.Flush()
}

// Print writes one answer.
func (p *Printer) Print(resp *observerpb.GetFlowsResponse) error {
	if lost := resp.GetLostEvents(); lost != nil && p.Form != JSON {
		_, err := fmt.Fprintf(p.Err, "%d flows are missing on %s (%s)\n", lost.GetNumEventsLost(), resp.GetNodeName(), lostText[lost.GetSource()])
		return err
	}
	if s := resp.GetNodeStatus(); s != nil && p.Form != JSON {
		text := map[string]string{"NODE_UNAVAILABLE": "no answer from", "NODE_ERROR": "an error at", "NODE_CONNECTED": "flows come from", "NODE_GONE": "gone:"}[s.GetStateChange().String()]
		_, err := fmt.Fprintf(p.Err, "%s %s%s\n", text, strings.Join(s.GetNodeNames(), ", "), after(": ", clean(s.GetMessage())))
		return err
	}
	f := resp.GetFlow()
	if f == nil && p.Form != JSON {
		return nil // of a later version
	}
	p.lines++
	switch p.Form {
	case Connect:
		b, err := ConnectJSON(f)
		if err == nil && b != nil {
			_, err = p.Out.Write(append(b, '\n'))
		}
		return err
	case JSON:
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(resp)
		if err == nil {
			_, err = p.Out.Write(append(b, '\n'))
		}
		return err
	case Table:
		return p.table(f)
	case Dict:
		return p.dict(f)
	}
	_, err := fmt.Fprintln(p.Out, p.line(f))
	return err
}

var lostText = map[flowpb.LostEventSource]string{
	flowpb.LostEventSource_UNKNOWN_LOST_EVENT_SOURCE: "their source had had its share, --events-per-source",
	flowpb.LostEventSource_PERF_EVENT_RING_BUFFER:    "the kernel's ring was full",
	flowpb.LostEventSource_OBSERVER_EVENTS_QUEUE:     "a queue of the agent was full",
	flowpb.LostEventSource_HUBBLE_RING_BUFFER:        "this reader was too slow; filters help",
}

// after returns text behind a separator, "" for none.
func after(sep, text string) string {
	if text == "" {
		return ""
	}
	return sep + text
}

func (p *Printer) time(f *flowpb.Flow, layout string) string {
	if f.GetTime() == nil {
		return "-"
	}
	at := f.GetTime().AsTime()
	if p.Location != nil {
		return at.In(p.Location).Format(layout)
	}
	return at.Local().Format(layout)
}

// line is one flow in at most 100 columns, mostly:
//
//	22:50:19.123 default/tiefighter:43210 -> default/deathstar:80 DROPPED policy-denied lease 3.2s TCP Flags: SYN
func (p *Printer) line(f *flowpb.Flow) string {
	from, to, arrow := end(f, f.GetSource(), true), end(f, f.GetDestination(), false), "->"
	if f.GetIsReply().GetValue() {
		from, to, arrow = to, from, "<-"
	}
	facts, _ := FactsOf(f)
	words := []string{p.time(f, "15:04:05.000")}
	if p.Node {
		words = append(words, "["+clean(f.GetNodeName())+"]")
	}
	words = append(words, from, arrow, to, p.verdict(f))
	for _, w := range []string{reason(f, facts), believed(facts), short(f), by(facts)} {
		if w != "" {
			words = append(words, w)
		}
	}
	return strings.Join(words, " ")
}

func (p *Printer) table(f *flowpb.Flow) error {
	if p.tab == nil {
		p.tab = tabwriter.NewWriter(p.Out, 0, 8, 2, ' ', 0)
		node := ""
		if p.Node {
			node = "NODE\t"
		}
		fmt.Fprintf(p.tab, "TIME\t%sSOURCE\tDESTINATION\tVERDICT\tREASON\tEVIDENCE\tSUMMARY\n", node)
	}
	facts, _ := FactsOf(f)
	node := ""
	if p.Node {
		node = clean(f.GetNodeName()) + "\t"
	}
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	_, err := fmt.Fprintf(p.tab, "%s\t%s%s\t%s\t%s\t%s\t%s\t%s\n", p.time(f, "15:04:05.000"), node, end(f, f.GetSource(), true), end(f, f.GetDestination(), false),
		f.GetVerdict(), dash(reason(f, facts)), dash(believed(facts)), short(f))
	return err
}

func (p *Printer) dict(f *flowpb.Flow) error {
	facts, _ := FactsOf(f)
	var b strings.Builder
	if p.lines > 1 {
		b.WriteString("------------\n")
	}
	row := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%12s: %s\n", name, value)
		}
	}
	row("TIME", p.time(f, "Jan 02 15:04:05.000"))
	row("NODE", clean(f.GetNodeName()))
	for _, e := range []struct {
		name    string
		end     *flowpb.Endpoint
		source  bool
		spiffe  string
		service *flowpb.Service
		names   []string
	}{{"SOURCE", f.GetSource(), true, facts.SourceSPIFFE, f.GetSourceService(), f.GetSourceNames()},
		{"DESTINATION", f.GetDestination(), false, facts.DestSPIFFE, f.GetDestinationService(), f.GetDestinationNames()}} {
		row(e.name, end(f, e.end, e.source))
		row("LABELS", clean(strings.Join(e.end.GetLabels(), " ")))
		row("SPIFFE ID", clean(e.spiffe))
		for _, w := range e.end.GetWorkloads() {
			row("WORKLOAD", clean(w.GetKind()+" "+w.GetName()))
		}
		row("SERVICE", clean(strings.TrimPrefix(e.service.GetNamespace()+"/"+e.service.GetName(), "/")))
		row("NAMES", clean(strings.Join(e.names, " ")))
	}
	if facts.Called.IsValid() {
		row("CALLED", facts.Called.String())
	}
	row("TYPE", typeName(f))
	row("VERDICT", p.verdict(f)+after(" ", reason(f, facts)))
	row("POLICY", clean(facts.Policy))
	row("EVIDENCE", believed(facts))
	if facts.Generation != 0 {
		row("GENERATION", fmt.Sprint(facts.Generation))
	}
	if facts.LeaseLeft != 0 {
		row("LEASE LEFT", flow.Age(facts.LeaseLeft))
	}
	if facts.Held != 0 {
		row("HELD", flow.Age(facts.Held))
	}
	if pr := facts.Process; pr != nil {
		row("PROCESS", fmt.Sprintf("%d %s %s (uid %d, cwd %s)", pr.PID, clean(pr.Binary), clean(pr.Arguments), pr.UID, clean(pr.CWD)))
	}
	//lint:ignore SA1019 hubble's clients still read it
	row("SUMMARY", clean(f.GetSummary()))
	_, err := io.WriteString(p.Out, b.String())
	return err
}

// end names one side of a flow: its pod where it is known, else its address, and
// the name by which it was called, its service, its namespace or its reserved name.
func end(f *flowpb.Flow, e *flowpb.Endpoint, source bool) string {
	from, to := ports(f)
	ip, port := f.GetIP().GetDestination(), to
	if source {
		ip, port = f.GetIP().GetSource(), from
	}
	if name := e.GetPodName(); name != "" {
		return clean(e.GetNamespace() + "/" + name + after(":", port))
	}
	who, names, service := e.GetNamespace(), f.GetDestinationNames(), f.GetDestinationService()
	if source {
		names, service = f.GetSourceNames(), f.GetSourceService()
	}
	for _, l := range e.GetLabels() {
		if r, ok := strings.CutPrefix(l, "reserved:"); ok {
			who = r
		}
	}
	if strings.Contains(ip, ":") && port != "" {
		ip = "[" + ip + "]"
	}
	out := ip + after(":", port)
	switch {
	case len(names) > 0:
		who = names[0]
	case service.GetName() != "":
		who = "service " + service.GetNamespace() + "/" + service.GetName()
	}
	if who != "" {
		out += "(" + who + ")"
	}
	return clean(out)
}

func (p *Printer) verdict(f *flowpb.Flow) string {
	v := f.GetVerdict().String()
	if !p.Colour {
		return v
	}
	colour := map[flowpb.Verdict]string{flowpb.Verdict_FORWARDED: "32", flowpb.Verdict_DROPPED: "31", flowpb.Verdict_ERROR: "31"}[f.GetVerdict()]
	if colour == "" {
		colour = "33"
	}
	return "\x1b[" + colour + "m" + v + "\x1b[0m"
}

func reason(f *flowpb.Flow, facts Facts) string {
	switch {
	case facts.Reason != "" && facts.Reason != "none":
		return facts.Reason
	case facts.Reason == "" && f.GetVerdict() == flowpb.Verdict_DROPPED:
		return f.GetDropReasonDesc().String() // of another server
	}
	return ""
}

// believed is the evidence, and how old the binding is that it is of.
func believed(facts Facts) string {
	if facts.Generation == 0 {
		return facts.Evidence
	}
	return facts.Evidence + " " + flow.Age(facts.BindingAge)
}

func by(facts Facts) string {
	if facts.Process == nil {
		return ""
	}
	return "by " + clean(facts.Process.Binary)
}

// short is the summary without what has its own column.
func short(f *flowpb.Flow) string {
	//lint:ignore SA1019 hubble's clients still read it
	s, _, _ := strings.Cut(clean(f.GetSummary()), "; ")
	return strings.TrimPrefix(s, "TCP Flags: ")
}

func typeName(f *flowpb.Flow) string {
	for name, t := range eventTypes {
		if t != f.GetEventType().GetType() {
			continue
		}
		for sub, n := range subTypes {
			if t == eventTrace && n == f.GetEventType().GetSubType() {
				return name + ":" + sub
			}
		}
		return name
	}
	return fmt.Sprint(f.GetEventType().GetType())
}

// clean replaces what would write to the terminal: workloads choose some of these
// bytes.
func clean(s string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c >= 0x7f && c < 0xa0 {
			return '?'
		}
		return c
	}, s)
}
