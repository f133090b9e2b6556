package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"portcullis/authz/tools"
)

// Bounds on what a matrix judges without being asked for it.
const (
	defaultPorts     = 50
	defaultExternals = 20
)

// manyCells is how many make the command say how far it is.
const manyCells = 1 << 20

// Bounds on a matrix, of which a cell is a few bytes, and on a page, of which a
// cell is an element that a browser keeps.
const (
	maxCells = 64 << 20
	maxPage  = 8 << 20
)

// wideLine is how many characters of a line make the command say that there
// are other forms.
const wideLine = 200

func newPolicyMatrixCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "matrix (-f PATH... | --live)",
		Short: "Who may call whom: every pair of workloads, at each port",
		Long: `Who may call whom: every pair of workloads, at each port.

A PATH is a file, a directory (all below it) or - for the standard input, with
Namespaces, Pods, what makes pods (Deployments and the like), Services, Nodes,
policies and lists of these, as kubectl get -o yaml prints them. An agent is not
needed. With --live the running agent says whom it knows and which policies it
has; what only other nodes' policies can say is "-".

Rows call columns: "." allowed, "X" blocked, "7" allowed through L7, "-" not
judged. Ports are PROTOCOL/NUMBER, PROTOCOL/NAME, ICMP/TYPE or ICMPv6/TYPE;
without --ports those that policies and pods name. An external is an address, a
block (all of it), reserved:NAME or fqdn:NAME; without --external tables and
pages show those that policies name, JSON and YAML none.`,
		Example: "  portcullis policy matrix -f starwars-app.yaml -f networkpolicy-L4.yaml --ports TCP/80\n" +
			"  kubectl get ns,pods,svc,netpol,cnp -A -o yaml | portcullis policy matrix -f - -o html > matrix.html\n" +
			"  portcullis policy matrix --live --ports TCP/80,UDP/53 --external 192.0.2.1 --external reserved:host",
		Args: usageArgs(noArgs),
	}
	g := addJudging(cmd)
	a := addAsked(cmd)
	o := addOutput(cmd, outHTML)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := a.check(); err != nil {
			return err
		}
		w, err := g.world(cmd.Context(), env)
		if err != nil {
			return err
		}
		return a.matrix(env, g, w, *o)
	}
	return cmd
}

// asked are the flags that say what is to be judged.
type asked struct {
	ports     string
	externals []string
	parsed    []tools.Port // of ports
}

func addAsked(cmd *cobra.Command) *asked {
	a := &asked{}
	cmd.Flags().StringVar(&a.ports, "ports", "", "ports to judge, as TCP/80,UDP/53,SCTP/http,ICMP/8,ICMPv6/128")
	cmd.Flags().StringArrayVar(&a.externals, "external", nil, "an end that is no workload: an address, a block, reserved:NAME or fqdn:NAME (repeatable)")
	return a
}

// check reports what is wrong with the flags, before anything is read.
func (a *asked) check() (err error) {
	if a.ports == "" {
		return nil
	}
	if a.parsed, err = tools.ParsePorts(a.ports); err != nil {
		return usageError{err}
	}
	return nil
}

// options says what to judge in a world.
func (a *asked) options(env *Env, w *tools.World, forPeople bool) (o tools.MatrixOptions, err error) {
	if o.Ports = a.parsed; len(o.Ports) == 0 {
		more := 0
		if o.Ports, more = w.Ports(defaultPorts); more > 0 {
			fmt.Fprintf(env.Stderr, "note: %d more ports are named: choose with --ports\n", more)
		}
	}
	for _, name := range a.externals {
		p, err := w.Party(name)
		if err != nil {
			return o, err
		}
		o.Externals = append(o.Externals, p)
	}
	if len(a.externals) == 0 && forPeople {
		o.Externals = w.Externals(defaultExternals)
	}
	return o, nil
}

func (a *asked) matrix(env *Env, g *judging, w *tools.World, form output) error {
	if len(w.Workloads) == 0 {
		return fmt.Errorf("there are no workloads to judge: add the files that have the pods, or what makes them")
	}
	o, err := a.options(env, w, form == outTable || form == outHTML)
	if err != nil {
		return err
	}
	j, err := g.judge(env, w)
	if err != nil {
		return err
	}
	n := len(w.Workloads)
	pairs := n * (n + 2*len(o.Externals)) * len(o.Ports)
	most := maxCells
	if form == outHTML {
		most = maxPage
	}
	if pairs > most {
		return fmt.Errorf("%d workloads at %s make %d pairs, and at most %d are shown at once: name fewer --ports, or fewer files", n, plural(len(o.Ports), "port", "ports"), pairs, most)
	}
	if pairs > manyCells {
		o.Progress = func(done int) {
			fmt.Fprintf(env.Stderr, "judged %s (%d of %d)\n", o.Ports[done-1], done, len(o.Ports))
		}
	}
	o.Reasons = form == outHTML
	m := j.Matrix(o)
	switch form {
	case outHTML:
		return m.HTML(env.Stdout, tools.Page{Judge: j, Externals: o.Externals})
	case outTable:
		text := m.Text()
		if n := m.Width(); n > wideLine {
			fmt.Fprintf(env.Stderr, "note: lines have up to %d characters: -o html is easier to read\n", n)
		}
		_, err = io.WriteString(env.Stdout, text)
		return err
	}
	return structuredValue(env.Stdout, form, m)
}
