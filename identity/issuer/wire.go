package issuer

import (
	"encoding/json"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// DefaultAudience is the audience that agents' tokens are made for. A token for
// another audience, such as the API server's own, is refused: whoever can read
// one in passing cannot use it here, nor ours there.
const DefaultAudience = "portcullis-issuer"

// DefaultPort is the TCP port that issuers listen on.
const DefaultPort = 4261

// Paths of the HTTPS API.
const (
	// PathSVID takes a POST with `Authorization: Bearer TOKEN` and a PKCS #10
	// request in DER, and answers with Issued.
	PathSVID = "/v1/node-svid"
	// PathBundle answers a GET with the trust bundle in the SPIFFE format, to
	// anybody: it holds nothing secret.
	PathBundle = "/v1/bundle"
	// PathHealth answers a GET with 200, or 503 and a reason.
	PathHealth = "/healthz"
	// PathStatus answers a GET with Status.
	PathStatus = "/v1/status"
)

// Bounds of what either side reads of the other, in bytes.
const (
	MaxToken   = 16 << 10
	MaxRequest = 4 << 10
	MaxAnswer  = 256 << 10
)

// Issued is the answer to a request for an SVID.
type Issued struct {
	Certificate []byte          `json:"certificate"` // DER
	Bundle      json.RawMessage `json:"bundle"`      // the trust bundle, in the SPIFFE format
}

// Problem is the answer to a request that is refused or failed.
type Problem struct {
	Reason  string `json:"reason"` // one word: a Refusal, or "unavailable"
	Message string `json:"message"`
}

// Status is what an issuer tells of itself.
type Status struct {
	TrustDomain string            `json:"trustDomain"`
	Sequence    uint64            `json:"sequence"` // of the trust bundle
	Authorities []AuthorityStatus `json:"authorities"`
	Issued      uint64            `json:"issued"`  // since the start
	Refused     map[string]uint64 `json:"refused"` // since the start, by reason
	Problem     string            `json:"problem,omitempty"`
}

// AuthorityStatus describes one authority of the trust bundle.
type AuthorityStatus struct {
	Serial  string `json:"serial"` // hexadecimal
	State   string `json:"state"`  // next, signing or retired
	Expires string `json:"expires"`
}

// ID is the SPIFFE ID of the issuers of a trust domain. Their certificates carry
// it, and agents accept no other: the token goes to nobody else.
func ID(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	id, err := spiffeid.FromPath(td, "/portcullis/issuer")
	if err != nil {
		return id, fmt.Errorf("the issuer's SPIFFE ID: %w", err)
	}
	return id, nil
}
