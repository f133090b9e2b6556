package tools

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"portcullis/authz"
	"portcullis/authz/dialect"
)

// maxProblems bounds what is reported of all files together.
const maxProblems = 1_000

// Reader makes a World of manifests. It keeps every problem of every file: a
// policy that cannot be understood, and an object that it needs which makes no
// sense, are problems. What says nothing to policy is left out with a note.
type Reader struct {
	world    *World
	dialects []dialect.Dialect
	problems authz.Problems
	file     string
	seen     map[authz.Ref]string
	ignored  map[string]int
	partSize int
}

// NewReader returns a reader that understands policies of these dialects.
func NewReader(dialects ...dialect.Dialect) *Reader {
	r := &Reader{world: newWorld(), seen: map[authz.Ref]string{}, ignored: map[string]int{}, partSize: partSize}
	// Its own first: of a Namespace it keeps more than a dialect does.
	r.dialects = slices.Concat(r.objects(), dialects)
	return r
}

// objects are the dialects of what is no policy.
func (r *Reader) objects() []dialect.Dialect {
	take := func(version, kind string, parse func(*dialect.Document)) dialect.Dialect {
		return dialect.Dialect{APIVersion: version, Kind: kind, Parse: func(d *dialect.Document) (dialect.Result, []authz.Problem) {
			parse(d)
			return dialect.Result{}, d.Problems()
		}}
	}
	out := []dialect.Dialect{
		take("v1", "Namespace", r.namespace), take("v1", "Pod", r.pod), take("v1", "Node", r.node),
		take("v1", "Service", r.service), take("v1", "Endpoints", r.endpoints),
		take("discovery.k8s.io/v1", "EndpointSlice", r.slice),
		take("v1", "ReplicationController", r.template("ReplicationController", "spec", "template")),
		take("batch/v1", "Job", r.template("Job", "spec", "template")),
		take("batch/v1", "CronJob", r.template("CronJob", "spec", "jobTemplate", "spec", "template")),
	}
	for _, kind := range []string{"Deployment", "StatefulSet", "DaemonSet", "ReplicaSet"} {
		out = append(out, take("apps/v1", kind, r.template(kind, "spec", "template")))
	}
	return append(out, take("", "", r.other))
}

// policyGroups are the API groups of policies, of whatever makers. An object of
// theirs that no dialect takes may be policy, and is never left out, but for
// the kinds beside them.
var policyGroups = map[string][]string{
	"networking.k8s.io": {"Ingress", "IngressClass", "IPAddress", "ServiceCIDR", "ClusterCIDR"},
	"cilium.io": {"CiliumEndpoint", "CiliumEndpointSlice", "CiliumIdentity", "CiliumNode", "CiliumNodeConfig", "CiliumPodIPPool",
		"CiliumLoadBalancerIPPool", "CiliumBGPAdvertisement", "CiliumBGPClusterConfig", "CiliumBGPNodeConfig", "CiliumBGPPeerConfig"},
	"policy.networking.k8s.io": nil,
	"projectcalico.org":        nil,
	"crd.projectcalico.org":    {"IPPool", "IPAMBlock", "IPAMHandle", "IPAMConfig", "BlockAffinity", "BGPConfiguration", "BGPPeer", "ClusterInformation", "FelixConfiguration", "KubeControllersConfiguration", "IPReservation", "CalicoNodeStatus"},
	"crd.antrea.io":            nil,
	"k8s.ovn.org":              nil,
	"security.istio.io":        nil,
	"policy.linkerd.io":        nil,
	"networking.gke.io":        nil,
	"networking.k8s.aws":       nil,
	"extensions":               {"Ingress"},
}

// other takes an object that nobody else does.
func (r *Reader) other(doc *dialect.Document) {
	root := doc.Root()
	version, kind := text(root, "apiVersion"), text(root, "kind")
	group, _, grouped := strings.Cut(version, "/")
	harmless, policy := policyGroups[group]
	known := slices.ContainsFunc(r.dialects, func(d dialect.Dialect) bool { return d.Kind == kind && d.APIVersion != "" })
	switch {
	case grouped && policy && !slices.Contains(harmless, kind):
		root.Refuse("%s %s may be policy, and is not known: what it allows and denies cannot be judged; remove it, or write it in a kind that is (%s)",
			version, kind, strings.Join(r.kinds(), ", "))
	case known:
		root.Refuse("a %s of the version %q is not known: it is read as %s", kind, version, strings.Join(r.versions(kind), " or "))
	default:
		r.ignored[version+" "+kind]++
	}
}

// kinds are those of policies.
func (r *Reader) kinds() (out []string) {
	for _, d := range r.dialects {
		if group, _, ok := strings.Cut(d.APIVersion, "/"); ok && !slices.Contains(out, d.Kind) {
			if _, policy := policyGroups[group]; policy {
				out = append(out, d.Kind)
			}
		}
	}
	return out
}

func (r *Reader) versions(kind string) (out []string) {
	for _, d := range r.dialects {
		if d.Kind == kind {
			out = append(out, d.APIVersion)
		}
	}
	return out
}

// object reports whether the document's object is well-formed and the first of
// its name.
func (r *Reader) object(doc *dialect.Document, ref authz.Ref) bool {
	if len(doc.Problems()) > 0 {
		return false
	}
	return r.first(ref, func(other string) { doc.Root().Refuse("%s is in %s already: keep one of them", ref, other) })
}

func (r *Reader) first(ref authz.Ref, twice func(string)) bool {
	if other, ok := r.seen[ref]; ok {
		twice(other)
		return false
	}
	r.seen[ref] = r.file
	return true
}

// File reads one file, YAML or JSON, of any number of documents.
func (r *Reader) File(name string, data []byte) {
	r.world.Files = append(r.world.Files, name)
	r.file = name
	for part := range parts(data, r.partSize) {
		if len(r.problems) >= maxProblems {
			return
		}
		r.part(name, part)
	}
}

// part reads what of a file is parsed at once.
func (r *Reader) part(name string, p part) {
	parsed, err := dialect.ParseFile(name, p.data, r.dialects...)
	var found authz.Problems
	switch {
	case errors.As(err, &found):
		for _, x := range found {
			p.shift(&x)
			r.problems = append(r.problems, x)
		}
	case err != nil: // nothing is known about the file, so it is refused
		r.problems = append(r.problems, authz.Problem{File: name, Message: err.Error()})
	}
	twice := func(ref authz.Ref) func(string) {
		return func(other string) {
			r.problems = append(r.problems, authz.Problem{File: name, Message: fmt.Sprintf("%s is in %s already: keep one of them, or give one another name", ref, other)})
		}
	}
	for _, policy := range parsed.Policies {
		if r.first(policy.Ref, twice(policy.Ref)) {
			r.world.Policies = append(r.world.Policies, Policy{Policy: policy, File: name})
		}
	}
	for _, g := range parsed.Groups {
		if r.first(g.Ref, twice(g.Ref)) {
			r.world.Groups = append(r.world.Groups, g)
		}
	}
}

// World returns what the files say, or an error of type authz.Problems. The
// reader is not to be used afterwards.
func (r *Reader) World() (*World, error) {
	if len(r.problems) > 0 {
		return nil, r.problems[:min(len(r.problems), maxProblems)]
	}
	var kinds []string
	for kind, n := range r.ignored {
		kinds = append(kinds, fmt.Sprintf("%s (%d)", kind, n))
	}
	if slices.Sort(kinds); len(kinds) > 0 {
		r.world.note("left out, for they are no policy and no workload: %s", list(kinds))
	}
	r.world.derive()
	return r.world, nil
}
