package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"portcullis/chaos/lab"
)

// place is where a client runs, and whom it calls.
type place struct {
	from   lab.Running
	server netip.Addr
	name   string // "egress IPv4"
	index  int
}

// at is the server's address at a port.
func (p place) at(port uint16) string { return netip.AddrPortFrom(p.server, port).String() }

// check is one thing to try.
type check struct {
	client string // as the table names it
	pack   string // Debian package, or Go module; "go": Go's own
	what   string
	out    string // what is expected, in words
	egress bool   // rules of egress only
	run    func(context.Context, place) error
}

type result struct {
	check
	version, failed, skipped string
}

type results struct{ list []result }

// errMissing: the program is not there.
var errMissing = errors.New("not installed")

// try runs a check at every place.
func (w *world) try(ctx context.Context, c check) {
	r := result{check: c, version: version(c.pack)}
	var wrong []string
	for _, p := range w.places {
		if c.egress && p.from.Spec.Name != w.bound.Spec.Name {
			continue
		}
		tctx, cancel := context.WithTimeout(ctx, time.Minute)
		err := c.run(tctx, p)
		cancel()
		if errors.Is(err, errMissing) {
			r.skipped = err.Error()
			break
		}
		if err != nil {
			wrong = append(wrong, p.name+": "+err.Error())
		}
	}
	r.failed = strings.Join(wrong, "; ")
	word := "ok    "
	switch {
	case r.failed != "":
		word = "FAILED"
	case r.skipped != "":
		word = "skipped"
	}
	fmt.Printf("%s %s %s: %s: %s %s%s\n", word, c.client, r.version, c.what, c.out, r.failed, r.skipped)
	w.results.list = append(w.results.list, r)
}

// command is a check by a program: its output must have all that is wanted.
//
//	{web} {host} {addr} {tls} {grpc} in argv: the server's, of the place
//	=text          the output is this, without spaces around it
//	!text          it does not contain this
//	exit N         the exit status, instead of 0; exit *: any but 0
//	text           it contains this
func (w *world) command(client, pack, what, out string, argv []string, want ...string) check {
	return check{client: client, pack: pack, what: what, out: out, run: func(ctx context.Context, p place) error {
		return w.expect(ctx, p, argv, want...)
	}}
}

func (w *world) expect(ctx context.Context, p place, argv []string, want ...string) error {
	host := p.server.String()
	if p.server.Is6() {
		host = "[" + host + "]"
	}
	with := strings.NewReplacer("{web}", "http://"+p.at(webPort), "{host}", host, "{addr}", p.server.String(), "{tls}", p.at(tlsPort), "{resolv}", w.resolv(p, ""), "{dir}", w.dir)
	args := make([]string, len(argv))
	for i, a := range argv {
		args[i] = with.Replace(a)
	}
	if _, err := exec.LookPath(args[0]); err != nil {
		return fmt.Errorf("%s: %w", args[0], errMissing)
	}
	var b bytes.Buffer
	code, err := w.Exec(ctx, p.from.Spec.FullName(), args, lab.Streams{In: strings.NewReader(""), Out: &b, Err: &b})
	if err != nil {
		return err
	}
	want = slices.Clone(want)
	me := p.from.IP4()
	if p.server.Is6() {
		me = p.from.IP6()
	}
	for i, x := range want {
		want[i] = strings.ReplaceAll(x, "{me}", me.String())
	}
	return says(b.String(), code, want)
}

func says(out string, code int, want []string) error {
	exit := "0"
	for _, x := range want {
		rest, is := strings.CutPrefix(x, "exit ")
		exact, whole := strings.CutPrefix(x, "=")
		not, without := strings.CutPrefix(x, "!")
		ok := true
		switch {
		case is:
			exit = rest
		case whole:
			ok = strings.TrimSpace(out) == exact
		case without:
			ok = !strings.Contains(out, not)
		default:
			ok = strings.Contains(out, x)
		}
		if !ok {
			return fmt.Errorf("no %q in %s", x, shortened(out))
		}
	}
	if got := fmt.Sprint(code); got != exit && (exit != "*" || code == 0) {
		return fmt.Errorf("exit status %d, not %s: %s", code, exit, shortened(out))
	}
	return nil
}

func shortened(s string) string {
	if len(s) > 600 && !*banner {
		s = s[:300] + " ... " + s[len(s)-300:]
	}
	return fmt.Sprintf("%q", s)
}

// packages are those to install.
var packages = []string{"curl", "wget", "apache2-utils", "wrk", "hey", "nghttp2-client", "nginx", "haproxy", "bind9-dnsutils", "knot-dnsutils", "ldnsutils",
	"gcc", "libc6-dev", "musl-tools", "openssl", "gnutls-bin", "python3", "python3-websockets", "python3-requests", "python3-pycares"}

// install installs what is missing. What cannot be had is skipped later.
func install(ctx context.Context) {
	var missing []string
	for _, p := range packages {
		if debian(p) == "" {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return
	}
	fmt.Fprintf(os.Stderr, "missing: apt-get install %s\n", strings.Join(missing, " "))
	cmd := exec.CommandContext(ctx, "apt-get", append([]string{"install", "-y", "--no-install-recommends"}, missing...)...)
	// Services need not start.
	cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "apt-get:", err)
	}
}

// debian returns the version of an installed package; "" if it is not.
func debian(name string) string {
	b, err := exec.Command("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name).Output()
	state, v, _ := strings.Cut(string(b), " ")
	if err != nil || state != "installed" {
		return ""
	}
	return v
}

func version(pack string) string {
	if pack == "go" {
		return strings.TrimPrefix(runtime.Version(), "go")
	}
	if strings.Contains(pack, "/") {
		info, _ := debug.ReadBuildInfo()
		for _, m := range info.Deps {
			if m.Path == pack {
				return strings.TrimPrefix(m.Version, "v")
			}
		}
	}
	return debian(pack)
}

// table is the result in Markdown.
func (r *results) table() string {
	var b strings.Builder
	b.WriteString("\n| client | version | tried | outcome |\n|---|---|---|---|\n")
	last := ""
	for _, x := range r.list {
		if x.skipped != "" {
			continue
		}
		client, v := x.client, x.version
		if client == last {
			client, v = "", ""
		}
		last = x.client
		out := x.out
		if x.failed != "" {
			out = "**fails**: " + strings.ReplaceAll(x.failed, "|", "\\|")
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", client, v, x.what, out)
	}
	b.WriteString("\n")
	return b.String()
}
