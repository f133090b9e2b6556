package main

import (
	"encoding/json"
	"errors"
	"io"

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
are those of policy matrix. The exit status is 0 whatever the verdict is.`,
		Example: "  portcullis policy trace --from default/xwing --to default/deathstar --port 80/TCP -f starwars-app.yaml -f networkpolicy-L4.yaml\n" +
			"  portcullis policy trace --from 192.0.2.1 --to default/deathstar --port 80/TCP --live",
		Args: usageArgs(noArgs),
	}
	from := cmd.Flags().String("from", "", "who calls")
	to := cmd.Flags().String("to", "", "who is called")
	port := cmd.Flags().String("port", "", "as 80/TCP, TCP/http, ICMP/8")
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
		t := j.Trace(a, b, p)
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
