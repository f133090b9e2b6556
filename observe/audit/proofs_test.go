package audit

import (
	"bytes"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// proven writes a verifier's log: a workload is believed on a lease, proved,
// proved anew, and then not any more; and what flows were admitted.
func proven(t *testing.T, a *authority) string {
	dir := t.TempDir()
	l, err := Open(Config{Path: filepath.Join(dir, "n2.log"), Node: "n2", Signer: a.agent("n2")})
	must(t, err)
	ip, uid := netip.MustParseAddr("10.1.0.7"), identity.UID{1}
	id := identity.New("portcullis.lab", "shop", "cart", nil)
	cert := lease.Certificate{SPIFFEID: "spiffe://portcullis.lab/ns/shop/sa/cart", Serial: "abc123", Issuer: "CN=lab"}
	say := func(kind lease.LogKind, e identity.Evidence, why string, c lease.Certificate) {
		must(t, l.Append(lease.LogEntry{Kind: kind, Peer: "n1", IP: ip, Generation: 1, UID: uid, Identity: id, Evidence: e, Reason: why, Certificate: c}, nil))
		time.Sleep(10 * time.Second)
	}
	say(lease.LogConfirmed, identity.EvidenceLease, "", lease.Certificate{})
	must(t, l.AppendCoverage(Coverage{Flows: map[string]uint64{"lease": 1, FlowsNeedless: 5}, Seconds: 60, Lost: 2}))
	say(lease.LogProof, identity.EvidenceSVID, "", cert)
	say(lease.LogProof, identity.EvidenceSVID, "", cert)
	must(t, l.AppendCoverage(Coverage{Flows: map[string]uint64{"svid": 4}, Seconds: 60}))
	say(lease.LogProofRefusal, identity.EvidenceSVID, "wrong-id", cert)
	say(lease.LogWeakening, identity.EvidenceLease, "wrong-id", lease.Certificate{})
	say(lease.LogRevocation, identity.EvidenceNone, "revoked", lease.Certificate{})
	must(t, l.Close())
	return dir
}

func TestReportOfProofs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t)
		dir := proven(t, a)
		r := report(t, a.options(), Filter{}, dir)
		if len(r.Beliefs) != 3 || r.Beliefs[0].Evidence != "lease" || r.Beliefs[0].For != 10 || r.Beliefs[0].End != "proved" ||
			r.Beliefs[1].Evidence != "svid" || r.Beliefs[1].For != 30 || r.Beliefs[1].End != "weakened: wrong-id" ||
			r.Beliefs[2].Evidence != "lease" || r.Beliefs[2].For != 10 || r.Beliefs[2].End != "revocation: revoked" {
			t.Errorf("beliefs %s", show(r.Beliefs))
		}
		if len(r.Proofs) != 1 || r.Proofs[0].Count != 2 || r.Proofs[0].Serial != "abc123" || r.Proofs[0].Issuer != "CN=lab" || r.Proofs[0].SPIFFEID != "spiffe://portcullis.lab/ns/shop/sa/cart" || r.Proofs[0].Peer != "n1" {
			t.Errorf("proofs %s", show(r.Proofs))
		}
		if len(r.Weakenings) != 1 || r.Weakenings[0].Evidence != "lease" || r.Weakenings[0].Reason != "wrong-id" {
			t.Errorf("weakenings %s", show(r.Weakenings))
		}
		if len(r.Refusals) != 1 || r.Refusals[0].Reason != "wrong-id" {
			t.Errorf("refusals %s", show(r.Refusals))
		}
		if c := r.Coverage; len(c) != 3 || c["svid"].Flows != 4 || c["svid"].Percent != 40 || c[FlowsNeedless].Percent != 50 || r.FlowsLost != 2 {
			t.Errorf("coverage %s, %d lost", show(r.Coverage), r.FlowsLost)
		}
		flows := uint64(0)
		for _, b := range r.Buckets {
			flows += b.Flows["svid"] + b.Flows["lease"] + b.Flows[FlowsNeedless]
		}
		if flows != 10 {
			t.Errorf("%d flows in the plot, want 10", flows)
		}

		var text strings.Builder
		for _, table := range r.Tables() {
			text.WriteString(table.Title + "\n")
			for _, row := range table.Rows {
				text.WriteString(strings.Join(row, " ") + "\n")
			}
		}
		for _, want := range []string{"COVERAGE (share of admitted flows; 2 events of packets were lost", "svid 4 40.0%", "abc123 CN=lab n2 n1 2", "WEAKENED"} {
			if !strings.Contains(text.String(), want) {
				t.Errorf("%q is not in\n%s", want, text.String())
			}
		}
		var page bytes.Buffer
		must(t, r.HTML(&page, time.Now()))
		for _, want := range []string{"What share of the traffic does that cover?", "4 flows, svid", "abc123 of CN=lab", "a proof ended while the workload went on", "2 events of packets were lost"} {
			if !strings.Contains(page.String(), want) {
				t.Errorf("%q is not in the page", want)
			}
		}
		for l, err := range lines(filepath.Join(dir, "n2.log"), &bytes.Buffer{}) {
			must(t, err)
			if bytes.Contains(l.text, []byte(`"kind":"proof"`)) && !strings.Contains(Line(l.text), "workload=spiffe://portcullis.lab/ns/shop/sa/cart workload-certificate=abc123") {
				t.Errorf("%s", Line(l.text))
			}
		}
		// Of another namespace nobody was proved; flows are of whole nodes.
		if r := report(t, a.options(), Filter{Namespace: "other"}, dir); len(r.Proofs) != 0 || len(r.Weakenings) != 0 || len(r.Refusals) != 0 || r.Coverage["svid"].Flows != 4 {
			t.Errorf("%s", show(r))
		}
		// What a proof says is a part of the chain.
		if res := r.Logs[0]; res.Broken != nil {
			t.Errorf("%+v", res.Broken)
		}
	})
}
