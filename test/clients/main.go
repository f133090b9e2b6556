package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"

	"portcullis/chaos/lab"
	"portcullis/test/bench/rig"
)

var (
	write  = flag.String("write", "", "Markdown file to write the table into, between its markers")
	only   = flag.String("only", "", "try only clients whose name contains this")
	bring  = flag.Bool("install", true, "install missing Debian packages by apt-get")
	banner = flag.Bool("v", false, "print the output of programs that fail whole")
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == lookupArgument {
		os.Exit(lookup(os.Args[2]))
	}
	rig.Main("clients", run)
}

func run(ctx context.Context) error {
	flags := rig.AddFlags()
	flag.Parse()
	if *bring {
		install(ctx)
	}
	var all results
	for _, x := range []struct {
		name  string
		flags []string
		on    func(context.Context, *world) error
	}{
		{"clients", nil, tryAll},
		{"clients-nxdomain", []string{"--dns-nxdomain"}, trySearch},
	} {
		c := lab.DefaultConfig()
		c.Nodes = c.Nodes[:2]
		c.AgentFlags = x.flags
		err := flags.InLab(ctx, x.name, c, func(l *lab.Lab) (err error) {
			w, err := newWorld(ctx, l, &all)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, w.close()) }()
			return x.on(ctx, w)
		})
		if err != nil {
			return err
		}
	}
	return all.conclude(*write)
}

// tryAll tries every client.
func tryAll(ctx context.Context, w *world) error {
	for _, of := range []func(*world) []check{curls, requesters, loads, middles, sockets, calls, tlsClients, askers, resolvers} {
		for _, c := range of(w) {
			if *only != "" && !strings.Contains(c.client, *only) {
				continue
			}
			w.try(ctx, c)
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return w.nothingRefusedCame()
}

// trySearch tries resolvers where refused names do not exist.
func trySearch(ctx context.Context, w *world) error {
	for _, c := range searches(w, true) {
		if *only == "" || strings.Contains(c.client, *only) {
			w.try(ctx, c)
		}
	}
	return ctx.Err()
}

const begins, ends = "<!-- make clients -->\n", "<!-- end of make clients -->\n"

// conclude prints the sum, and writes the table.
func (r *results) conclude(path string) error {
	passed, failed, skipped := 0, 0, 0
	for _, x := range r.list {
		switch {
		case x.skipped != "":
			skipped++
		case x.failed != "":
			failed++
		default:
			passed++
		}
	}
	if path != "" {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		head, rest, ok := strings.Cut(string(b), begins)
		_, tail, ok2 := strings.Cut(rest, ends)
		if !ok || !ok2 {
			return fmt.Errorf("%s has no markers %q", path, begins)
		}
		if err := os.WriteFile(path, []byte(head+begins+r.table()+ends+tail), 0o644); err != nil {
			return err
		}
	}
	fmt.Printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped)
	if failed > 0 {
		return errors.New("not every client does as it should")
	}
	return nil
}
