package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/observe/flow"
)

func newMonitorCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "monitor",
		Short: "Show flow events as they happen, until Ctrl-C",
		Long: `Show flow events as they happen, until Ctrl-C: the first packet of each flow and
direction that passes, every packet that is held, and every packet that is dropped;
and every request, query of DNS and hello of TLS that the node's proxy judges.

  -> endpoint 24 ...            passed, towards endpoint 24 of this node
  <- endpoint 24 ...            passed, sent by endpoint 24 of this node
  .. hold ...                   kept until its peer's binding is confirmed
  xx drop (policy-denied) ...   dropped, and why
  >> steer endpoint 24 ...      on its way through the node's proxy
  -> Request http from 24 ...   judged by the proxy: forwarded, denied, malformed, failed

Query strings and header values are not shown, nor recorded, unless the agent is told
to (--record-queries, --record-header).

Filters: an event is shown when it matches every filter that is given; a filter
that is given several times matches any of its values. A verdict of policy is a drop or
a trace too.`,
		Example: "  portcullis monitor --verdict drop\n  portcullis monitor --label org=alliance --port 80 -o json\n  portcullis monitor --related-to default/deathstar --type drop,l7",
		Args:    usageArgs(noArgs),
	}
	colour := addColour(cmd.Flags())
	filters := addFilters(cmd.Flags())
	count := cmd.Flags().UintP("count", "n", 0, "stop after this many events; 0: never")
	var line flow.Formatter
	cmd.Flags().BoolVarP(&line.Time, "timestamps", "t", false, "the time first")
	cmd.Flags().BoolVarP(&line.Verbose, "verbose", "v", false, "the labels of both ends too")
	o := addOutput(cmd)
	cmd.Flags().Lookup("output").Usage = "table or json, one object per line (PORTCULLIS_OUTPUT)"

	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *o == outYAML {
			return usagef("monitor writes table or json, not yaml")
		}
		var err error
		if line.Colour, err = colour(env); err != nil {
			return err
		}
		req, err := filters()
		if err != nil {
			return err
		}
		client, err := api.Dial(env.socket)
		if err != nil {
			return err
		}
		defer client.Close()
		stream, err := client.Monitor(cmd.Context(), req)
		if err != nil {
			return err
		}
		if _, err := stream.Header(); err == nil { // subscribed: nothing is missed from here
			fmt.Fprintln(env.Stderr, "Listening for events. Press Ctrl-C to quit.")
		}
		err = printEvents(env, stream, *o, line, uint64(*count))
		if cmd.Context().Err() != nil {
			return nil // asked to stop
		}
		return err
	}
	return cmd
}

// addFilters adds the filters' flags. The function that it returns makes the
// request of them, once they are parsed.
func addFilters(f *pflag.FlagSet) func() (*api.MonitorRequest, error) {
	req := &api.MonitorRequest{}
	var ports, endpoints []uint
	f.StringSliceVar(&req.Related, "related-to", nil, "endpoint of this node, by its id or as NAMESPACE/NAME: it judged, or is either end")
	f.StringSliceVar(&req.Types, "type", nil, fmt.Sprintf("%s, %s (packets that are not), %s (policy decided), %s (requests that the proxy judged), %s",
		flow.TypeDrop, flow.TypeTrace, flow.TypeVerdict, flow.TypeL7, flow.TypePacket))
	f.StringSliceVar(&req.Verdicts, "verdict", nil, strings.Join(flow.Words(abi.VerdictMax), ", "))
	f.StringSliceVar(&req.Reasons, "reason", nil, "of a drop: policy-denied, refused, stale-lease, ...")
	f.StringSliceVar(&req.Directions, "direction", nil, "as seen from the workload: "+strings.Join(flow.Words(abi.DirMax), ", "))
	f.StringSliceVar(&req.Prefixes, "ip", nil, "address or prefix of either end")
	f.StringArrayVar(&req.Labels, "label", nil, "[source:]key[=value] of either end's identity")
	f.UintSliceVar(&ports, "port", nil, "of either end")
	f.StringSliceVar(&req.Protocols, "protocol", nil, "TCP, UDP, SCTP, ICMPv4, ICMPv6 or a number")
	f.UintSliceVar(&endpoints, "endpoint", nil, "id of an endpoint of this node")
	f.StringSliceVar(&req.Workloads, "workload", nil, "NAMESPACE/NAME of either end, where known")
	for _, name := range []string{"port", "endpoint"} {
		f.Lookup(name).DefValue = "" // else the help shows an empty list
	}
	return func() (*api.MonitorRequest, error) {
		for _, p := range ports {
			req.Ports = append(req.Ports, uint32(min(p, 1<<31)))
		}
		for _, e := range endpoints {
			req.Endpoints = append(req.Endpoints, uint32(min(e, 1<<31)))
		}
		if _, err := req.Filter(); err != nil { // the agent would say the same
			return nil, usageError{err}
		}
		return req, nil
	}
}

// printEvents prints until the stream ends or count events were printed.
func printEvents(env *Env, stream interface {
	Recv() (*api.MonitorResponse, error)
}, o output, line flow.Formatter, count uint64) error {
	for n := uint64(0); count == 0 || n < count; {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return status.Error(codes.Unavailable, "the agent ended the stream")
		}
		if err != nil {
			return err
		}
		if lost := msg.GetLost(); lost != nil {
			fmt.Fprintf(env.Stderr, "%s lost: %s\n", plural(int(lost.GetCount()), "event", "events"), lostWhere(lost.GetWhere()))
			continue
		}
		if msg.GetFlow() == nil {
			continue // an event of a later version
		}
		rec, err := api.ToRecord(msg.GetFlow())
		if err != nil {
			return fmt.Errorf("the agent speaks another version than this command: %w", err)
		}
		if o == outJSON {
			b, err := json.Marshal(rec)
			if err != nil {
				return err
			}
			if _, err := env.Stdout.Write(append(b, '\n')); err != nil {
				return err
			}
		} else {
			rec.Time = rec.Time.Local()
			if _, err := fmt.Fprintln(env.Stdout, line.Line(&rec)); err != nil {
				return err
			}
		}
		n++
	}
	return nil
}

func lostWhere(where string) string {
	switch where {
	case "kernel":
		return "the kernel's ring was full"
	case "source":
		return "their source had had its share (--events-per-source)"
	case "proxy":
		return "the proxy judged more requests than it could tell of"
	}
	return "this command was too slow; filters help"
}
