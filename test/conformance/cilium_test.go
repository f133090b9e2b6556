package conformance

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/bpf/abi"
	"portcullis/identity"
)

type cnpCase struct {
	ID, File, Namespace string
	Accepted            bool
	NamedPorts          map[string]uint16 // of every subject, of TCP
	Entities            []cnpEntity
	Expect              map[string]table
	Object              object
}

type cnpEntity struct {
	Key     string
	Managed bool
	Labels  []string
}

// decisions are the cases in which cells differ on purpose, with the reason
// and the number of cells.
var decisions = map[string]struct {
	reason string
	cells  int
}{
	"c-002": {clusterUnnamed, 64},
	"c-004": {clusterUnnamed, 22},
}

// clusterUnnamed: the tables were made without telling Cilium's engine the
// name of its cluster, so that the entity "cluster" stood for nobody. Cilium's
// documentation says whom it means, and so it is here.
const clusterUnnamed = "entity cluster"

// inCluster reports whether the entity cluster means the peer.
func (e cnpEntity) inCluster() bool {
	return e.Managed || !slices.ContainsFunc(e.Labels, func(l string) bool { return strings.HasPrefix(l, "reserved:world") })
}

// Cilium's own engine and we say the same of every cell, of policies as they
// stand in their files: each side alone, a peer to itself, and "allowed as far
// as the rules inside the protocol go" apart from "allowed".
func TestCiliumCorpus(t *testing.T) { ciliumCorpus(t, nil) }

func ciliumCorpus(t *testing.T, k *corpusKernel) {
	n := tally{kernel: k}
	seven, decided := 0, map[string]int{}
	for _, c := range cases[cnpCase](t, "cnp.jsonl.gz") {
		policies, err := load(t, []object{c.Object})
		if (err == nil) != c.Accepted {
			t.Errorf("%s (%s): %v", c.ID, c.File, err)
			continue
		}
		n.verbatim++
		repo := authz.NewRepository(authz.Options{TrustDomain: trustDomain, LocalHost: true})
		if err := repo.Put(policies...); err != nil {
			t.Fatal(err)
		}
		peers := c.peers(t)
		own := c.own()
		for s, subject := range c.Entities {
			if !subject.Managed {
				continue
			}
			for i, p := range peers {
				repo.AddPorts(uint64(i+1), p.Identity, own)
			}
			set := repo.Compile(peers[s].Identity, func(yield func(identity.Numeric, authz.Peer) bool) {
				for i, p := range peers {
					if !yield(c.number(i), p) {
						return
					}
				}
			}, own...)
			for _, name := range slices.Sorted(maps.Keys(c.Expect)) {
				proto, dport := port(t, name)
				for p, peer := range c.Entities {
					for dir, want := range map[abi.Direction]byte{abi.DirIngress: c.Expect[name].Ingress[p][s], abi.DirEgress: c.Expect[name].Egress[s][p]} {
						d := set.Judge(dir, c.number(p), proto, dport)
						if k != nil {
							k.judge(set, dir, c.number(p), proto, dport, d, c.ID+": "+name+", peer "+peer.Key)
						}
						got := character(d)
						n.cells++
						if set.Enforce(dir) {
							n.policed++
						}
						if got == '7' {
							seven++
						}
						switch d, on := decisions[c.ID]; {
						case got == want:
						case on && d.reason == clusterUnnamed && want == 'X' && got == '.' && peer.inCluster():
							decided[c.ID]++
						default:
							n.wrong++
							t.Errorf("%s (%s): %s: %s, %s, peer %s: %q, want %q", c.ID, c.File, dir, name, subject.Key, peer.Key, got, want)
						}
					}
				}
			}
		}
	}
	differ := 0
	for id, d := range decisions {
		differ += decided[id]
		if decided[id] != d.cells {
			t.Errorf("%s: %d cells differ because of %s, want %d", id, decided[id], d.reason, d.cells)
		}
	}
	t.Logf("%v; %d through L7; %d of them differ by decision", &n, seven, differ)
	if n.verbatim < 64 || n.cells-n.wrong-differ < 51_706 || n.policed < 4449 || seven < 59 {
		t.Error("fewer cases or cells than there are")
	}
}

// character is how a table writes a decision.
func character(d authz.Decision) byte {
	switch {
	case d.Verdict != abi.VerdictPass:
		return 'X'
	case d.L7:
		return '7'
	}
	return '.'
}

// number is under which entity i is known. Several are world, told apart by
// address; only the host must have its own.
func (c cnpCase) number(i int) identity.Numeric {
	if c.Entities[i].Key == "reserved:host" {
		return identity.NumHost
	}
	return identity.Numeric(1<<20 + i)
}

// own are the named ports of each subject.
func (c cnpCase) own() (out []identity.NamedPort) {
	for name, n := range c.NamedPorts {
		out = append(out, identity.NamedPort{Name: name, Port: n, Protocol: "TCP"})
	}
	return out
}

// peers are the entities as policies see them.
func (c cnpCase) peers(t *testing.T) (out []authz.Peer) {
	for _, e := range c.Entities {
		p := authz.Peer{Identity: cnpIdentity(e.Labels)}
		if (p.Identity.Reserved == "") != e.Managed {
			t.Fatalf("%s: entity %s is read as %s", c.ID, e.Key, p.Identity)
		}
		for _, l := range e.Labels {
			switch source, rest, _ := strings.Cut(l, ":"); {
			case source == "cidr":
				p.Block = netip.MustParsePrefix(strings.ReplaceAll(rest, "-", ":"))
			case source == "fqdn":
				p.Names = append(p.Names, strings.TrimSuffix(strings.ToLower(rest), "."))
			case l == "reserved:world" && e.Key == l:
				// Judged with IPv4 only: world is all of it.
				p.Block = netip.MustParsePrefix("0.0.0.0/0")
			}
		}
		out = append(out, p)
	}
	return out
}

// cnpIdentity makes an identity of Cilium's labels. A workload keeps all of
// them as labels of its pod, for a NetworkPolicy can name any there.
func cnpIdentity(labels []string) identity.Identity {
	ns, sa, own := "", "", map[string]string{}
	for _, l := range labels {
		source, rest, _ := strings.Cut(l, ":")
		key, value, _ := strings.Cut(rest, "=")
		switch {
		case source == "cidr", source == "fqdn", strings.HasPrefix(l, "reserved:world"):
			return identity.Identity{Reserved: "world"}
		case source == "reserved": // of the API server's node its first label
			return identity.Identity{Reserved: key}
		case key == identity.NamespaceLabel:
			ns = value
		case key == identity.ServiceAccountLabel:
			sa = value
		}
		own[key] = value
	}
	return identity.New(trustDomain, ns, sa, own)
}
