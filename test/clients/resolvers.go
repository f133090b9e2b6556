package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
)

// lookupArgument makes this program a client of Go's resolver.
const lookupArgument = "look-up-by-go"

func lookup(name string) (code int) {
	ips, err := (&net.Resolver{PreferGo: true}).LookupHost(context.Background(), name)
	if err != nil {
		fmt.Println(err)
		return 2
	}
	slices.Sort(ips)
	fmt.Println(strings.Join(ips, "\n"))
	return 0
}

const muslSource = `
#include <netdb.h>
#include <stdio.h>
#include <arpa/inet.h>
int main(int argc, char **argv) {
	struct addrinfo *a, hints = { .ai_socktype = SOCK_STREAM };
	int e = getaddrinfo(argv[1], 0, &hints, &a);
	char b[64];
	if (e) { puts(gai_strerror(e)); return 2; }
	for (; a; a = a->ai_next) { getnameinfo(a->ai_addr, a->ai_addrlen, b, sizeof b, 0, 0, NI_NUMERICHOST); puts(b); }
	return 0;
}
`

const caresSource = `
import pycares, select, socket, sys
c = pycares.Channel(resolvconf_path="/etc/resolv.conf", timeout=5.0, tries=2)
bad = []
def done(result, error):
    if error: bad.append(pycares.errno.strerror(error)); return
    for n in result.nodes: print(n.addr[0].decode())
c.getaddrinfo(sys.argv[1], None, done, family=socket.AF_UNSPEC, type=socket.SOCK_STREAM)
while True:
    r, w = c.getsock()
    if not r and not w: break
    t = c.timeout(); r, w, _ = select.select(r, w, [], t)
    for fd in r: c.process_fd(fd, pycares.ARES_SOCKET_BAD)
    for fd in w: c.process_fd(pycares.ARES_SOCKET_BAD, fd)
    if not r and not w: c.process_fd(pycares.ARES_SOCKET_BAD, pycares.ARES_SOCKET_BAD)
if bad: print(bad[0]); sys.exit(2)
`

// resolv writes a resolv.conf that names the server.
func (w *world) resolv(p place, more string) string {
	return w.file(fmt.Sprintf("resolv-%d-%x", p.index, more), fmt.Sprintf("nameserver %s\noptions timeout:3 attempts:2\n%s\n", p.server, more))
}

// resolver is a library that resolves names, as a command that takes one.
type resolver struct {
	client, pack string
	argv         []string
}

func (w *world) resolvers() []resolver {
	self, err := os.Executable()
	if err != nil {
		self = err.Error() // which no program is
	}
	return []resolver{
		{"glibc (`getent ahosts`)", "libc-bin", []string{"getent", "ahosts"}},
		{"musl", "musl-tools", []string{"sh", "-c", "test -x {dir}/musl || musl-gcc -o {dir}/musl " + w.file("musl.c", muslSource) + "; exec {dir}/musl $1", "sh"}},
		{"c-ares (pycares)", "libc-ares2", []string{"/usr/bin/python3", w.file("cares.py", caresSource)}},
		{"Go's resolver (netgo)", "go", []string{self, lookupArgument}},
	}
}

// resolving is a check of a resolver whose resolv.conf has more lines.
func (w *world) resolving(r resolver, more, what, out, name string, want ...string) check {
	return check{client: r.client, pack: r.pack, what: what, out: out, egress: true, run: func(ctx context.Context, p place) error {
		argv := append([]string{"unshare", "-m", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec "$@"`, w.resolv(p, more)}, r.argv...)
		return w.expect(ctx, p, append(argv, name), want...)
	}}
}

func resolvers(w *world) []check {
	var out []check
	const both, not6 = "203.0.113.10", "!2001:db8"
	for _, r := range w.resolvers() {
		out = append(out, w.resolving(r, "", "`A` and `AAAA` at once", "both", "www.example.com", both, "2001:db8::10"),
			w.resolving(r, "", "an alias; a name without `AAAA`", "its addresses", "alias.example.com", both, "2001:db8::10"),
			w.resolving(r, "", "a name without `AAAA`", "the one", "four.example.com", both, not6),
			w.many(r),
			w.resolving(r, "", "a refused name", "an error, at once", "secret.example.net", "!203.0.113", "exit *"))
		if strings.HasPrefix(r.client, "glibc") {
			for _, o := range []string{"single-request", "single-request-reopen", "use-vc", "edns0 trust-ad"} {
				out = append(out, w.resolving(r, "options "+o, "`options "+o+"`", "both", "www.example.com", both, "2001:db8::10"))
			}
		}
	}
	out = append(out, searches(w, false)...)
	// What is learnt passes with the first packet.
	r := resolver{"curl by name", "curl", []string{"curl", "-sS", "--max-time", "10"}}
	for _, family := range []string{"-4", "-6"} {
		with := r
		with.argv = append(slices.Clone(r.argv), family)
		out = append(out, w.resolving(with, "", "`toFQDNs`, "+family+": resolves by glibc, and connects at once", "200", "http://www.example.com:8080/public/hello", "=hello"))
	}
	return out
}

// many asks for more addresses than fit into 512 bytes.
func (w *world) many(r resolver) check {
	if r.client == "musl" {
		return w.resolving(r, "", "60 addresses", "what fits into 512 bytes: this version does not ask by TCP", "many.example.com", "203.0.113.100", "203.0.113.120")
	}
	return w.resolving(r, "", "60 addresses", "all: by TCP", "many.example.com", "203.0.113.100", "203.0.113.159")
}

// searches try the search domains of a pod of Kubernetes, where no rule allows
// names in them.
func searches(w *world, nxdomain bool) []check {
	var out []check
	for _, r := range w.resolvers() {
		what, outcome, want := "search domains that are refused, `ndots:5`", "found", []string{"203.0.113.10"}
		switch {
		case nxdomain:
			what += ", with `--dns-nxdomain`"
		case r.client == "musl" || strings.HasPrefix(r.client, "c-ares"):
			// A refusal is no answer for it, so it goes no further.
			outcome, want = "**an error**: allow those names, or use `--dns-nxdomain`", []string{"exit *"}
		}
		out = append(out, w.resolving(r, "search default.svc.cluster.local svc.cluster.local\noptions ndots:5", what, outcome, "www.example.com", want...))
	}
	return out
}
