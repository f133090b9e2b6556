package main

import (
	"encoding/json"
	"errors"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"portcullis/authz/tools"
)

func newPolicyTraceCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "trace --from END --to END --port PROTOCOL/NUMBER (-f PATH... | --live)",
		Short: "Whether one may call the other, and which rule of which policy says so",
		Long: `Whether one may call the other, and which rule of which policy says so: first
the policies of the caller (egress), then those of the called (ingress). Of each
policy that selects the side every rule is shown, and why it matches or not; *
is the rule that decided.

An END is NAMESPACE/POD, an address, a block, reserved:NAME or fqdn:NAME. PATHs
are those of policy matrix. With --method, --path, --host or --header, --dns-name or
--server-name a request inside the flow is judged too. The exit status is 0 whatever the verdict is.`,
		Example: "  portcullis policy trace --from default/xwing --to default/deathstar --port 80/TCP -f starwars-app.yaml -f networkpolicy-L4.yaml\n" +
			"  portcullis policy trace --from default/tiefighter --to default/deathstar --port 80/TCP --method PUT --path /v1/exhaust-port -f starwars-app.yaml -f networkpolicy-L7.yaml\n" +
			"  portcullis policy trace --from 192.0.2.1 --to default/deathstar --port 80/TCP --live",
		Args: usageArgs(noArgs),
	}
	from := cmd.Flags().String("from", "", "who calls")
	to := cmd.Flags().String("to", "", "who is called")
	port := cmd.Flags().String("port", "", "as 80/TCP, TCP/http, ICMP/8")
	var r tools.Request
	var headers []string
	cmd.Flags().StringVar(&r.Method, "method", "", "of an HTTP request inside the flow (default GET, if --path or --host is there)")
	cmd.Flags().StringVar(&r.Path, "path", "", "of an HTTP request, with the query (default /)")
	cmd.Flags().StringVar(&r.Host, "host", "", "of an HTTP request")
	cmd.Flags().StringArrayVar(&headers, "header", nil, "of an HTTP request, as NAME: VALUE (repeat)")
	cmd.Flags().StringVar(&r.Name, "dns-name", "", "name that DNS is asked for inside the flow")
	cmd.Flags().StringVar(&r.ServerName, "server-name", "", "name that TLS asks for inside the flow")
	g := addJudging(cmd)
	o := addOutput(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *from == "" || *to == "" || *port == "" {
			return usagef("say who calls whom, and where: --from, --to and --port: usage: %s", cmd.UseLine())
		}
		p, err := tools.ParsePort(*port)
		if err != nil {
			return usageError{err}
		}
		for _, h := range headers {
			name, value, ok := strings.Cut(h, ":")
			if !ok {
				return usagef("--header %q: want NAME: VALUE", h)
			}
			r.Header = append(r.Header, [2]string{name, strings.TrimSpace(value)})
		}
		if err := r.Check(); err != nil {
			return usageError{err}
		}
		w, err := g.world(cmd.Context(), env)
		if err != nil {
			return err
		}
		a, errFrom := w.Party(*from)
		b, errTo := w.Party(*to)
		if err := errors.Join(errFrom, errTo); err != nil {
			return err
		}
		j, err := g.judge(env, w)
		if err != nil {
			return err
		}
		t := j.Trace(a, b, p, r)
		if *o == outTable {
			_, err = io.WriteString(env.Stdout, t.Text())
			return err
		}
		return structuredValue(env.Stdout, *o, t)
	}
	return cmd
}

// structuredValue prints a value as JSON, or the same as YAML.
func structuredValue(w io.Writer, o output, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return structured(w, o, b)
}
