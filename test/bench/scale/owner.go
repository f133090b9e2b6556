package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"portcullis/identity"
	"portcullis/identity/labca"
	"portcullis/identity/svid"
	"portcullis/ipcache/lease"
	"portcullis/ipcache/session"
)

const (
	trustDomain = "lab"
	agentNode   = identity.NodeName("verifier")
	// identities is how many the remote workloads have between them.
	identities = 100
	// group is how many addresses one workload of an owner has: the owner
	// machine is not what is measured, and looks at every workload that waits.
	group = 64
)

func ownerNode(i int) identity.NodeName { return identity.NodeName(fmt.Sprintf("o%d", i+1)) }

// owner is a node that holds many addresses. Its machine is touched by the
// goroutine of run alone.
type owner struct {
	machine   *lease.Owner
	transport *session.Transport
	inbox     chan lease.OwnerInput
	done      <-chan struct{}
	timer     *time.Timer
	failed    chan error
}

// Owner implements session.Sink.
func (o *owner) Owner(in lease.OwnerInput) {
	select {
	case o.inbox <- in:
	case <-o.done:
	}
}

// Verifier implements session.Sink: these owners ask nobody.
func (o *owner) Verifier(lease.VerifierInput) {}

// now is CLOCK_BOOTTIME.
func now() lease.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // a clock that every kernel has
	}
	return lease.Time(ts.Nano())
}

// startOwner runs owner i of so many, which holds these addresses, until ctx ends.
func startOwner(ctx context.Context, running *sync.WaitGroup, dir string, i, owners int, ips []netip.Addr) (*owner, error) {
	td := spiffeid.RequireTrustDomainFromString(trustDomain)
	name := ownerNode(i)
	source, err := startSource(ctx, running, dir, td, name)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	boot, err := identity.ParseBootID(string(text))
	if err != nil {
		return nil, err
	}
	o := &owner{inbox: make(chan lease.OwnerInput, 256), done: ctx.Done(), timer: time.NewTimer(time.Hour), failed: make(chan error, 2)}
	o.machine, err = lease.NewOwner(lease.OwnerConfig{Node: name, Boot: boot, ReuseMargin: time.Millisecond, Grants: 8 * perOwner(owners), MaxWorkloads: perOwner(owners),
		ConfirmRate: 1 << 20, ConfirmBurst: 1 << 20, Journal: lease.JournalMissing, FreshRanges: true,
		Nonce: func() (n lease.Nonce) { rand.Read(n[:]); return n }, Mine: ownerRange(i, owners).Contains}, now())
	if err != nil {
		return nil, err
	}
	o.transport, err = session.New(session.Config{Node: name, TrustDomain: td, Listen: netip.AddrPortFrom(ownerIP(i), agentPort).String(), Source: source,
		Peer: func(identity.NodeName) (string, bool) { return "", false }, Known: func(n identity.NodeName) bool { return n == agentNode }, Sink: o})
	if err != nil {
		return nil, err
	}
	for first := 0; first < len(ips); first += group {
		last := min(first+group, len(ips))
		account := fmt.Sprintf("client-%d", (first/group)%identities)
		o.step(lease.Add{UID: identity.NewUID(), IPs: ips[first:last],
			Identity: identity.New(trustDomain, "default", account, map[string]string{"app": "client"})})
	}
	o.step(lease.OwnerTick{})
	running.Go(func() { o.run(ctx) })
	running.Go(func() {
		if err := o.transport.Run(ctx); err != nil {
			o.failed <- err
		}
	})
	select {
	case <-o.transport.Listening():
	case err := <-o.failed:
		return nil, err
	}
	return o, nil
}

func startSource(ctx context.Context, running *sync.WaitGroup, dir string, td spiffeid.TrustDomain, name identity.NodeName) (*svid.Source, error) {
	id, err := session.AgentID(td, name)
	if err != nil {
		return nil, err
	}
	from, err := svid.WorkloadAPI(labca.Address(dir, name))
	if err != nil {
		return nil, err
	}
	s, err := svid.New(svid.Config{From: from, ID: id})
	if err != nil {
		return nil, err
	}
	running.Go(func() { s.Run(ctx) }) // its errors are told by Wait
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return s, s.Wait(wait)
}

func (o *owner) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case in := <-o.inbox:
			o.step(in)
		case <-o.timer.C:
			o.step(lease.OwnerTick{})
		}
	}
}

// step carries out what the machine wants. There is no journal: this owner
// does not come back.
func (o *owner) step(in lease.OwnerInput) {
	for _, out := range o.machine.Step(now(), in) {
		switch out := out.(type) {
		case lease.SendToVerifier:
			o.transport.SendToVerifier(out.Stream, out.Message)
		case lease.CloseVerifier:
			fmt.Fprintf(os.Stderr, "scale: an owner closes a session: %s\n", out.Why)
			o.transport.Close(out.Stream, out.Why)
		case lease.OwnerTimer:
			o.timer.Reset(max(0, out.At.Sub(now())))
		case lease.Rejected:
			o.failed <- fmt.Errorf("an owner rejects a workload: %s", out.Why)
		}
	}
}
