package issuer

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// keyring is every authority of the trust domain with its times, and what all
// replicas of the issuer share. A value once made is never changed.
//
//	          in the bundle, not signing        key destroyed
//	made --> next -----------------> signing ---------------> retired --> gone
//	             published + overlap         at the same moment   + overlap
//
// The overlap is the longest life of an SVID, and a margin. Before the switch
// every agent has either asked again since the new authority was published, and
// so trusts it, or its SVID is over and it must ask; after it every SVID of the
// old one is over when that leaves the bundle. So nobody is ever refused for
// a rotation.
type keyring struct {
	td          spiffeid.TrustDomain
	sequence    uint64        // of the bundle; grows with each change of it
	life        time.Duration // the longest that an SVID was ever made for
	authorities []authority   // one signs; one at most is next; oldest first
}

// errDamaged: the Secret holds something that is no keyring of ours.
var errDamaged = errors.New("the issuer's Secret is damaged: mend it, or empty it for a new authority, which ends every SVID that is out")

// times are the settings that the states of a keyring depend on.
type times struct {
	svid      time.Duration // how long an SVID is made for
	authority time.Duration // how long an authority lives
	margin    time.Duration // for replicas that lag and clocks that differ
}

// CheckTimes tells whether an issuer can work with an SVID's and an authority's
// life, under the default margin.
func CheckTimes(svid, authority time.Duration) error {
	return times{svid, authority, DefaultMargin}.check()
}

func (t times) check() error {
	if t.svid < shortest {
		return fmt.Errorf("an SVID must live for %s at least, not for %s", shortest, t.svid)
	}
	if t.margin <= 0 || t.authority < 4*t.svid+2*t.margin {
		return fmt.Errorf("an authority must live for at least four SVIDs and two margins (%s), not for %s: it is replaced at half of its life, and both are trusted for an SVID's life before and after",
			4*t.svid+2*t.margin, t.authority)
	}
	return nil
}

// overlap is how long an authority is trusted before it signs, and after.
func (k *keyring) overlap(t times) time.Duration { return k.life + t.margin }

func (k *keyring) find(state string) int {
	return slices.IndexFunc(k.authorities, func(a authority) bool { return a.state() == state })
}

func (k *keyring) signing() authority { return k.authorities[k.find("signing")] }

// newKeyring makes the first one. Its sequence is the time, so that one made in
// the place of another is newer than that to every agent.
func newKeyring(td spiffeid.TrustDomain, t times, now time.Time) (*keyring, error) {
	a, err := newAuthority(td, t.authority, now)
	if err != nil {
		return nil, err
	}
	a.published, a.active = now, now // nobody trusts anything else yet
	return &keyring{td: td, sequence: uint64(now.Unix()), life: t.svid, authorities: []authority{a}}, nil
}

// advance returns the keyring as it should be now: k itself if nothing is due.
// published is the sequence of the bundle in the agents' ConfigMap, 0 if there
// is none.
func (k *keyring) advance(t times, published uint64, now time.Time) (*keyring, error) {
	n := *k
	n.authorities = slices.Clone(k.authorities)
	before := bundleOf(k.authorities)
	n.life = max(n.life, t.svid)

	n.authorities = slices.DeleteFunc(n.authorities, func(a authority) bool {
		return !a.retired.IsZero() && (now.After(a.retired.Add(n.overlap(t))) || now.After(a.cert.NotAfter))
	})
	s := n.find("signing")
	old := n.authorities[s]
	half := old.cert.NotBefore.Add(old.cert.NotAfter.Sub(old.cert.NotBefore) / 2)
	next := n.find("next")
	if next < 0 && !now.Before(half) {
		a, err := newAuthority(n.td, t.authority, now)
		if err != nil {
			return nil, err
		}
		n.authorities, next = append(n.authorities, a), len(n.authorities)
	}
	if next >= 0 {
		a := n.authorities[next]
		if a.published.IsZero() && published == k.sequence && k.find("next") >= 0 {
			a.published = now
		}
		// An issuer that was away for long has no time for the overlap: an
		// authority that is about to end makes SVIDs that end with it.
		late := old.cert.NotAfter.Sub(now) < n.life/2
		if !a.published.IsZero() && (late || now.After(a.published.Add(n.overlap(t)))) {
			a.active = now
			old.retired, old.key = now, nil
			n.authorities[s] = old
		}
		n.authorities[next] = a
	}
	// Agents take no bundle that is older than one they have. A ConfigMap
	// that is ahead of the Secret tells of a Secret that was restored.
	ahead := published > k.sequence
	if ahead || !slices.EqualFunc(before, bundleOf(n.authorities), (*x509.Certificate).Equal) {
		n.sequence = max(k.sequence+1, published+1, uint64(max(0, now.Unix())))
	}
	if n.same(k) {
		return k, nil
	}
	return &n, nil
}

// same tells that nothing has to be written.
func (k *keyring) same(o *keyring) bool {
	return k.sequence == o.sequence && k.life == o.life && slices.EqualFunc(k.authorities, o.authorities, func(a, b authority) bool {
		return a.cert.Equal(b.cert) && a.published.Equal(b.published) && a.active.Equal(b.active) && a.retired.Equal(b.retired)
	})
}

func bundleOf(authorities []authority) (certs []*x509.Certificate) {
	for _, a := range authorities {
		certs = append(certs, a.cert)
	}
	return certs
}

// bundle returns the trust bundle in the SPIFFE format.
func (k *keyring) bundle() ([]byte, error) {
	b := spiffebundle.FromX509Authorities(k.td, bundleOf(k.authorities))
	b.SetSequenceNumber(k.sequence)
	return b.Marshal()
}

// The form in the Secret.
type storedRing struct {
	TrustDomain string            `json:"trustDomain"`
	Sequence    uint64            `json:"sequence"`
	SVIDLife    string            `json:"svidLife"`
	Authorities []storedAuthority `json:"authorities"`
}

type storedAuthority struct {
	Certificate string    `json:"certificate"`   // PEM
	Key         string    `json:"key,omitempty"` // PEM, PKCS #8
	Published   time.Time `json:"published,omitzero"`
	Active      time.Time `json:"active,omitzero"`
	Retired     time.Time `json:"retired,omitzero"`
}

// encode returns the form in the Secret.
func (k *keyring) encode() ([]byte, error) {
	s := storedRing{TrustDomain: k.td.Name(), Sequence: k.sequence, SVIDLife: k.life.String()}
	for _, a := range k.authorities {
		sa := storedAuthority{Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})),
			Published: a.published.UTC().Round(0), Active: a.active.UTC().Round(0), Retired: a.retired.UTC().Round(0)}
		if a.key != nil {
			der, err := x509.MarshalPKCS8PrivateKey(a.key)
			if err != nil {
				return nil, err
			}
			sa.Key = string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
		}
		s.Authorities = append(s.Authorities, sa)
	}
	return json.MarshalIndent(s, "", "  ")
}

// decode reads what encode wrote, and believes nothing of it that it can check.
func decode(data []byte, td spiffeid.TrustDomain) (*keyring, error) {
	var s storedRing
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, fmt.Errorf("%w: %w", errDamaged, err)
	}
	if s.TrustDomain != td.Name() {
		return nil, fmt.Errorf("the issuer's Secret is of the trust domain %q, not %q: give that one, or another Secret", s.TrustDomain, td.Name())
	}
	life, err := time.ParseDuration(s.SVIDLife)
	if err != nil || life <= 0 {
		return nil, fmt.Errorf("%w: svidLife %q", errDamaged, s.SVIDLife)
	}
	k := &keyring{td: td, sequence: s.Sequence, life: life}
	count := map[string]int{}
	for _, sa := range s.Authorities {
		a, err := decodeAuthority(sa)
		if err == nil {
			err = a.check(td)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errDamaged, err)
		}
		count[a.state()]++
		k.authorities = append(k.authorities, a)
	}
	if count["signing"] != 1 || count["next"] > 1 {
		return nil, fmt.Errorf("%w: %d authorities sign and %d are next", errDamaged, count["signing"], count["next"])
	}
	return k, nil
}

func decodeAuthority(s storedAuthority) (a authority, err error) {
	a.published, a.active, a.retired = s.Published, s.Active, s.Retired
	block, _ := pem.Decode([]byte(s.Certificate))
	if block == nil {
		return a, errors.New("a certificate is missing")
	}
	if a.cert, err = x509.ParseCertificate(block.Bytes); err != nil || s.Key == "" {
		return a, err
	}
	if block, _ = pem.Decode([]byte(s.Key)); block == nil {
		return a, errors.New("a key is no PEM block")
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return a, err
	}
	ok := false
	if a.key, ok = key.(*ecdsa.PrivateKey); !ok {
		return a, errors.New("a key is not ECDSA")
	}
	return a, nil
}
