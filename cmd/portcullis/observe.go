package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/observe/flow"
	"portcullis/observe/hubble"
)

// observeFlags are the settings of `observe`.
type observeFlags struct {
	server, form      string
	since, until      string
	colour            func(*Env) (bool, error)
	last, first       uint64
	asked             func(flag string) bool // whether it was given
	all, follow, node bool
	evidence, reasons []string
	extra             hubble.Extra
	ask               hubble.Ask
}

func newObserveCmd(env *Env) *cobra.Command {
	var o observeFlags
	cmd := &cobra.Command{
		Use:   "observe",
		Short: "Show the flows that the agent keeps, and those that come",
		Long: `Show the flows that the agent keeps, and with --follow those that come.

It asks the agent by Hubble's API, or a relay, which knows all nodes (--server). A
flow is shown when it meets every filter that is given; a filter that is given
several times is met by any of its values. --not turns round the one filter that
follows it.`,
		Example: `  portcullis observe --verdict DROPPED --last 50
  portcullis observe -f --namespace default --to-port 80 --not --label org=empire
  portcullis observe --evidence watch --older-than 10m -o dict`,
		Args: usageArgs(noArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			req, err := o.request(env.Now())
			if err != nil {
				return usageError{err}
			}
			p, err := o.printer(env)
			if err != nil {
				return usageError{err}
			}
			return observe(cmd.Context(), o.address(env), req, p)
		},
	}
	o.addTo(cmd.Flags())
	return cmd
}

func (o *observeFlags) addTo(f *pflag.FlagSet) {
	f.SortFlags = false
	o.asked = f.Changed
	f.StringVar(&o.server, "server", "", "unix socket of the Hubble API of an agent or a relay (default: hubble.sock beside --socket)")
	f.Uint64Var(&o.last, "last", 20, "so many of the last flows")
	f.Uint64Var(&o.first, "first", 0, "so many of the first flows that are kept")
	f.BoolVar(&o.all, "all", false, "all flows that are kept")
	f.BoolVarP(&o.follow, "follow", "f", false, "those that come too, until Ctrl-C")
	f.StringVar(&o.since, "since", "", "not older than this: 5m, or a time (RFC 3339)")
	f.StringVar(&o.until, "until", "", "not younger than this")
	f.StringSliceVar(&o.evidence, "evidence", nil, "on what the peer's binding was believed: none, watch, lease, svid, local")
	f.StringSliceVar(&o.reasons, "reason", nil, "of a drop, in our words: policy-denied, stale-lease, ...")
	f.StringSliceVar(&o.extra.Processes, "process", nil, "binary that opened or accepted the connection: its path or name, with * and ?")
	f.DurationVar(&o.extra.OlderThan, "older-than", 0, "the peer's binding is older than this")
	f.Var(notFlag{&o.ask}, "not", "show what the next filter does not choose")
	f.Lookup("not").NoOptDefVal = "true"
	for _, w := range hubble.Words {
		f.VarP(wordFlag{&o.ask, w.Name}, w.Name, w.Short, w.Help)
	}
	f.StringVarP(&o.form, "output", "o", "compact", "compact, dict, table, json, or process (process_connect of those whose process is known): one object per line (PORTCULLIS_OUTPUT)")
	f.BoolVar(&o.node, "print-node-name", false, "the node's name too")
	o.colour = addColour(f)
}

// addColour adds --color. The function that it returns tells, once the flags are
// parsed, whether to write in colours.
func addColour(f *pflag.FlagSet) func(*Env) (bool, error) {
	text := f.String("color", "auto", "of verdicts: auto (on a terminal), always or never")
	return func(env *Env) (bool, error) {
		switch *text {
		case "auto":
			return env.Getenv("NO_COLOR") == "" && isTerminal(env.Stdout), nil
		case "always":
			return true, nil
		case "never":
			return false, nil
		}
		return false, usagef("--color %q: want auto, always or never", *text)
	}
}

// wordFlag hands a filter to the Ask, in the order of the command line.
type wordFlag struct {
	ask  *hubble.Ask
	name string
}

func (w wordFlag) Set(v string) error { return w.ask.Set(w.name, v) }
func (w wordFlag) String() string     { return "" }
func (w wordFlag) Type() string       { return "strings" }

type notFlag struct{ ask *hubble.Ask }

func (n notFlag) Set(v string) error {
	if yes, err := strconv.ParseBool(v); err != nil || !yes {
		return errors.New("it takes no value")
	}
	return n.ask.Not()
}
func (n notFlag) String() string { return "" }
func (n notFlag) Type() string   { return "bool" }

// request makes the request of the flags.
func (o *observeFlags) request(now time.Time) (req *observerpb.GetFlowsRequest, err error) {
	if o.first > 0 && o.follow || o.first > 0 && o.all {
		return nil, errors.New("--first does not go with --follow or --all: it is of the past, and ends")
	}
	req = &observerpb.GetFlowsRequest{Follow: o.follow, Number: o.last}
	if req.Whitelist, req.Blacklist, err = o.ask.Filters(); err != nil {
		return nil, err
	}
	if req.Since, err = moment(o.since, now); err != nil {
		return nil, fmt.Errorf("--since: %w", err)
	}
	if req.Until, err = moment(o.until, now); err != nil {
		return nil, fmt.Errorf("--until: %w", err)
	}
	switch {
	case o.first > 0:
		req.First, req.Number = true, o.first
	case o.all || !o.asked("last") && (req.Since != nil || req.Until != nil):
		req.Number = 1<<64 - 1
	}
	var errs []error
	for _, w := range o.evidence {
		e, err := flow.ParseEvidence(w)
		o.extra.Evidence, errs = append(o.extra.Evidence, e), append(errs, err)
	}
	for _, w := range o.reasons {
		r, err := flow.ParseReason(w)
		o.extra.Reasons, errs = append(o.extra.Reasons, r), append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	req.Extensions, err = o.extra.Extension()
	return req, err
}

// moment parses a time, or how long ago it was.
func moment(s string, now time.Time) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(now.Add(-d)), nil
	}
	t, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return nil, fmt.Errorf("%q: want how long ago (5m), or a time (2026-11-22T22:00:00Z)", s)
	}
	return timestamppb.New(t), nil
}

func (o *observeFlags) printer(env *Env) (*hubble.Printer, error) {
	p := &hubble.Printer{Form: hubble.Form(o.form), Node: o.node, Out: env.Stdout, Err: env.Stderr}
	switch p.Form {
	case hubble.Compact, hubble.Dict, hubble.JSON, hubble.Connect:
	case hubble.Table:
		if o.follow {
			return nil, errors.New("-o table needs all flows before it can align them: it does not go with --follow")
		}
	default:
		return nil, fmt.Errorf("-o %q: want compact, dict, table, json or process", o.form)
	}
	var err error
	p.Colour, err = o.colour(env)
	return p, err
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (o *observeFlags) address(env *Env) string {
	if o.server != "" {
		return strings.TrimPrefix(o.server, "unix://")
	}
	return filepath.Join(filepath.Dir(env.socket), "hubble.sock")
}

// observe asks a server and prints what it answers, until that ends.
func observe(ctx context.Context, socket string, req *observerpb.GetFlowsRequest, p *hubble.Printer) error {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, req)
	for err == nil {
		var resp *observerpb.GetFlowsResponse
		if resp, err = stream.Recv(); err == nil {
			err = p.Print(resp)
		}
	}
	if status.Code(err) == codes.Unavailable {
		err = fmt.Errorf("no answer at %s: is the agent running, and its --flows and --hubble-socket as they were? (%s)", socket, status.Convert(err).Message())
	}
	if errors.Is(err, io.EOF) || ctx.Err() != nil {
		err = nil // all was shown, or asked to stop
	}
	return errors.Join(err, p.Close())
}
