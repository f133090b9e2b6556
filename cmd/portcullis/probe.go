package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"portcullis/chaos/lab/probe"
)

func newProbeCmd(env *Env) *cobra.Command {
	return group("probe", "Small servers and clients for lab workloads",
		newDeathstarCmd(), newHelloworldCmd(), newNamesCmd(), newSleepCmd(),
		newHTTPProbeCmd(env, http.MethodGet), newHTTPProbeCmd(env, http.MethodPost), newHTTPProbeCmd(env, http.MethodPut),
		newTCPProbeCmd(env), newUDPProbeCmd(env), newPingCmd(env))
}

func newDeathstarCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "deathstar", Short: "Serve the battle station's API", Args: usageArgs(cobra.NoArgs)}
	addr := cmd.Flags().String("addr", ":80", "[HOST]:PORT to serve on")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return probe.Deathstar(cmd.Context(), *addr) }
	return cmd
}

func newHelloworldCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "helloworld", Short: "Serve GET /hello, and the same line on UDP", Args: usageArgs(cobra.NoArgs)}
	addr := cmd.Flags().String("addr", ":5000", "[HOST]:PORT to serve on")
	version := cmd.Flags().String("version", "v1", "version to tell")
	instance := cmd.Flags().String("instance", os.Getenv("HOSTNAME"), "instance to tell")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return probe.Helloworld(cmd.Context(), *addr, *version, *instance)
	}
	return cmd
}

func newNamesCmd() *cobra.Command {
	cmd := &cobra.Command{Use: "names NAME=ADDRESS[,ADDRESS...]...", Short: "Serve DNS: the addresses of these names; no others exist",
		Args: usageArgs(cobra.MinimumNArgs(1))}
	addr := cmd.Flags().String("addr", ":53", "[HOST]:PORT to serve on, UDP and TCP")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		zone, err := probe.ParseZone(args)
		if err != nil {
			return usageError{err}
		}
		return probe.Names(cmd.Context(), *addr, zone)
	}
	return cmd
}

func newSleepCmd() *cobra.Command {
	return &cobra.Command{Use: "sleep", Short: "Do nothing", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { probe.Sleep(cmd.Context()); return nil }}
}

// tell prints a client's result: as JSON, or as text if it went well. An
// error has been told, so only the status is left.
func tell(env *Env, o output, result any, ok bool, text, problem string) error {
	switch {
	case o != outTable:
		b, err := json.Marshal(result)
		if err != nil {
			return err
		}
		if err := structured(env.Stdout, o, b); err != nil {
			return err
		}
	case ok:
		fmt.Fprint(env.Stdout, text)
	default:
		return errors.New(problem)
	}
	if !ok {
		return exitError{exitFailed}
	}
	return nil
}

func newHTTPProbeCmd(env *Env, method string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   strings.ToLower(method) + " URL",
		Short: "Send one " + method + " request; prints status and body",
		Long:  "Send one " + method + " request on a fresh connection.\n\nPrints the status and the body. The exit status is 0 if an answer came, whatever it says.",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	out := addOutput(cmd)
	timeout := cmd.Flags().Duration("timeout", 2*time.Second, "for the whole request")
	fields := cmd.Flags().StringArray("header", nil, "NAME: VALUE of a field to send; may be repeated")
	server := cmd.Flags().String("dns", "", "HOST[:PORT] of a DNS server to ask for the address")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		header := http.Header{}
		for _, f := range *fields {
			name, value, ok := strings.Cut(f, ":")
			if !ok || strings.TrimSpace(name) == "" {
				return usageError{fmt.Errorf("--header %q is not NAME: VALUE", f)}
			}
			header.Add(strings.TrimSpace(name), strings.TrimSpace(value))
		}
		o := probe.HTTPOptions{Header: header, Timeout: *timeout}
		if *server != "" {
			at := *server
			if _, _, err := net.SplitHostPort(at); err != nil {
				at = net.JoinHostPort(strings.Trim(at, "[]"), "53")
			}
			var err error
			if o.DNS, err = probe.Resolve(cmd.Context(), at); err != nil {
				return err
			}
		}
		r := probe.Request(cmd.Context(), method, args[0], o)
		text := fmt.Sprintf("%d %s\n%s", r.Status, http.StatusText(r.Status), r.Body)
		return tell(env, *out, r, r.OK, text, fmt.Sprintf("%s %s: %s", method, args[0], r.Error))
	}
	return cmd
}

func newTCPProbeCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{Use: "tcp HOST:PORT", Short: "Connect; tells the time and the SYN retransmits", Args: usageArgs(cobra.ExactArgs(1))}
	o := addOutput(cmd)
	timeout := cmd.Flags().Duration("timeout", 2*time.Second, "for the connect")
	port := cmd.Flags().Uint16("source-port", 0, "own port; 0: any")
	count := cmd.Flags().Int("count", 1, "connects, one after the other; of several, each result is a line of JSON")
	interval := cmd.Flags().Duration("interval", 100*time.Millisecond, "between the beginnings of two")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		addr, err := probe.Resolve(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		if *count > 1 {
			enc := json.NewEncoder(env.Stdout)
			probe.TCPConnects(cmd.Context(), addr, *count, *interval, *timeout, func(r probe.Connect) {
				err = errors.Join(err, enc.Encode(r))
			})
			return err
		}
		r := probe.TCPConnect(addr, *port, *timeout)
		text := fmt.Sprintf("connected to %v in %.0f us, %d retransmits\n", addr, r.ConnectUS, r.TotalRetr)
		return tell(env, *o, r, r.OK, text, fmt.Sprintf("connect to %v: %s", addr, r.Error))
	}
	return cmd
}

func newUDPProbeCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "udp HOST:PORT",
		Short: "Send datagrams and print what comes back",
		Long:  "Send datagrams and print what comes back on the same 5-tuple.\n\nThe exit status is 0 if anything came.",
		Args:  usageArgs(cobra.ExactArgs(1)),
	}
	o := addOutput(cmd)
	var u probe.UDPOptions
	f := cmd.Flags()
	f.Uint16Var(&u.SourcePort, "source-port", 0, "own port; 0: any")
	f.IntVar(&u.Count, "count", 1, "datagrams to send; 0: only listen")
	f.StringVar(&u.Payload, "payload", "hello", `of each; helloworld answers "repeat=N interval=D" N times`)
	f.DurationVar(&u.Interval, "interval", 100*time.Millisecond, "between two datagrams")
	f.DurationVar(&u.Timeout, "timeout", time.Second, "how long to listen after the last one")
	f.BoolVar(&u.WaitAll, "wait-all", false, "listen until the timeout even if all were answered")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		addr, err := probe.Resolve(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		r := probe.UDP(cmd.Context(), addr, u)
		var text strings.Builder
		for _, l := range r.Lines {
			fmt.Fprintln(&text, l)
		}
		return tell(env, *o, r, r.OK, text.String(), fmt.Sprintf("%v: %s", addr, r.Error))
	}
	return cmd
}

func newPingCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{Use: "ping HOST", Short: "Send ICMP echo requests", Args: usageArgs(cobra.ExactArgs(1))}
	o := addOutput(cmd)
	count := cmd.Flags().IntP("count", "c", 2, "requests to send, one after the other")
	timeout := cmd.Flags().Duration("timeout", time.Second, "for each answer")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		ip, err := probe.ResolveHost(cmd.Context(), args[0])
		if err != nil {
			return err
		}
		r := probe.Ping(cmd.Context(), ip, *count, *timeout)
		text := fmt.Sprintf("%d packets transmitted, %d packets received\n", r.Sent, r.Received)
		return tell(env, *o, r, r.OK, text, fmt.Sprintf("ping %v: %s", ip, r.Error))
	}
	return cmd
}
