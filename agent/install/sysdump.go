package install

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"portcullis/observe/archive"
)

// SysdumpOptions say what of a cluster is gathered. All are required but Nodes.
type SysdumpOptions struct {
	Nodes       []string      // only these; none: all
	NodeTimeout time.Duration // for the archive of one node
	NodeLimit   int64         // bytes of it, before compression
	AtOnce      int           // nodes asked at a time
	LogBytes    int64         // of the end of each container's log
	Flows       int           // of each node
}

// Bounds of lists.
const (
	mostObjects = 20000
	mostEvents  = 5000
	logLines    = 50000
)

// Sysdump gathers what the API server shows of the installation, and from each
// node the archive that its agent's pod makes of it. Nodes that do not answer in
// their time are told, and not waited for. Secrets are never read.
func (c *Cluster) Sysdump(ctx context.Context, a *archive.Archive, o SysdumpOptions) error {
	nodes, err := c.nodes(ctx)
	if err != nil {
		return fmt.Errorf("ask the cluster %s: %w", c.Server(), err)
	}
	pods, err := c.pods(ctx)
	if err != nil {
		return fmt.Errorf("ask the cluster %s: %w", c.Server(), err)
	}
	for _, name := range o.Nodes {
		if !slices.ContainsFunc(nodes, func(n corev1.Node) bool { return n.Name == name }) {
			return fmt.Errorf("the cluster has no node %q (--nodes)", name)
		}
	}
	if err := a.Run(ctx, append(c.objectParts(), c.logParts(pods, o)...), 4); err != nil {
		return err
	}
	var parts []archive.Part
	for i := range nodes {
		n := &nodes[i]
		if len(o.Nodes) > 0 && !slices.Contains(o.Nodes, n.Name) {
			continue
		}
		parts = append(parts, archive.Part{Name: "nodes/" + n.Name, Timeout: o.NodeTimeout, Gather: func(ctx context.Context, out *archive.Files) error {
			return c.nodeArchive(ctx, n.Name, pods, o, out)
		}})
	}
	return a.Run(ctx, parts, o.AtOnce)
}

// objectParts are what the API server shows.
func (c *Cluster) objectParts() []archive.Part {
	part := func(name string, gather func(context.Context, *archive.Files) error) archive.Part {
		return archive.Part{Name: "cluster/" + name, Gather: gather}
	}
	out := []archive.Part{
		part("version", func(ctx context.Context, f *archive.Files) error {
			r, err := c.open(ctx, "/version", nil)
			if err != nil {
				return err
			}
			defer r.Close()
			b, err := io.ReadAll(io.LimitReader(r, maxExec))
			if err != nil {
				return err
			}
			return f.JSON("cluster/version.json", json.RawMessage(b))
		}),
		part("status", func(ctx context.Context, f *archive.Files) error {
			s, err := c.Status(ctx)
			return errors.Join(err, f.JSON("cluster/status.json", s))
		}),
		part("checks", func(ctx context.Context, f *archive.Files) error {
			checks, err := c.Checks(ctx)
			if err != nil {
				return err
			}
			return f.JSON("cluster/checks.json", checks)
		}),
		part("nodes", c.objects("nodes", at("", "v1", "nodes"), "", "")),
		part("namespaces", c.objects("namespaces", at("", "v1", "namespaces"), "", "")),
		part("pods", c.objects("pods", at("", "v1", "pods"), c.namespace, "")),
		part("all-pods", c.allPods),
		part("events", c.events),
		part("definitions", c.definitions),
	}
	for _, k := range kinds {
		if k.name == "Secret" || k.name == crdKind || k.name == "Namespace" {
			continue
		}
		name := k.resource.Resource
		if k.namespaced {
			out = append(out, part(name, c.objects(name, k.resource, c.namespace, "")))
		} else {
			out = append(out, part(name, c.objects(name, k.resource, "", partOf+"="+product)))
		}
	}
	return append(out, part("networkpolicies", c.objects("networkpolicies", at("networking.k8s.io", "v1", "networkpolicies"), "", "")))
}

// objects lists objects into one document; namespace "": of all.
func (c *Cluster) objects(name string, of schema.GroupVersionResource, namespace, selector string) func(context.Context, *archive.Files) error {
	return func(ctx context.Context, f *archive.Files) error {
		items := []map[string]any{} // none is a list too
		more := false
		err := each(ctx, c.dynamic.Resource(of).Namespace(namespace), metav1.ListOptions{LabelSelector: selector}, func(o *unstructured.Unstructured) bool {
			if more = len(items) == mostObjects; !more {
				o.SetManagedFields(nil)
				items = append(items, o.Object)
			}
			return !more
		})
		if more {
			f.Note("the first %d of them", mostObjects)
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", of.Resource, err)
		}
		return f.JSON("cluster/"+name+".json", items)
	}
}

// briefPod is what of every pod matters to policies.
type briefPod struct {
	Namespace   string            `json:"namespace"`
	Name        string            `json:"name"`
	UID         string            `json:"uid"`
	Node        string            `json:"node"`
	Phase       string            `json:"phase"`
	IPs         []string          `json:"ips"`
	HostNetwork bool              `json:"hostNetwork,omitempty"`
	Account     string            `json:"serviceAccount"`
	Labels      map[string]string `json:"labels"`
	Created     time.Time         `json:"created"`
	Deleted     *metav1.Time      `json:"deleted,omitempty"`
}

// allPods are the pods of all namespaces: a line for each, without what they
// run.
func (c *Cluster) allPods(ctx context.Context, f *archive.Files) error {
	return f.Write("cluster/all-pods.jsonl", func(w io.Writer) error {
		e := json.NewEncoder(w)
		n := 0
		var wrong error
		err := list(ctx, c.dynamic.Resource(at("", "v1", "pods")), "", func(p corev1.Pod) {
			if n++; n > mostObjects || wrong != nil {
				return
			}
			b := briefPod{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID), Node: p.Spec.NodeName, Phase: string(p.Status.Phase),
				HostNetwork: p.Spec.HostNetwork, Account: p.Spec.ServiceAccountName, Labels: p.Labels, Created: p.CreationTimestamp.Time, Deleted: p.DeletionTimestamp}
			for _, ip := range p.Status.PodIPs {
				b.IPs = append(b.IPs, ip.IP)
			}
			wrong = e.Encode(b)
		})
		return errors.Join(err, wrong)
	})
}

// events are those of the installation's namespace, and those that agents wrote
// elsewhere.
func (c *Cluster) events(ctx context.Context, f *archive.Files) error {
	kept := []map[string]any{}
	seen := 0
	err := each(ctx, c.dynamic.Resource(at("", "v1", "events")), metav1.ListOptions{}, func(o *unstructured.Unstructured) bool {
		by, _, _ := unstructured.NestedString(o.Object, "reportingComponent")
		source, _, _ := unstructured.NestedString(o.Object, "source", "component")
		if o.GetNamespace() == c.namespace || strings.Contains(by+source, product) {
			o.SetManagedFields(nil)
			kept = append(kept, o.Object)
		}
		seen++
		return len(kept) < mostEvents && seen < mostObjects
	})
	if err != nil {
		return fmt.Errorf("list events: %w", err)
	}
	return f.JSON("cluster/events.json", kept)
}

// definitions are those of Cilium's policies, without their schemas, and the
// policies themselves.
func (c *Cluster) definitions(ctx context.Context, f *archive.Files) error {
	names, err := definitions()
	if err != nil {
		return err
	}
	var errs []error
	found := []map[string]any{}
	for _, name := range names {
		o, err := c.get(ctx, kindNamed(crdKind), name)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if o == nil {
			f.Note("the cluster has no definition %s", name)
			continue
		}
		of := resourceOf(o)
		errs = append(errs, c.objects(of.Resource, of, "", "")(ctx, f))
		o.SetManagedFields(nil)
		versions, _, _ := unstructured.NestedSlice(o.Object, "spec", "versions")
		for _, v := range versions {
			if m, is := v.(map[string]any); is {
				delete(m, "schema")
			}
		}
		errs = append(errs, unstructured.SetNestedSlice(o.Object, versions, "spec", "versions"))
		found = append(found, o.Object)
	}
	return errors.Join(append(errs, f.JSON("cluster/definitions.json", found))...)
}

// logParts are the logs of the installation's pods, the present ones and those
// of the containers before them.
func (c *Cluster) logParts(pods []pod, o SysdumpOptions) (out []archive.Part) {
	for _, p := range pods {
		if len(o.Nodes) > 0 && p.component() == agentName && !slices.Contains(o.Nodes, p.Spec.NodeName) {
			continue
		}
		for _, s := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			whiches := []string{"current"}
			if s.RestartCount > 0 || s.LastTerminationState.Terminated != nil {
				whiches = append(whiches, "previous")
			}
			for _, which := range whiches {
				name := "logs/" + p.Name + "/" + s.Name + "-" + which
				out = append(out, archive.Part{Name: name, Gather: func(ctx context.Context, f *archive.Files) error {
					return c.log(ctx, f, name+".log", p.Name, s.Name, which == "previous", o.LogBytes)
				}})
			}
		}
	}
	return out
}

// log is the end of a container's log.
func (c *Cluster) log(ctx context.Context, f *archive.Files, name, pod, container string, previous bool, most int64) error {
	r, err := c.open(ctx, "/api/v1/namespaces/"+c.namespace+"/pods/"+pod+"/log", url.Values{
		"container": {container}, "previous": {strconv.FormatBool(previous)}, "timestamps": {"true"}, "tailLines": {strconv.Itoa(logLines)}})
	if err != nil {
		return err
	}
	defer r.Close()
	// The API's limit counts from the first of these lines; ours from the last.
	end, err := archive.End(r, most)
	if err != nil {
		return err
	}
	return f.Copy(name, bytes.NewReader(end))
}

// open asks the API server for what client-go has no type for.
func (c *Cluster) open(ctx context.Context, path string, query url.Values) (io.ReadCloser, error) {
	u := c.url(path)
	u.RawQuery = query.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.ask(req, http.StatusOK)
	if err != nil {
		return nil, err
	}
	return resp.Body, nil
}

// nodeArchive has the agent's pod of a node gather there, and takes what it
// sends. One of a version that cannot is asked for its status.
func (c *Cluster) nodeArchive(ctx context.Context, node string, pods []pod, o SysdumpOptions, out *archive.Files) error {
	i := slices.IndexFunc(pods, func(p pod) bool {
		return p.component() == agentName && p.Spec.NodeName == node && p.DeletionTimestamp == nil
	})
	switch {
	case i < 0:
		return archive.NotHere("no agent runs on this node: run `portcullis sysdump` there")
	case !pods[i].running():
		return fmt.Errorf("the agent's pod %s %s: run `portcullis sysdump` on the node", pods[i].Name, pods[i].trouble())
	}
	// There it ends before it is given up here, so that it says what it has.
	within := o.NodeTimeout - o.NodeTimeout/8
	dir := "nodes/" + node
	s, err := c.stream(ctx, o.NodeLimit+maxExec, pods[i].Name, "agent", "/portcullis", "sysdump", "--output-file", "-", "--timeout", within.String(),
		"--size-limit", strconv.FormatInt(o.NodeLimit, 10), "--log-size", strconv.FormatInt(o.LogBytes, 10), "--flows", strconv.Itoa(o.Flows))
	if err == nil {
		defer s.Close()
		if _, err = out.Include(ctx, dir, s); err == nil {
			return nil
		}
	}
	if ctx.Err() == nil {
		b, asked := c.run(ctx, pods[i].Name, "agent", "/portcullis", "status", "-o", "json")
		if json.Valid(b) {
			asked = out.JSON(dir+"/agent/status.json", json.RawMessage(b))
		}
		if asked != nil {
			out.Note("nor does it tell its status: %v", asked)
		}
	}
	return fmt.Errorf("the agent's pod %s does not gather: %w", pods[i].Name, err)
}
