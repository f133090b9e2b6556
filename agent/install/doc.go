// Package install brings Portcullis into a Kubernetes cluster, removes it, and
// tells how it fares there. It is the operator's side, run from where kubectl
// runs; agents know nothing of it.
//
//	values ──> Render ──> objects ──> Install      (server-side apply, in order)
//	  │          │                    Uninstall    (agents, nodes, objects)
//	  │          └ the chart in       ClusterStatus (pods, and each agent asked)
//	  │            deploy/helm        Checks       (before anything is changed)
//	  │                               Sysdump      (objects, logs, each node's archive)
//	  └ Values, the source of values.yaml, its schema and docs/values.md
//
// The chart is rendered by text/template with the few functions that its
// templates use, to what Helm makes of it. Rendering is pure.
//
// With agent/kube it is the only package that imports client-go; beside it,
// agent/api for the status of an agent, datapath/doctor for the form of checks,
// observe/archive and deploy/helm. What talks to a cluster runs in the caller's goroutine, ends
// with its context, and can be run again after it was stopped anywhere: every
// step looks first at what is there. ClusterStatus asks several agents at once
// and waits for all of them.
package install
