package session

import (
	"crypto/x509"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"portcullis/identity"
)

// agentPath is the path of an agent's SPIFFE ID, less the node's name.
var agentPath = identity.AgentSPIFFEPath("")

// AgentID returns the SPIFFE ID of a node's agent.
func AgentID(td spiffeid.TrustDomain, node identity.NodeName) (spiffeid.ID, error) {
	id, err := spiffeid.FromPath(td, identity.AgentSPIFFEPath(node))
	if err == nil && strings.Contains(string(node), "/") {
		err = fmt.Errorf("it contains a slash")
	}
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("node name %q cannot stand in a SPIFFE ID: %w", node, err)
	}
	return id, nil
}

// NodeOf returns the node whose agent bears the SPIFFE ID. Every other ID of
// the trust domain, and every ID of another, is an error.
func NodeOf(td spiffeid.TrustDomain, id spiffeid.ID) (identity.NodeName, error) {
	if td.IsZero() || id.TrustDomain() != td {
		return "", fmt.Errorf("%s is not of the trust domain %s", id, td)
	}
	name, ok := strings.CutPrefix(id.Path(), agentPath)
	if !ok || name == "" || strings.Contains(name, "/") {
		return "", fmt.Errorf("%s is not the SPIFFE ID of a node's agent", id)
	}
	return identity.NodeName(name), nil
}

// verifiers admits the agents of known nodes: an owner's authorizer.
func (t *Transport) verifiers() tlsconfig.Authorizer {
	return func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		node, err := NodeOf(t.cfg.TrustDomain, id)
		switch {
		case err != nil:
			return err
		case node == t.cfg.Node:
			return fmt.Errorf("%s is this node's own SPIFFE ID", id)
		case !t.cfg.Known(node):
			return fmt.Errorf("%s is the agent of a node that is not known here", id)
		}
		return nil
	}
}

// exactly admits one owner's agent and nobody else: a verifier's authorizer. An
// answer about an IP counts only from the node that was asked.
func (t *Transport) exactly(owner identity.NodeName) tlsconfig.Authorizer {
	return func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		node, err := NodeOf(t.cfg.TrustDomain, id)
		if err == nil && node != owner {
			err = fmt.Errorf("%s answered where the agent of node %s was asked", id, owner)
		}
		return err
	}
}
