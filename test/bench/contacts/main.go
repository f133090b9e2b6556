// Command contacts measures, in a lab with real agents, what Portcullis adds to
// the first packet between two workloads, how long an IP rests between two
// workloads, and what one workload's storm does to another's first packets. As root, from the top of the module:
//
//	make build
//	go run ./test/bench/contacts -portcullis bin/portcullis first
//	go run ./test/bench/contacts -portcullis bin/portcullis reuse
//	go run ./test/bench/contacts -portcullis bin/portcullis flood
//
// `first` connects from fresh IPs: to a server under policy, and to one on the
// same nodes without any program, in turns. It does so on a warm session, and
// on a cold one (`session reset` before each). SYN retransmits are those of
// TCP_INFO.
//
// `reuse` gives an IP from a workload that two verifiers hold live leases on,
// and that is sending to both, to one of another identity that sends on the
// same 5-tuples from the moment when its endpoint exists. Every datagram says
// who sent it: one of the second workload that a server under the first one's
// policy gets, and one meant for the first workload that the second one gets,
// is a wrong admission. The delay is from the kernel's event for the first
// packet that the old gate stopped to its event for the first that the new one
// let through, both on the owner's node.
//
// `flood` has one workload send as many packets as -rate says to addresses that
// nobody has, or from an address that nobody has, or open 200,000 flows, and
// another one on the same node call and be called by fresh IPs meanwhile; in
// turns with the same storm from workloads without programs, and with nobody
// having any.
//
// It prints a table, or JSON with -json. The exit status is 1 if something
// failed that has nothing to do with time: a wrong admission, a retransmit, a
// connect that did not succeed, an echo that was lost.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"

	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

func main() { rig.Main("contacts", run) }

func run(ctx context.Context) error {
	flags := rig.AddFlags()
	warm := flag.Int("warm", 1000, "first: contacts on a warm session")
	cold := flag.Int("cold", 100, "first: contacts on a cold session")
	count := flag.Int("count", 500, "reuse: how many")
	addFirst := flag.Bool("add-first", false, "reuse: register the new workload while the old one still is, as where a deregistration is missing")
	var o floodOptions
	flag.IntVar(&o.rate, "rate", 50_000, "flood: packets per second")
	flag.IntVar(&o.contacts, "contacts", 300, "flood: first contacts of each kind of storm, a multiple of 50")
	flag.StringVar(&o.kinds, "storm", "unbound,ingress,flows", "flood: which kinds")
	flag.BoolVar(&o.why, "why", false, "flood: also read the events of what is dropped of the other workload; costs time")
	c := lab.DefaultConfig()
	flag.StringVar(&c.Evidence, "evidence", "lease", "on what bindings are believed: lease or svid")
	flag.Parse()
	if err := checkUse(flag.CommandLine); err != nil {
		return err
	}
	return flags.InLab(ctx, "bench-"+flag.Arg(0), c, func(l *lab.Lab) (err error) {
		var result interface {
			fmt.Stringer
			problem() error
		}
		switch flag.Arg(0) {
		case "first":
			result, err = firstContacts(ctx, l, *warm, *cold)
		case "reuse":
			result, err = reuses(ctx, l, *count, *addFirst)
		case "flood":
			result, err = floods(ctx, l, o)
		}
		if err != nil {
			return err
		}
		return errors.Join(flags.Print(result), result.problem())
	})
}

// checkUse refuses what would be ignored: flags after the measurement, and those
// of another one, which their help names.
func checkUse(f *flag.FlagSet) (err error) {
	all := []string{"first", "reuse", "flood"}
	what := f.Arg(0)
	switch {
	case !slices.Contains(all, what):
		return errors.New("say `first`, `reuse` or `flood`")
	case f.NArg() > 1:
		return fmt.Errorf("%q after %s would be ignored: flags come before it", f.Args()[1:], what)
	}
	f.Visit(func(x *flag.Flag) {
		if of, _, _ := strings.Cut(x.Usage, ":"); of != what && slices.Contains(all, of) {
			err = errors.Join(err, fmt.Errorf("-%s is a flag of `%s`: `%s` does not know it", x.Name, of, what))
		}
	})
	return err
}
