package install

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// FieldManager is the name under which objects are applied.
const FieldManager = "portcullis"

// poll is how often it is looked whether what is waited for has come.
const poll = time.Second

// page is the number of objects that are listed at a time.
const page = 500

// Access says how to reach a cluster, as kubectl's flags do.
type Access struct {
	Kubeconfig string // "": $KUBECONFIG, then ~/.kube/config, then as a pod of the cluster
	Context    string // "": the current one
	UserAgent  string
}

// Cluster is a connection to an API server, as whoever the kubeconfig names.
// Safe for concurrent use.
type Cluster struct {
	dynamic   dynamic.Interface
	exec      *http.Client // speaks HTTP/1.1, which can be upgraded
	config    *rest.Config
	every     time.Duration // between two looks at what is waited for
	answer    time.Duration // longest time for one question to an agent
	namespace string
}

// Connect prepares a connection; nothing is asked yet. namespace is that of
// the installation.
func Connect(a Access, namespace string) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = a.Kubeconfig
	rc, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: a.Context}).ClientConfig()
	if err != nil {
		if clientcmd.IsEmptyConfig(err) {
			err = errors.New("there is no kubeconfig: name one by --kubeconfig or $KUBECONFIG")
		}
		return nil, fmt.Errorf("how to reach the cluster: %w", err)
	}
	rc.UserAgent = a.UserAgent
	rc.QPS = -1 // one person's requests, nearly all one after another: the server's own limits will do
	rc.WarningHandler = rest.NoWarnings{}
	c := &Cluster{config: rc, every: poll, answer: askTimeout, namespace: namespace}
	if c.dynamic, err = dynamic.NewForConfig(rc); err != nil {
		return nil, fmt.Errorf("how to reach the cluster: %w", err)
	}
	plain := rest.CopyConfig(rc)
	plain.NextProtos = []string{"http/1.1"}
	if c.exec, err = rest.HTTPClientFor(plain); err != nil {
		return nil, fmt.Errorf("how to reach the cluster: %w", err)
	}
	return c, nil
}

// Server is the URL of the API server.
func (c *Cluster) Server() string { return c.config.Host }

// in is where objects of a kind are: in the namespace, if they are in one.
func (c *Cluster) in(k kind) dynamic.ResourceInterface {
	if k.namespaced {
		return c.dynamic.Resource(k.resource).Namespace(c.namespace)
	}
	return c.dynamic.Resource(k.resource)
}

// get returns an object, nil if there is none.
func (c *Cluster) get(ctx context.Context, k kind, name string) (*unstructured.Unstructured, error) {
	o, err := c.in(k).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read %s %s: %w", k.name, name, err)
	}
	return o, nil
}

// each calls f for every object of a list, until it returns false.
func each(ctx context.Context, from dynamic.ResourceInterface, o metav1.ListOptions, f func(*unstructured.Unstructured) bool) error {
	o.Limit = page
	for {
		list, err := from.List(ctx, o)
		if err != nil {
			return err
		}
		for i := range list.Items {
			if !f(&list.Items[i]) {
				return nil
			}
		}
		if o.Continue = list.GetContinue(); o.Continue == "" {
			return nil
		}
	}
}

// list returns all objects of a kind, in the namespace if they are in one.
func (c *Cluster) list(ctx context.Context, k kind, selector string) (out []*unstructured.Unstructured, err error) {
	err = each(ctx, c.in(k), metav1.ListOptions{LabelSelector: selector}, func(o *unstructured.Unstructured) bool {
		out = append(out, o)
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", k.resource.Resource, err)
	}
	return out, nil
}

// apply makes an object as it is given, and reports what came of it: created,
// configured or unchanged. Fields that others own and that are not given stay.
func (c *Cluster) apply(ctx context.Context, o *unstructured.Unstructured) (result string, err error) {
	k, ok := kindOf(o)
	if !ok {
		return "", fmt.Errorf("%s %s: a kind that the installer does not know", o.GetKind(), o.GetName())
	}
	before, err := c.get(ctx, k, o.GetName())
	if err != nil {
		return "", err
	}
	after, err := c.put(ctx, k, o)
	if err != nil {
		return "", err
	}
	switch {
	case before == nil:
		return "created", nil
	case before.GetResourceVersion() == after.GetResourceVersion():
		return "unchanged", nil
	}
	return "configured", nil
}

// put is the request that makes an object; with "All", as dryRun, it only tells what would
// come of it.
func (c *Cluster) put(ctx context.Context, k kind, o *unstructured.Unstructured, dryRun ...string) (*unstructured.Unstructured, error) {
	after, err := c.in(k).Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: FieldManager, Force: true, DryRun: dryRun})
	if err != nil {
		return nil, fmt.Errorf("apply %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	return after, nil
}

// remove asks for the end of an object and reports whether there was one. It
// does not wait; what it owns goes first.
func (c *Cluster) remove(ctx context.Context, k kind, name string) (was bool, err error) {
	foreground := metav1.DeletePropagationForeground
	err = c.in(k).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &foreground})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("remove %s %s: %w", k.name, name, err)
	}
	return true, nil
}

// awaitGone waits until an object that is being removed is gone.
func (c *Cluster) awaitGone(ctx context.Context, k kind, was *unstructured.Unstructured) error {
	what := k.name + " " + was.GetName()
	return c.until(ctx, what+" to end", func() (bool, string, error) {
		o, err := c.get(ctx, k, was.GetName())
		if err != nil {
			return false, "", err
		}
		missing := "it is being removed"
		if o != nil && len(o.GetFinalizers()) > 0 {
			missing += "; it has the finalizers " + strings.Join(o.GetFinalizers(), ", ")
		}
		return o == nil || o.GetUID() != was.GetUID(), missing, nil
	})
}

// until asks again and again until done, an error that asking again does not
// mend, or the end of ctx; then the error says what was waited for.
func (c *Cluster) until(ctx context.Context, what string, f func() (done bool, missing string, err error)) error {
	for missing := ""; ; {
		done, now, err := f()
		switch {
		case done:
			return nil
		case err != nil && ctx.Err() == nil && !passing(err):
			return err
		case err != nil && ctx.Err() == nil:
			missing = err.Error()
		case err == nil:
			missing = now
		}
		timer := time.NewTimer(c.every)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			if missing != "" {
				missing = ": " + missing
			}
			return fmt.Errorf("waiting for %s %s%s%s", what, ending(ctx), missing, goesOn)
		}
	}
}

// goesOn ends an error of what was stopped.
const goesOn = ": the same command goes on from here"

// ending says how a context ended.
func ending(ctx context.Context) string {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return "took longer than --timeout"
	}
	return "was stopped"
}

// stopped says of an error that came of the end of the context, wherever that
// was, what to do.
func stopped(ctx context.Context, err error) error {
	if err == nil || ctx.Err() == nil || strings.Contains(err.Error(), goesOn) {
		return err
	}
	return fmt.Errorf("it %s%s (%w)", ending(ctx), goesOn, err)
}

// passing reports whether an error may be another one soon: an API server that
// is being replaced, a webhook that is not up.
func passing(err error) bool {
	var s apierrors.APIStatus
	if !errors.As(err, &s) {
		return true // it did not answer
	}
	return apierrors.IsInternalError(err) || apierrors.IsServerTimeout(err) || apierrors.IsServiceUnavailable(err) ||
		apierrors.IsTooManyRequests(err) || apierrors.IsTimeout(err)
}
