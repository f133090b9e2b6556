package svid_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"portcullis/identity"
	"portcullis/identity/labca"
	"portcullis/identity/svid"
)

// until waits for a condition, looked at whenever something of the workloads
// changes.
func until(t *testing.T, w svid.Workloads, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(time.Minute)
	for {
		changed := w.Changed()
		if ok() {
			return
		}
		select {
		case <-changed:
		case <-time.After(20 * time.Millisecond): // a problem is no change
		case <-deadline:
			t.Fatalf("not yet: %s", what)
		}
	}
}

func labWorkloads(t *testing.T, dir string) (w *svid.DelegatedWorkloads, trust *svid.Bundles) {
	t.Helper()
	w, err := svid.NewDelegatedWorkloads(svid.DelegatedConfig{Address: labca.AdminAddress(dir, "n1"), Kubernetes: true})
	if err != nil {
		t.Fatal(err)
	}
	background(t, w.Run)
	agent := source(t, svid.Config{From: workloadAPI(t, labca.Address(dir, "n1")), ID: nodeID(t, "n1")})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := agent.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	if trust, err = svid.NewBundles(svid.TrustConfig{Own: td, Agent: agent}); err != nil {
		t.Fatal(err)
	}
	background(t, trust.Run)
	return w, trust
}

// The lab's trust domain gives workloads' SVIDs as SPIRE does: fetched over the
// admin socket, verified by the agent's bundle, renewed, and signed anew by
// another authority.
func TestLabGivesWorkloads(t *testing.T) {
	dir := labDir(t)
	ca, stop := serve(t, dir, 3*time.Second)
	w, trust := labWorkloads(t, dir)
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/cart")
	of := svid.Workload{UID: identity.UID{1}, Namespace: "shop", Name: "cart-1", ServiceAccount: "cart"}
	w.Follow(of, id)
	var got *x509svid.SVID
	fresh := func(from *svid.Bundles) func() bool {
		return func() bool {
			v, err := w.SVID(of.UID, id)
			if err != nil || got != nil && v.Certificates[0].Equal(got.Certificates[0]) {
				return false
			}
			if _, _, err := x509svid.Verify(v.Certificates, from); err != nil {
				return false
			}
			got = v
			return true
		}
	}
	until(t, w, "the SVID", fresh(trust))
	until(t, w, "the renewed SVID", fresh(trust))
	old := got
	if err := ca.ReplaceAuthority(false); err != nil {
		t.Fatal(err)
	}
	until(t, w, "one of the new authority", fresh(trust))
	if _, _, err := x509svid.Verify(old.Certificates, trust); err == nil {
		t.Error("the former authority still vouches")
	}
	stop()
	until(t, w, "what was given ends", func() bool { _, err := w.SVID(of.UID, id); return errors.Is(err, svid.ErrExpired) })
}

func TestLabIsAskedForWhatItCannotName(t *testing.T) {
	dir := labDir(t)
	serve(t, dir, time.Hour)
	w, _ := labWorkloads(t, dir)
	id := spiffeid.RequireFromPath(td, "/ns/shop/sa/cart")
	for i, test := range []struct{ namespace, account, want string }{
		{"shop", "", "empty half"},
		{"shop", "a/b", "cannot be in a SPIFFE ID"},
		{"portcullis/node", "n1", "cannot be in a SPIFFE ID"},
		{"shop", "other", svid.ErrWrongID.Error()},
	} {
		of := svid.Workload{UID: identity.UID{byte(i + 1)}, Namespace: test.namespace, Name: "x", ServiceAccount: test.account}
		w.Follow(of, id)
		until(t, w, test.want, func() bool {
			v, err := w.SVID(of.UID, id)
			if err == nil {
				t.Fatalf("%+v got %s", of, v.ID)
			}
			return strings.Contains(err.Error(), test.want)
		})
	}
}
