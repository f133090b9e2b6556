// Package cni is the chained CNI plugin: it tells the agent of this node of
// the workloads that a container runtime makes and removes. The plugins before
// it in the chain make the devices and give the IPs; this one lets no workload
// start before its programs and its endpoint stand, and changes no result.
//
//	ADD     register, wait a little for the end of quarantine
//	DEL     deregister; while no agent runs, close the gate in the pinned maps
//	CHECK   does all that ADD made still stand?
//	GC      end the endpoints of attachments that the runtime does not know
//	STATUS  can the agent serve an ADD now?
//
// A process serves one command and ends; nothing runs concurrently in it, but
// the runtime starts many at a time. It may import agent/api, datapath,
// identity, the CNI library and netlink, but not agent.
package cni
