package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"portcullis/agent/api"
	"portcullis/identity"
)

func newEndpointCmd(env *Env) *cobra.Command {
	ls := &cobra.Command{
		Use:   "list",
		Short: "List this node's endpoints",
		Args:  usageArgs(noArgs),
	}
	o := addOutput(ls)
	ls.RunE = func(cmd *cobra.Command, _ []string) error {
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			res, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
			if err != nil {
				return err
			}
			if *o == outTable {
				return endpointTable(env.Stdout, res.GetEndpoints(), columns(env))
			}
			return list(env.Stdout, *o, res.GetEndpoints(), nil)
		})
	}
	return group("endpoint", "This node's workloads, as the datapath knows them", ls, newEndpointGetCmd(env), newEndpointRelabelCmd(env))
}

func newEndpointGetCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "get (NAMESPACE/NAME | UID | ID)",
		Short: "Show one endpoint in full; of a quarantined one, whose leases it waits for",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		match, err := endpointRef(args[0])
		if err != nil {
			return err
		}
		return ask(cmd.Context(), env, func(ctx context.Context, c *api.Client) error {
			e, err := findEndpoint(ctx, c, args[0], match)
			if err != nil {
				return err
			}
			if *o != outTable {
				return object(env.Stdout, *o, e)
			}
			return endpointDetail(env, e)
		})
	}
	return cmd
}

// findEndpoint returns the one endpoint that ref names.
func findEndpoint(ctx context.Context, c *api.Client, ref string, match func(*api.Endpoint) bool) (*api.Endpoint, error) {
	res, err := c.ListEndpoints(ctx, &api.ListEndpointsRequest{})
	if err != nil {
		return nil, err
	}
	found := slices.DeleteFunc(res.GetEndpoints(), func(e *api.Endpoint) bool { return !match(e) })
	switch {
	case len(found) == 0:
		return nil, fmt.Errorf("this node has no endpoint %s: `portcullis endpoint list` shows those that it has", ref)
	case len(found) > 1:
		var ids []string
		for _, e := range found {
			ids = append(ids, fmt.Sprint(e.GetId()))
		}
		return nil, fmt.Errorf("several endpoints are %s: name one by its id: %s", ref, strings.Join(ids, ", "))
	}
	return found[0], nil
}

// endpointRef parses the three ways to name an endpoint.
func endpointRef(ref string) (func(*api.Endpoint) bool, error) {
	if id, err := strconv.ParseUint(ref, 10, 32); err == nil {
		return func(e *api.Endpoint) bool { return uint64(e.GetId()) == id }, nil
	}
	if uid, err := identity.ParseUID(ref); err == nil {
		return func(e *api.Endpoint) bool { return e.GetWorkload().GetUid() == uid.String() }, nil
	}
	if !isName(ref) {
		return nil, usagef("%q names no endpoint: want NAMESPACE/NAME, a UID, or an id as in `portcullis endpoint list`", ref)
	}
	return func(e *api.Endpoint) bool { return workload(e.GetWorkload()) == ref }, nil
}

// isName tells that s looks like NAMESPACE/NAME.
func isName(s string) bool {
	namespace, name, ok := strings.Cut(s, "/")
	return ok && namespace != "" && name != "" && !strings.Contains(name, "/")
}

func endpointDetail(env *Env, e *api.Endpoint) error {
	state := e.GetState()
	if d := e.GetDetail(); d != "" {
		state += ": " + d
	}
	var ports []string
	for _, p := range e.GetPorts() {
		ports = append(ports, fmt.Sprintf("%s %d/%s", p.GetName(), p.GetPort(), p.GetProtocol()))
	}
	device := ""
	if e.GetIfname() != "" {
		device = fmt.Sprintf("%s (index %d)", e.GetIfname(), e.GetIfindex())
	}
	err := table(env.Stdout, 2, func(tw *tabwriter.Writer) {
		row(tw, "Endpoint:", e.GetId())
		row(tw, "State:", state)
		row(tw, "Workload:", workload(e.GetWorkload()))
		row(tw, "UID:", e.GetWorkload().GetUid())
		row(tw, "IPs:", strings.Join(e.GetIps(), ", "))
		row(tw, "Generation:", e.GetGeneration())
		row(tw, "Evidence:", e.GetEvidence())
		row(tw, "Identity:", identityText(e.GetIdentity()))
		row(tw, "SPIFFE ID:", e.GetIdentity().GetSpiffeId())
		row(tw, "Device:", device)
		row(tw, "MAC:", e.GetMac())
		row(tw, "Named ports:", strings.Join(ports, ", "))
		if e.GetPid() != 0 {
			row(tw, "Ends with:", fmt.Sprintf("process %d", e.GetPid()))
		}
		row(tw, "Policy:", fmt.Sprintf("ingress %s, egress %s, set %d",
			strings.ToLower(enforcement(e.GetIngressEnforced())), strings.ToLower(enforcement(e.GetEgressEnforced())), e.GetPolicyEpoch()))
		row(tw, "Registered:", since(env, e.GetCreated(), e.GetCreated() != nil))
	})
	if err != nil {
		return err
	}
	return grantTable(env, "Leases on the last holders of its IPs:", e.GetGrants())
}

// grantTable prints leases that other agents hold, below a title; nothing if
// there are none.
func grantTable(env *Env, title string, grants []*api.Grant) error {
	if len(grants) == 0 {
		return nil
	}
	fmt.Fprintln(env.Stdout, "\n"+title)
	return table(env.Stdout, gap, func(tw *tabwriter.Writer) {
		row(tw, "VERIFIER", "IP", "GENERATION", "ENDS WITHIN", "REVOKED")
		for _, g := range grants {
			revoked := "no"
			if g.GetRevoked() {
				revoked = "yes, not acknowledged yet"
			}
			row(tw, g.GetVerifier(), g.GetIp(), g.GetGeneration(), span(g.GetRemaining()), revoked)
		}
	})
}

// endpointTable writes the endpoints in as many columns of text as there are, if
// they fit: the labels, one to a line, in a column of their own, or else below.
func endpointTable(w io.Writer, endpoints []*api.Endpoint, width int) error {
	var wide, narrow bytes.Buffer
	if err := table(&wide, gap, func(tw *tabwriter.Writer) { endpointRows(tw, endpoints, true) }); err != nil {
		return err
	}
	if widest(wide.String()) <= width {
		_, err := w.Write(wide.Bytes())
		return err
	}
	if err := table(&narrow, 2, func(tw *tabwriter.Writer) { endpointRows(tw, endpoints, false) }); err != nil {
		return err
	}
	// The lines of labels go below the rows: in the table they would make a column
	// as wide as they are.
	lines := strings.SplitAfter(narrow.String(), "\n")
	out := append(lines[:2:2], strings.Repeat(" ", labelsAt)+"LABELS (source:key[=value])\n")
	for i, e := range endpoints {
		out = append(out, lines[2+i])
		for _, l := range e.GetIdentity().GetLabels() {
			out = append(out, strings.Repeat(" ", labelsAt)+l+"\n")
		}
	}
	_, err := io.WriteString(w, strings.Join(out, ""))
	return err
}

// labelsAt is how far the labels are to the right where they have no column.
const labelsAt = 10

// endpointRows writes a row for each endpoint, with its first label, and one for
// each further label; or without labels.
func endpointRows(tw *tabwriter.Writer, endpoints []*api.Endpoint, withLabels bool) {
	write := func(labels string, cells ...any) {
		if withLabels {
			cells = slices.Insert(cells, 4, any(labels))
		}
		row(tw, cells...)
	}
	write("LABELS (source:key[=value])", "ENDPOINT", "POLICY (ingress)", "POLICY (egress)", "IDENTITY", "IPv6", "IPv4", "STATUS", "EVIDENCE")
	write(" ", " ", "ENFORCEMENT", "ENFORCEMENT", " ", " ", " ", " ", " ")
	for _, e := range endpoints {
		labels := e.GetIdentity().GetLabels()
		first := ""
		if len(labels) > 0 {
			first, labels = labels[0], labels[1:]
		}
		ip6, ip4 := families(e.GetIps())
		write(first, e.GetId(), enforcement(e.GetIngressEnforced()), enforcement(e.GetEgressEnforced()),
			e.GetIdentity().GetNumeric(), ip6, ip4, e.GetState(), e.GetEvidence())
		if !withLabels {
			continue
		}
		for _, l := range labels {
			write(l, " ", " ", " ", " ", " ", " ", " ", " ")
		}
	}
}

func widest(text string) (n int) {
	for line := range strings.Lines(text) {
		n = max(n, utf8.RuneCountInString(strings.TrimRight(line, "\n")))
	}
	return n
}

// columns is how wide the output may be: as the terminal is, or 100.
func columns(env *Env) int {
	if f, ok := env.Stdout.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			return int(size.Col)
		}
	}
	return 100
}

func enforcement(on bool) string {
	if on {
		return "Enabled"
	}
	return "Disabled"
}

func families(ips []string) (ip6, ip4 string) {
	for _, s := range ips {
		if ip, err := netip.ParseAddr(s); err == nil && ip.Is4() {
			ip4 = s
		} else {
			ip6 = s
		}
	}
	return ip6, ip4
}
