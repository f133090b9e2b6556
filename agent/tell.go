package agent

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"portcullis/agent/kube"
	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// teller takes what the cluster's people are told of pods, policies and this node;
// *kube.Events is one. Put is safe for concurrent use and does not block.
type teller interface {
	Put(kube.Event)
	// Now returns when it is written, or ctx ends.
	Now(context.Context, kube.Event) error
	Counts() kube.EventCounts
}

// telling makes Events of Kubernetes of what happens here. They are for people:
// nothing that judges waits for them or asks them.
type telling struct {
	to teller // nil: nobody is told

	mu   sync.Mutex
	pods map[uint32]kube.About // by endpoint; guarded by mu

	quarantined map[uint32]bool      // endpoints whose wait was told; owned by the loop
	standing    map[string]toldState // conditions that were told; owned by the loop
}

type toldState struct {
	text string
	at   time.Time
}

const (
	// tellQuarantine: what is shorter nobody asks about, and each pod that takes
	// over an address has one.
	tellQuarantine = 3 * time.Second
	// tellAgain: a condition that stands is told again, for the cluster forgets its
	// Events (after an hour, as a rule).
	tellAgain = 30 * time.Minute
	// tellEnd is how long an agent that cannot go on takes to say so.
	tellEnd = 3 * time.Second
)

// tellAlarms are the alarms with which this node does not enforce all that it
// should, or shuts what it should not.
var tellAlarms = map[string]bool{"policy-not-applied": true, "policy-failed": true, "policies-lost": true, "map-full": true, "relabel-failed": true,
	"attach": true, "journal": true, "proxy": true, "svid": true, "services": true, "uplink": true, "ranges": true, "conflict": true,
	"pods-unenforced": true, "cni-plugin": true, "snapshot": true}

func newTelling(to teller) *telling {
	return &telling{to: to, pods: map[uint32]kube.About{}, quarantined: map[uint32]bool{}, standing: map[string]toldState{}}
}

func aboutPod(p *kube.Pod) kube.About {
	uid := p.UID.String()
	if p.Static != (identity.UID{}) { // kubectl looks for a static pod's events by that one
		uid = strings.ReplaceAll(p.Static.String(), "-", "")
	}
	return kube.About{APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: uid}
}

func aboutNode(p *kube.Picture, name identity.NodeName) kube.About {
	n, _ := p.Node(name)
	return kube.About{APIVersion: "v1", Kind: "Node", Name: string(name), UID: n.UID}
}

// know notes whose pod an endpoint is: what no pod of the cluster is behind is
// told of to nobody there.
func (t *telling) know(endpoint uint32, p *kube.Pod) {
	if t == nil || t.to == nil {
		return
	}
	about := aboutPod(p)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pods[endpoint] = about
}

func (t *telling) forget(endpoint uint32) {
	if t == nil {
		return
	}
	delete(t.quarantined, endpoint)
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.pods, endpoint)
}

func (t *telling) pod(endpoint uint32) (kube.About, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	about, ok := t.pods[endpoint]
	return about, ok
}

// ---- drops ---------------------------------------------------------------

// hear tells of a packet that was dropped. It is called for every record, beside
// the loop.
func (t *telling) hear(r *flow.Record) {
	if t == nil || t.to == nil || r.Verdict != abi.VerdictDrop || r.L7 != nil {
		return // who is refused inside a protocol is answered there
	}
	if ip := r.Peer().IP; r.Reason == abi.ReasonQuarantined || ip.IsMulticast() || ip.Is6() && ip.IsLinkLocalUnicast() {
		return // told as such; and what every pod sends to nobody, as neighbour and router discovery
	}
	if about, ok := t.pod(r.Endpoint); ok {
		t.to.Put(dropEvent(about, r))
	}
}

func dropEvent(about kube.About, r *flow.Record) kube.Event {
	peer, way, port := r.Peer(), "to", r.Dest.Port
	if r.Direction == abi.DirIngress {
		way = "from"
	}
	who := peer.IP.String()
	switch { // names of workloads are their own node's: of others the identity is known
	case peer.Workload != "":
		who = peer.Workload + " (" + who + ")"
	case peer.Text != "" && peer.Identity != identity.NumUnknown:
		who = strings.TrimPrefix(peer.Text, "reserved:") + " (" + who + ")"
	}
	what := protocolName(r.Protocol)
	if r.Protocol == unix.IPPROTO_TCP || r.Protocol == unix.IPPROTO_UDP || r.Protocol == unix.IPPROTO_SCTP {
		what += " port " + strconv.Itoa(int(port))
	}
	reason := r.Reason.String()
	return kube.Event{About: about, Warning: true, Reason: "PacketsDropped", Action: "Drop",
		Key:    strings.Join([]string{reason, way, who, what}, " "),
		Note:   fmt.Sprintf("%s: packets %s %s, %s", reason, way, who, what),
		Others: "packets with further peers, ports or reasons: portcullis observe shows them"}
}

func protocolName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "TCP"
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return "ICMP"
	}
	return "protocol " + strconv.Itoa(int(p))
}

// ---- quarantine and registrations ------------------------------------------

// tellQuarantines tells of pods that wait for their address, and of the end of
// such a wait.
func (l *loop) tellQuarantines() {
	if l.telling == nil || l.telling.to == nil {
		return
	}
	for _, e := range l.endpoints {
		about, ok := l.telling.pod(e.id)
		waits := e.state == abi.EPQuarantined
		if !ok || waits == l.telling.quarantined[e.id] || waits && time.Since(e.created) < tellQuarantine {
			continue
		}
		if !waits {
			delete(l.telling.quarantined, e.id)
			l.telling.to.Put(kube.Event{About: about, Reason: "QuarantineEnded", Action: "Activate", Note: "it has its address: nothing holds a lease on who had it before"})
			continue
		}
		l.telling.quarantined[e.id] = true
		note := "its packets are dropped until its address is free"
		if detail := l.endpointDetail(e); detail != "" {
			note += ": " + detail
		}
		l.telling.to.Put(kube.Event{About: about, Warning: e.detail != "", Reason: "Quarantined", Action: "Quarantine", Note: note})
	}
}

// tellRefused tells of a registration that was refused, if the cluster has told of
// such a pod. Beside it the kubelet tells what the CNI plugin said.
func (l *loop) tellRefused(uid identity.UID, err error) {
	if l.telling == nil || l.telling.to == nil || l.cluster == nil || err == nil {
		return
	}
	switch status.Code(err) { // nobody has refused anything
	case codes.Canceled, codes.DeadlineExceeded, codes.Unavailable:
		return
	}
	p, _ := l.cluster.Next()
	if pod := p.Pods[uid]; pod != nil {
		l.telling.to.Put(kube.Event{About: aboutPod(pod), Warning: true, Reason: "RegistrationRefused", Action: "Register", Key: status.Convert(err).Message(),
			Note: status.Convert(err).Message(), Others: "further registrations were refused: the agent's log has them"})
	}
}

// ---- policies and the node ---------------------------------------------------

// tellStanding tells of conditions that stand: policies that are refused, and what
// this node cannot enforce.
func (l *loop) tellStanding(now time.Time) {
	p := l.known.picture
	if l.telling == nil || l.telling.to == nil || p == nil {
		return
	}
	there := map[string]bool{}
	say := func(name, text string, ev kube.Event) {
		there[name] = true
		if told, ok := l.telling.standing[name]; ok && told.text == text && now.Sub(told.at) < tellAgain {
			return
		}
		l.telling.standing[name] = toldState{text, now}
		l.telling.to.Put(ev)
	}
	for _, r := range p.Refused {
		if r.UID != "" { // else no such object can be named
			say(r.Ref.String(), r.UID+r.Why, refusedEvent(r))
		}
	}
	for _, a := range l.alarms.list() {
		if tellAlarms[a.name] {
			say(a.name, "", nodeEvent(aboutNode(p, l.cfg.Node), a.name+": "+a.text, a.name))
		}
	}
	for name := range l.telling.standing {
		if !there[name] {
			delete(l.telling.standing, name)
		}
	}
}

// refusedEvent is told on the policy: whom one that cannot be read selects nobody
// knows, and who wrote it looks there. All agents refuse it alike, so it is one.
func refusedEvent(r kube.Refused) kube.Event {
	note := "not in force: " + r.Why
	if r.Kept {
		note = "its former version is in force: " + r.Why
	}
	return kube.Event{About: kube.About{APIVersion: r.APIVersion, Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, UID: r.UID},
		Warning: true, Reason: "PolicyRefused", Action: "Read", Key: r.Why, Note: note, Shared: true}
}

func nodeEvent(about kube.About, note, key string) kube.Event {
	return kube.Event{About: about, Warning: true, Reason: "EnforcementImpaired", Action: "Enforce", Key: key, Note: note, Others: "there are further alarms: portcullis status shows them"}
}

// tellEnded says that this agent ends and why, before it does: its programs go on
// with what they know, and nobody here would be left to say so.
func tellEnded(to teller, p *kube.Picture, node identity.NodeName, why error) error {
	if to == nil || why == nil || errors.Is(why, context.Canceled) {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), tellEnd)
	defer cancel()
	return to.Now(ctx, kube.Event{About: aboutNode(p, node), Warning: true, Reason: "AgentFailed", Action: "End", Shared: true, // by every start that fails alike
		Note: "the agent ended; programs of before go on with what they know: " + why.Error()})
}
