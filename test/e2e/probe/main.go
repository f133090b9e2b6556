// Probe is the one program in the containers of the end-to-end tests: the
// servers and clients of the stories, and clients that say what became of
// connections. It shares no code with the product.
//
//	probe deathstar | helloworld -version v1 | sleep
//	probe serve -tcp 80,81 -udp 80       answer with a name, then echo
//	      -source                        and from which address it was asked
//	probe check tcp/10.0.0.1:80 udp/...  each target once, as lines of JSON
//	      -from 203.0.113.9,2001:db8::9  from these addresses of this network
//	probe hold -for 30s 10.0.0.1:80      one connection, a message every 50 ms
//	probe talk -for 30s udp/10.0.0.1:80  one UDP socket, a line whenever another answers
//	probe hammer -for 30s 10.0.0.1:80    a new connection every 50 ms
//	      -until FILE                    the last three: or until there is a file
//	probe changes -for 30s 10.0.0.1:80   a new UDP flow every 50 ms: when answers
//	                                     begin and cease, as lines of JSON
//	probe lookup NAME...                 addresses of names, as lines of JSON
//	probe query -server udp/10.0.0.1:53 NAME...  what a server of DNS says of
//	                                     addresses, as lines of JSON
//	probe requests 10.0.0.1:80 "PUT /v1 Name: value"...  requests of one
//	                                     connection, one after the other, and
//	                                     their answers as lines of JSON
//
// Targets of check and hammer are also http/10.0.0.1:80, which a ship asks to let
// it land.
//
// Started as curl it is a small part of curl, so that commands of the stories
// run as they are written.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portcullis/chaos/lab/probe"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := run(ctx, filepath.Base(os.Args[0]), os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, name string, args []string) error {
	if name == "curl" {
		return curl(ctx, args)
	}
	if len(args) == 0 {
		return errors.New("want deathstar, helloworld, sleep, serve, check, talk, hold, hammer, changes, lookup, query or requests")
	}
	f := flag.NewFlagSet(args[0], flag.ContinueOnError)
	addr := f.String("addr", ":80", "address of deathstar")
	version := f.String("version", "v1", "version that helloworld tells")
	tcp := f.String("tcp", "", "ports, with commas between")
	udp := f.String("udp", "", "ports, with commas between")
	timeout := f.Duration("timeout", 2*time.Second, "of one attempt")
	length := f.Duration("for", 10*time.Second, "how long at the most")
	file := f.String("until", "", "file at whose appearance to end")
	source := f.Bool("source", false, "serve: tell by which address it was asked")
	from := f.String("from", "", "check: addresses that TCP and UDP are to come from, one of each family, with commas between")
	server := f.String("server", "", "PROTOCOL/HOST:PORT that lookup asks; empty: as the system is configured")
	interval := f.Duration("interval", 50*time.Millisecond, "between two")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	one := func(do func(string) any) error {
		if f.NArg() != 1 {
			return fmt.Errorf("%s: want one HOST:PORT", args[0])
		}
		return json.NewEncoder(os.Stdout).Encode(do(f.Arg(0)))
	}
	until := end{time.Now().Add(*length), *file}
	switch args[0] {
	case "deathstar":
		return probe.Deathstar(ctx, *addr)
	case "helloworld":
		return probe.Helloworld(ctx, ":5000", *version, host)
	case "sleep":
		probe.Sleep(ctx)
		return nil
	case "serve":
		return serve(ctx, host, split(*tcp), split(*udp), *source)
	case "check":
		return check(ctx, f.Args(), *from, *timeout)
	case "talk":
		return talk(ctx, f.Arg(0), until)
	case "hold":
		return one(func(target string) any { return hold(ctx, target, until, *interval, *timeout) })
	case "hammer":
		return one(func(target string) any { return hammer(ctx, target, until, *interval, *timeout) })
	case "changes":
		if f.NArg() != 1 {
			return errors.New("changes: want one HOST:PORT")
		}
		return changes(ctx, os.Stdout, f.Arg(0), until, *interval, *timeout)
	case "lookup":
		return lookup(ctx, *server, f.Args(), *timeout)
	case "query":
		return query(ctx, *server, f.Args(), *timeout)
	case "requests":
		if f.NArg() < 2 {
			return errors.New("requests: want HOST:PORT and requests")
		}
		return requests(ctx, os.Stdout, f.Arg(0), f.Args()[1:], *timeout)
	}
	return fmt.Errorf("no command %q", args[0])
}

func split(list string) (out []string) {
	for p := range strings.SplitSeq(list, ",") {
		if p != "" {
			out = append(out, p)
		}
	}
	return out
}

// curl understands -s, -XMETHOD, -X METHOD, --max-time SECONDS, -o FILE, -w
// FORMAT with %{http_code}, and one URL.
func curl(ctx context.Context, args []string) error {
	method, url, timeout, out, format := "GET", "", 30*time.Second, "", ""
	for i := 0; i < len(args); i++ {
		next := func() string {
			if i++; i < len(args) {
				return args[i]
			}
			return ""
		}
		switch a := args[i]; {
		case a == "-X":
			method = next()
		case strings.HasPrefix(a, "-X"):
			method = a[2:]
		case a == "--max-time" || a == "-m":
			s, err := strconv.ParseFloat(next(), 64)
			if err != nil {
				return fmt.Errorf("curl: --max-time: %w", err)
			}
			timeout = time.Duration(s * float64(time.Second))
		case a == "-o":
			out = next()
		case a == "-w":
			format = next()
		case strings.HasPrefix(a, "-"):
			if strings.Trim(a, "-sSf") != "" {
				return fmt.Errorf("curl: option %s: this is not the real one", a)
			}
		default:
			url = a
		}
	}
	if !strings.Contains(url, "://") {
		url = "http://" + url
	}
	r := probe.HTTP(ctx, method, url, nil, timeout)
	if !r.OK {
		return fmt.Errorf("curl: %s", r.Error)
	}
	if out == "" {
		fmt.Print(r.Body)
	} else if err := os.WriteFile(out, []byte(r.Body), 0o600); err != nil {
		return err
	}
	if format != "" {
		fmt.Print(strings.NewReplacer("%{http_code}", strconv.Itoa(r.Status), `\n`, "\n").Replace(format))
	}
	return nil
}
