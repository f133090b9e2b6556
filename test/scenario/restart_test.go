package scenario

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"portcullis/agent/api"
	"portcullis/bpf/abi"
	"portcullis/chaos/lab"
	"portcullis/ipcache/lease"
)

// A crash and a return within the lease are not visible to traffic, and let
// nothing through that was not let through before.
func TestRestartIsNotSeen(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	stop := w.knock(w.stranger)
	before, policies := w.binding(w.client), w.policies()
	endpoints := map[string]*api.Endpoint{"server": w.endpoint(w.server), "client": w.endpoint(w.client)}
	for _, node := range []string{verifier, owner} {
		w.kill(node)
		traffic.goesOn("traffic without the agent of node " + node)
		w.start(node)
		traffic.goesOn("traffic with the new agent of node " + node)
		w.eventually("the session is back", func() error {
			if s := w.session(); s.GetState() != "up" {
				return fmt.Errorf("%v", s)
			}
			return nil
		})
	}
	if b := w.binding(w.client); b.GetGeneration() != before.GetGeneration() || b.GetStamp() != before.GetStamp() || b.GetState() != "live" {
		t.Errorf("the binding was %v, is %v", before, b)
	}
	for name, r := range map[string]lab.Running{"server": w.server, "client": w.client} {
		e, old := w.endpoint(r), endpoints[name]
		if e.GetState() != "active" || e.GetId() != old.GetId() || e.GetGeneration() != old.GetGeneration() || e.GetIngressEnforced() != old.GetIngressEnforced() {
			t.Errorf("endpoint %s was %v, is %v", name, old, e)
		}
	}
	if p := w.policies(); !slices.Equal(p, policies) || len(p) != 1 {
		t.Errorf("policies were %v, are %v", policies, p)
	}
	w.must(w.reach(w.client))
	second, err := w.Run(t.Context(), lab.Workload{Name: "second", Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{})
	w.must(err)
	w.must(w.reach(second))
	traffic.lossless()
	if n := stop(); n == 0 || w.echo.from(w.stranger) != 0 {
		t.Errorf("the stranger got in %d times in %d tries", w.echo.from(w.stranger), n)
	}
}

// Without its journal an agent does not know what it granted: until no grant
// can be alive nothing is bound anew. What is bound stays.
func TestRestartWithoutJournal(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	journal := filepath.Join(w.JournalDir(owner), "journal")
	for what, spoil := range map[string]func() error{
		"removed": func() error { return os.Remove(journal) },
		"corrupt": func() error {
			b, err := os.ReadFile(journal)
			if err != nil || len(b) < 16 {
				return errors.Join(err, fmt.Errorf("journal of %d bytes", len(b)))
			}
			copy(b, "not a journal at all")
			return os.WriteFile(journal, b, 0o600)
		},
	} {
		w.kill(owner)
		w.must(spoil())
		w.start(owner)
		if wait := w.status(owner).GetStartupWait().AsDuration(); wait <= lease.MaxLease || wait > lease.MaxLease*5/4 {
			t.Errorf("journal %s: startup_wait %v, want nearly %v", what, wait, lease.MaxLease*5/4)
		}
		late, err := w.Run(t.Context(), lab.Workload{Name: what, Node: owner, Labels: map[string]string{"app": "client"}}, lab.RunOptions{NoWait: true})
		w.must(err)
		if e := w.endpoint(late); late.State != "quarantined" || e.GetState() != "quarantined" || !strings.Contains(late.Detail, "before the agent's start") {
			t.Errorf("journal %s: a newcomer is %s (%s), its endpoint %v", what, late.State, late.Detail, e)
		}
		if w.reach(late) == nil || w.echo.from(late) != 0 {
			t.Errorf("journal %s: a quarantined workload reaches the server", what)
		}
		if _, err := w.Delete(t.Context(), what); err != nil {
			t.Error(err)
		}
		if e := w.endpoint(w.client); e.GetState() != "active" {
			t.Errorf("journal %s: what was bound is %s (%s)", what, e.GetState(), e.GetDetail())
		}
		traffic.goesOn("traffic after a restart with the journal " + what)
	}
	traffic.lossless()
}

// A workload whose record is gone is nobody's: it is shut, until it is
// registered again.
func TestUnknownEndpointIsShut(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	w.must(w.reach(w.client))
	ifindex := w.endpoint(w.server).GetIfindex()
	w.kill(verifier)
	w.must(os.Remove(filepath.Join(w.JournalDir(verifier), "workloads", w.server.UID.String()+".json")))
	w.start(verifier)
	if e, err := w.view().Endpoint(ifindex); err != nil || e.State != uint32(abi.EPClosed) {
		t.Errorf("the kernel's endpoint is %+v, %v", e, err)
	}
	if e := w.endpoint(w.server); e != nil {
		t.Errorf("the agent speaks of %v", e)
	}
	heard := w.echo.from(w.client)
	if w.reach(w.client) == nil || w.echo.from(w.client) != heard {
		t.Error("a workload that nobody registered is reached")
	}
	r, err := w.Register(t.Context(), "server", lab.RunOptions{})
	if err != nil || r.State != "active" {
		t.Fatalf("registered again: %+v, %v", r, err)
	}
	w.must(w.reach(w.client))
	traffic.goesOn("the old connection")
}

// One agent works on a pin directory; a second one waits, and takes over.
func TestSecondAgentWaits(t *testing.T) {
	w := newWorld(t)
	traffic := w.live()
	s, err := w.Status(t.Context())
	w.must(err)
	first := w.status(verifier).GetStarted().AsTime()
	second := w.again(s.Nodes[1].PID)
	second.says("wait")
	if started := w.status(verifier).GetStarted().AsTime(); !started.Equal(first) {
		t.Errorf("the agent that answers was started at %v, the first at %v", started, first)
	}
	traffic.goesOn("traffic while a second agent waits")
	w.kill(verifier)
	w.eventually("the second agent takes over", func() error {
		c, err := w.Client(verifier)
		if err != nil {
			return err
		}
		st, err := c.Status(t.Context(), &api.StatusRequest{})
		if err == nil && (!st.GetHealthy() || !st.GetStarted().AsTime().After(first)) {
			err = fmt.Errorf("healthy %v, started %v", st.GetHealthy(), st.GetStarted().AsTime())
		}
		return err
	})
	w.must(w.reach(w.client))
	traffic.lossless()
	second.end()
}
