package issuer

import (
	"context"
	"fmt"
	"regexp"
	"slices"

	"portcullis/identity"
)

// Reviewer asks the API server about a token.
type Reviewer interface {
	// Review returns what the API server says of the token, for an audience.
	// An error means that it said nothing; a token that it rejects is no
	// error. Safe for concurrent use.
	Review(ctx context.Context, token, audience string) (Review, error)
}

// Review is the status of a TokenReview.
type Review struct {
	Authenticated bool
	Error         string // why not, in the API server's words
	Audiences     []string
	Username      string
	Extra         map[string][]string
}

// Extra claims of a service-account token.
const (
	extraNode       = "authentication.kubernetes.io/node-name"
	extraNodeUID    = "authentication.kubernetes.io/node-uid"
	extraPod        = "authentication.kubernetes.io/pod-name"
	extraPodUID     = "authentication.kubernetes.io/pod-uid"
	extraCredential = "authentication.kubernetes.io/credential-id"
)

// Refusal says why a request got no SVID. Its values are words for logs,
// counters and answers.
type Refusal string

// The refusals.
const (
	RefusedNoToken     Refusal = "no-token"          // nothing in the Authorization header
	RefusedToken       Refusal = "token-rejected"    // the API server does not know it, or it is over
	RefusedAudience    Refusal = "wrong-audience"    // made for somebody else
	RefusedAccount     Refusal = "wrong-account"     // of another service account
	RefusedNoPod       Refusal = "no-pod"            // not bound to a pod
	RefusedNoNode      Refusal = "no-node"           // of a pod that is on no node
	RefusedNodes       Refusal = "several-nodes"     // a claim that cannot be
	RefusedNodeName    Refusal = "invalid-node-name" // not one that Kubernetes gives
	RefusedRequest     Refusal = "invalid-request"   // the certificate request
	RefusedTooMany     Refusal = "too-many-requests" // of this node
	RefusedUnavailable Refusal = "unavailable"       // the issuer cannot decide or sign: no verdict on who asks
)

// refused is a Refusal with what a person wants to know.
type refused struct {
	reason Refusal
	detail string
}

func (r *refused) Error() string { return string(r.reason) + ": " + r.detail }

func refuse(reason Refusal, format string, args ...any) *refused {
	return &refused{reason, fmt.Sprintf(format, args...)}
}

// Rules are whom the issuer takes for an agent, or for a relay.
type Rules struct {
	Audience string // that the token must be made for
	// Account is the service account of the agents, as Kubernetes calls its
	// user: system:serviceaccount:NAMESPACE:NAME.
	Account string
	// Relay is that of relays; "": none gets an SVID.
	Relay string
}

// Attested is whom a token was found to be of.
type Attested struct {
	Node  identity.NodeName // where it runs
	Relay bool              // it is a relay; else that node's agent
}

// Path returns the path of its SPIFFE ID.
func (a Attested) Path() string {
	if a.Relay {
		return identity.RelaySPIFFEPath
	}
	return identity.AgentSPIFFEPath(a.Node)
}

// nodeName is a name that Kubernetes gives to nodes.
var nodeName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

const maxNodeName = 253

// Attest decides which node's agent a token is of, or that it is a relay's. Whatever is missing, double
// or unknown is refused: every name that comes out of here is one that the API
// server stands for.
func (r Rules) Attest(v Review) (who Attested, err error) {
	relay := r.Relay != "" && v.Username == r.Relay
	switch {
	case !v.Authenticated:
		return who, refuse(RefusedToken, "the API server rejects the token: %s", v.Error)
	case v.Error != "":
		return who, refuse(RefusedToken, "the API server has doubts: %s", v.Error)
	case !slices.Contains(v.Audiences, r.Audience):
		// Also when there are none: an authenticator that does not speak of
		// audiences has not looked at them.
		return who, refuse(RefusedAudience, "the token is for %q, not for %q", v.Audiences, r.Audience)
	case v.Username != r.Account && !relay:
		return who, refuse(RefusedAccount, "the token is of %q, not of %q", v.Username, r.Account)
	}
	nodes := v.Extra[extraNode]
	switch {
	case len(v.Extra[extraPod]) != 1 || len(v.Extra[extraPodUID]) != 1:
		// Who may have tokens made can have one bound to any node, but not one
		// bound to a pod on a node where there is none; and it ends with the pod.
		return who, refuse(RefusedNoPod, "the token is bound to no pod: mount a projected token into the agent's")
	case len(nodes) == 0:
		return who, refuse(RefusedNoNode, "the token is bound to no node: mount a projected token into a pod (Kubernetes 1.30 or newer)")
	case len(nodes) > 1:
		return who, refuse(RefusedNodes, "the token names %d nodes", len(nodes))
	case len(nodes[0]) > maxNodeName || !nodeName.MatchString(nodes[0]):
		return who, refuse(RefusedNodeName, "%.80q is no node's name", nodes[0])
	}
	return Attested{Node: identity.NodeName(nodes[0]), Relay: relay}, nil
}
