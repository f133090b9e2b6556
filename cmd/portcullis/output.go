package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/observe/flow"
)

// callTimeout bounds one question to the agent.
const callTimeout = 10 * time.Second

// output is the value of --output.
type output string

const (
	outTable output = "table"
	outJSON  output = "json"
	outYAML  output = "yaml"
	outHTML  output = "html"
)

// outputFlag is the flag of the output's form.
type outputFlag struct {
	value *output
	forms []output
}

func (f outputFlag) String() string { return string(*f.value) }

func (f outputFlag) Type() string { return "format" }

func (f outputFlag) Set(s string) error {
	if !slices.Contains(f.forms, output(s)) {
		return fmt.Errorf("there is no format %q: want %s", s, f.list())
	}
	*f.value = output(s)
	return nil
}

// list is "table, json or yaml".
func (f outputFlag) list() string {
	var words []string
	for _, o := range f.forms {
		words = append(words, string(o))
	}
	last := len(words) - 1
	return strings.Join(words[:last], ", ") + " or " + words[last]
}

// addOutput gives a command its --output flag: table, json, yaml, and what
// further forms it has.
func addOutput(cmd *cobra.Command, more ...output) *output {
	o := outTable
	f := outputFlag{value: &o, forms: append([]output{outTable, outJSON, outYAML}, more...)}
	cmd.Flags().VarP(f, "output", "o", f.list()+" (PORTCULLIS_OUTPUT)")
	var words []cobra.Completion
	for _, o := range f.forms {
		words = append(words, string(o))
	}
	if err := cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err) // the flag stands a few lines above
	}
	return &o
}

// ask connects to the agent and calls f, within callTimeout.
func ask(ctx context.Context, env *Env, f func(context.Context, *api.Client) error) error {
	client, err := api.Dial(env.socket)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return f(ctx, client)
}

// explain says in plain words what an error of the agent means.
func explain(err error) error {
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	switch s.Code() {
	case codes.Unavailable:
		return fmt.Errorf("lost the agent in the middle of the call (%s): see its log, then try again", s.Message())
	case codes.DeadlineExceeded:
		return fmt.Errorf("the agent did not answer within %s: it may be overloaded or stuck: see its log", callTimeout)
	case codes.Unimplemented:
		return errors.New("the running agent does not know this command: it is older than this binary: restart it")
	case codes.Canceled:
		return errors.New("interrupted")
	}
	return errors.New(s.Message())
}

// list prints messages: json and yaml as one list, table by rows.
func list[M proto.Message](w io.Writer, o output, items []M, rows func(*tabwriter.Writer)) error {
	if o == outTable {
		return table(w, gap, rows)
	}
	raw := make([]json.RawMessage, len(items))
	for i, m := range items {
		b, err := marshal.Marshal(m)
		if err != nil {
			return err
		}
		raw[i] = b
	}
	b, err := json.Marshal(raw)
	if err != nil {
		return err
	}
	return structured(w, o, b)
}

// gap is the number of spaces between the columns of a listing.
const gap = 3

// table prints rows, aligned, without blanks at the ends of lines.
func table(w io.Writer, gap int, rows func(*tabwriter.Writer)) error {
	var b bytes.Buffer
	tw := tabwriter.NewWriter(&b, 0, 0, gap, ' ', 0)
	rows(tw)
	if err := tw.Flush(); err != nil {
		return err
	}
	var out bytes.Buffer
	for line := range bytes.Lines(b.Bytes()) {
		out.Write(bytes.TrimRight(line, " \n"))
		out.WriteByte('\n')
	}
	_, err := w.Write(out.Bytes())
	return err
}

// object prints one message.
func object(w io.Writer, o output, m proto.Message) error {
	b, err := marshal.Marshal(m)
	if err != nil {
		return err
	}
	return structured(w, o, b)
}

// Every field is there, also the empty ones: readers need no defaults.
var marshal = protojson.MarshalOptions{EmitDefaultValues: true}

// structured prints JSON, indented, or the same as YAML.
func structured(w io.Writer, o output, b []byte) error {
	if o == outYAML {
		var doc yaml.Node // JSON is YAML; a node keeps the order of the fields
		if err := yaml.Unmarshal(b, &doc); err != nil {
			return err
		}
		plain(&doc)
		enc := yaml.NewEncoder(w)
		enc.SetIndent(2)
		return errors.Join(enc.Encode(&doc), enc.Close())
	}
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err := w.Write(out.Bytes())
	return err
}

// plain drops JSON's quotes and braces; what must be quoted still is.
func plain(n *yaml.Node) {
	n.Style = 0
	for _, c := range n.Content {
		plain(c)
	}
}

// row writes one line of a table. An empty cell is shown as -, a blank one as
// nothing.
func row(tw *tabwriter.Writer, cells ...any) {
	s := make([]string, len(cells))
	for i, c := range cells {
		if s[i] = harmless(fmt.Sprint(c)); s[i] == "" {
			s[i] = "-"
		}
	}
	fmt.Fprintln(tw, strings.Join(s, "\t"))
}

// span writes a duration; nil is "-".
func span(d *durationpb.Duration) string {
	if d == nil {
		return "-"
	}
	return flow.Age(d.AsDuration())
}

// since writes how long ago something was; a zero time is "-".
func since(env *Env, t interface{ AsTime() time.Time }, set bool) string {
	if !set {
		return "-"
	}
	return flow.Age(max(0, env.Now().Sub(t.AsTime()))) + " ago"
}

func workload(w *api.Workload) string {
	switch {
	case w.GetName() != "":
		return w.GetNamespace() + "/" + w.GetName()
	case w.GetUid() != "":
		return w.GetUid()
	}
	return "-"
}

func identityText(id *api.Identity) string {
	if id == nil {
		return "-"
	}
	return fmt.Sprintf("%d %s", id.GetNumeric(), id.GetText())
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// oneLine keeps a text of several lines within a row of a table.
func oneLine(s string) string { return harmless(strings.ReplaceAll(strings.TrimSpace(s), "\n", "; ")) }

// harmless keeps from a terminal what would command it: control characters, but
// newlines and tabs, and letters that turn the direction of writing. What a node,
// a pod or an API server says need not be meant well.
func harmless(s string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && (unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r)) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
