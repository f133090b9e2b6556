package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"portcullis/authz"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/authz/tools"
)

// The tools read a case as its cluster's manifests, as a user has them, and
// make its matrix.

// toolTally counts how a corpus went by the tools.
type toolTally struct{ cases, refused, cells, wrong, decided, left, traces int }

func (n *toolTally) String() string {
	return fmt.Sprintf("by the tools, from manifests: %d cases, %d refused; %d cells, %d differences, %d more by decision, %d cannot be said in manifests; %d cells traced to their rules",
		n.cases, n.refused, n.cells, n.wrong, n.decided, n.left, n.traces)
}

// manifests reads objects as the documents of one file.
func manifests(t *testing.T, objects []object) (*tools.World, error) {
	t.Helper()
	var b strings.Builder
	for _, o := range objects {
		text, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "---\n%s\n", text)
	}
	r := tools.NewReader(append(cilium.Dialects(), k8s.Dialect)...)
	r.File("case", []byte(b.String()))
	return r.World()
}

func namespaceObject(name string, labels map[string]string) object {
	return object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": name, "labels": labels}}
}

// judge makes the matrix of the ports that are expected.
func (n *toolTally) judge(t *testing.T, w *tools.World, opts authz.Options, expect map[string]table, externals []string) *tools.Matrix {
	t.Helper()
	j, err := tools.NewJudge(w, opts)
	if err != nil {
		t.Fatal(err)
	}
	o := tools.MatrixOptions{Reasons: true}
	for _, name := range slices.Sorted(maps.Keys(expect)) {
		p, err := tools.ParsePort(name)
		if err != nil || p.String() != name {
			t.Fatal(name, p, err)
		}
		o.Ports = append(o.Ports, p)
	}
	for _, name := range externals {
		p, err := w.Party(name)
		if err != nil {
			t.Fatal(err)
		}
		o.Externals = append(o.Externals, p)
	}
	m := j.Matrix(o)
	n.trace(t, j, m, o)
	return m
}

// trace holds one port of the matrix together with its traces: the verdicts are
// the same, and they are what the rules that are said to match come to.
func (n *toolTally) trace(t *testing.T, j *tools.Judge, m *tools.Matrix, o tools.MatrixOptions) {
	t.Helper()
	port := o.Ports[n.cases%len(o.Ports)]
	table := m.Ports[port.String()]
	parties := slices.Clone(o.Externals)
	for i := range m.Workloads {
		parties = append(parties, j.World().WorkloadParty(i))
	}
	for _, from := range parties {
		for _, to := range parties {
			var egress, ingress byte = '-', '-'
			a, b := from.Workload, to.Workload
			switch {
			case a >= 0 && b >= 0:
				egress, ingress = table.Egress[a][b], table.Ingress[a][b]
			case a >= 0:
				egress = table.ToExternal[a][slices.Index(m.Externals, to.Title)]
			case b >= 0:
				ingress = table.FromExternal[slices.Index(m.Externals, from.Title)][b]
			default:
				continue
			}
			trace := j.Trace(from, to, port, tools.Request{})
			n.side(t, trace, &trace.Egress, egress)
			n.side(t, trace, &trace.Ingress, ingress)
		}
	}
}

// side compares one side of a trace with its cell.
func (n *toolTally) side(t *testing.T, trace *tools.Trace, s *tools.TraceSide, want byte) {
	t.Helper()
	if want == '-' {
		return
	}
	n.traces++
	deny, allow, l7, under, decided := false, false, false, false, 0
	for _, p := range s.Policies {
		under = under || p.DefaultDeny
		for _, r := range p.Rules {
			if r.Decided {
				decided++
			}
			if r.Decided && !r.Matches {
				t.Errorf("a rule decides that does not match: %s", trace.Text())
			}
			deny = deny || r.Matches && r.Action == "deny"
			allow = allow || r.Matches && r.Action == "allow"
			l7 = l7 || r.Matches && strings.Contains(r.Needs, "L7")
		}
	}
	got := byte('.')
	switch {
	case strings.Contains(s.Reason.Text, "its own node"):
	case deny, under && !allow:
		got = 'X'
	case l7:
		got = '7'
	}
	if got != want || s.Verdict != map[byte]string{'.': "allowed", 'X': "blocked", '7': "allowed through L7"}[want] {
		t.Errorf("the matrix says %c, the trace's rules come to %c: %s", want, got, trace.Text())
	}
	// Where nobody is allowed anything, the peer is not looked at, nor who else denies it.
	if (deny || allow && under) && decided != 1 && !strings.Contains(s.Reason.Text, "its own node") && !strings.HasPrefix(s.Evidence, "none") {
		t.Errorf("%d rules decide: %s", decided, trace.Text())
	}
}

func TestToolsNetworkPolicyCorpus(t *testing.T) {
	var n toolTally
	for _, c := range cases[netpolCase](t, "netpol.jsonl.gz") {
		n.cases++
		objects := slices.Clone(c.Policies)
		for name, labels := range c.Namespaces {
			objects = append(objects, namespaceObject(name, labels))
		}
		for _, p := range c.Pods {
			objects = append(objects, object{"apiVersion": "v1", "kind": "Pod",
				"metadata": object{"namespace": p.Namespace, "name": p.Name, "labels": p.Labels},
				"spec":     object{"containers": []object{{"ports": c.ports(p.Ports)}}},
				"status":   object{"phase": "Running", "podIP": p.IP, "podIPs": []object{{"ip": p.IP}}}})
		}
		w, err := manifests(t, objects)
		if n.skip(t, c.ID, err) {
			continue
		}
		m := n.judge(t, w, authz.Options{}, c.Expect, c.Externals)
		at := make([]int, len(c.Pods)) // in the matrix
		for i, p := range c.Pods {
			if at[i] = slices.Index(m.Workloads, p.Namespace+"/"+p.Name); at[i] < 0 {
				t.Fatalf("%s: %s/%s is not in the matrix", c.ID, p.Namespace, p.Name)
			}
		}
		for name, want := range c.Expect {
			got := m.Ports[name]
			for i := range c.Pods {
				for k := range c.Pods {
					if i != k { // the diagonal is undefined upstream
						where := fmt.Sprintf("%s (%s): %s: %s -> %s", c.ID, c.Description, name, m.Workloads[at[i]], m.Workloads[at[k]])
						n.cell(t, got.Ingress[at[i]][at[k]], want.Ingress[i][k], "%s: ingress", where)
						n.cell(t, got.Egress[at[i]][at[k]], want.Egress[i][k], "%s: egress", where)
						n.cell(t, got.Combined[at[i]][at[k]], want.Combined[i][k], "%s: combined", where)
					}
				}
				for x := range c.Externals {
					n.cell(t, got.FromExternal[x][at[i]], want.FromExternal[x][i], "%s: %s: from %s to %s", c.ID, name, c.Externals[x], m.Workloads[at[i]])
					n.cell(t, got.ToExternal[at[i]][x], want.ToExternal[x][i], "%s: %s: from %s to %s", c.ID, name, m.Workloads[at[i]], c.Externals[x])
				}
			}
		}
	}
	t.Logf("NetworkPolicy %v", &n)
	if n.cases != 95 || n.refused > 0 || n.cells < 133_302 {
		t.Error("fewer cases or cells than there are")
	}
}

// skip reports, and counts, a case that is refused.
func (n *toolTally) skip(t *testing.T, id string, err error) bool {
	t.Helper()
	var problems authz.Problems
	switch {
	case err == nil:
		return false
	case !errors.As(err, &problems):
		t.Fatalf("%s: %v", id, err)
	}
	n.refused++
	t.Logf("%s refused: %v", id, problems[0])
	return true
}

func (n *toolTally) cell(t *testing.T, got, want byte, format string, args ...any) {
	t.Helper()
	if want == '-' {
		return
	}
	if n.cells++; got != want {
		n.wrong++
		t.Errorf("%s: %c, want %c", fmt.Sprintf(format, args...), got, want)
	}
}

// ports are those of a pod's container.
func (c netpolCase) ports(ports []netpolPort) (out []object) {
	for _, p := range ports {
		out = append(out, object{"name": p.Name, "containerPort": p.Port, "protocol": p.Protocol})
	}
	return out
}

func TestToolsCiliumCorpus(t *testing.T) {
	var n toolTally
	for _, c := range cases[cnpCase](t, "cnp.jsonl.gz") {
		n.cases++
		objects := []object{c.Object}
		namespaces := map[string]map[string]string{}
		var titles []string // of each entity, as it is asked for; empty: it cannot be
		for i, e := range c.Entities {
			if !e.Managed {
				titles = append(titles, e.external())
				continue
			}
			pod := cnpIdentity(e.Labels)
			name := fmt.Sprintf("pod-%d", i)
			titles = append(titles, pod.Namespace+"/"+name)
			if namespaces[pod.Namespace] == nil {
				namespaces[pod.Namespace] = map[string]string{}
			}
			for _, l := range e.Labels {
				if rest, ok := strings.CutPrefix(l, "k8s:io.cilium.k8s.namespace.labels."); ok {
					key, value, _ := strings.Cut(rest, "=")
					namespaces[pod.Namespace][key] = value
				}
			}
			var ports []netpolPort
			for _, p := range c.own() {
				ports = append(ports, netpolPort{Name: p.Name, Port: p.Port, Protocol: p.Protocol})
			}
			objects = append(objects, object{"apiVersion": "v1", "kind": "Pod", "metadata": object{"namespace": pod.Namespace, "name": name, "labels": podLabels(pod.Labels)},
				"spec": object{"serviceAccountName": pod.ServiceAccount, "containers": []object{{"ports": netpolCase{}.ports(ports)}}}})
		}
		for name, labels := range namespaces {
			objects = append(objects, namespaceObject(name, labels))
		}
		w, err := manifests(t, objects)
		if n.skip(t, c.ID, err) {
			continue
		}
		n.compare(t, c, w, titles)
	}
	t.Logf("CiliumNetworkPolicy %v", &n)
	if n.cases != 64 || n.refused > 0 || n.cells < 51_702 || n.decided != 90 || n.left > 0 {
		t.Error("fewer cases or cells than there are")
	}
}

// podLabels are those labels of an entity that a pod can have.
func podLabels(labels map[string]string) map[string]string {
	out := maps.Clone(labels)
	maps.DeleteFunc(out, func(key, _ string) bool { return strings.HasPrefix(key, "io.cilium.k8s.namespace.labels.") })
	return out
}

// external is how the tools are asked for an entity that is no workload.
func (e cnpEntity) external() string {
	last := "" // the longest prefix comes last
	for _, l := range e.Labels {
		switch source, rest, _ := strings.Cut(l, ":"); {
		case source == "cidr":
			last = strings.ReplaceAll(rest, "-", ":")
		case source == "fqdn":
			return l
		case source == "reserved" && last == "":
			last = l
		}
	}
	return last
}

// compare compares every cell of a case that has a workload on one side.
func (n *toolTally) compare(t *testing.T, c cnpCase, w *tools.World, titles []string) {
	t.Helper()
	var externals []string
	for i, e := range c.Entities {
		if !e.Managed && titles[i] != "" && !slices.Contains(externals, titles[i]) {
			externals = append(externals, titles[i])
		}
	}
	m := n.judge(t, w, authz.Options{LocalHost: true}, c.Expect, externals)
	for name, want := range c.Expect {
		got := m.Ports[name]
		for s, subject := range c.Entities {
			if !subject.Managed {
				continue
			}
			own := slices.Index(m.Workloads, titles[s])
			for p, peer := range c.Entities {
				at, out := slices.Index(m.Workloads, titles[p]), slices.Index(m.Externals, titles[p])
				var in, eg byte
				switch {
				case at >= 0:
					in, eg = got.Ingress[at][own], got.Egress[own][at]
				case out >= 0:
					in, eg = got.FromExternal[out][own], got.ToExternal[own][out]
				default:
					n.left += 2
					continue
				}
				for _, x := range []struct {
					side      string
					got, want byte
				}{{"ingress", in, want.Ingress[p][s]}, {"egress", eg, want.Egress[s][p]}} {
					if decisions[c.ID].reason == clusterUnnamed && x.want == 'X' && x.got == '.' && peer.inCluster() {
						n.decided++ // see decisions
						continue
					}
					if peer.Key == "reserved:host" && x.side == "ingress" && x.want == '7' && x.got == '.' {
						// The proxy has it pass wholly, as Cilium's does; its table
						// says only that it goes there.
						n.decided++
						continue
					}
					n.cell(t, x.got, x.want, "%s (%s): %s: %s of %s, peer %s", c.ID, c.File, name, x.side, subject.Key, peer.Key)
				}
			}
		}
	}
}
