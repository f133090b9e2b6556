// Command contacts measures, in a lab with real agents, what Portcullis adds to
// the first packet between two workloads, and how long an IP rests between two
// workloads. As root, from the top of the module:
//
//	make build
//	go run ./test/bench/contacts -portcullis bin/portcullis first
//	go run ./test/bench/contacts -portcullis bin/portcullis reuse
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
// It prints a table, or JSON with -json. The exit status is 1 if something
// failed that has nothing to do with time: a wrong admission, a retransmit, a
// connect that did not succeed.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"portcullis/chaos/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "contacts:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	binary := flag.String("portcullis", "bin/portcullis", "the binary to measure")
	asJSON := flag.Bool("json", false, "print JSON")
	warm := flag.Int("warm", 1000, "first: contacts on a warm session")
	cold := flag.Int("cold", 100, "first: contacts on a cold session")
	count := flag.Int("count", 500, "reuse: how many")
	addFirst := flag.Bool("add-first", false, "reuse: register the new workload while the old one still is, as where a deregistration is missing")
	flag.Parse()
	if _, err := os.Stat(*binary); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	c := lab.DefaultConfig()
	l, err := lab.Up(ctx, c, lab.Options{Name: "bench", Binary: absolute(*binary)})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Down(context.WithoutCancel(ctx)), l.Close())
	}()
	var result interface{ problem() error }
	switch flag.Arg(0) {
	case "first":
		result, err = firstContacts(ctx, l, *warm, *cold)
	case "reuse":
		result, err = reuses(ctx, l, *count, *addFirst)
	default:
		return errors.New("say `first` or `reuse`")
	}
	if err != nil {
		return err
	}
	if *asJSON {
		enc := json.NewEncoder(os.Stdout)
		enc.SetIndent("", "  ")
		if err := enc.Encode(result); err != nil {
			return err
		}
	} else {
		fmt.Print(result)
	}
	return result.problem()
}

func absolute(path string) string {
	if path[0] == '/' {
		return path
	}
	dir, err := os.Getwd()
	if err != nil {
		return path
	}
	return dir + "/" + path
}
