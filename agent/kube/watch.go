package kube

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	utilwait "k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	// watchTime is the least time that one watch lasts, the longest is twice
	// that; a connection that is dead is found out sooner, by HTTP/2 pings.
	watchTime = 20 * time.Minute
	// absentAnswers in a row that there is no such resource are taken for what
	// they say: that no object of it is left.
	absentAnswers = 2
)

// watch keeps one resource until ctx ends.
func (s *Source) watch(ctx context.Context, r resource) {
	// What client-go has to say is said here, once and in our words.
	ctx = klog.NewContext(ctx, klog.New(nil))
	for ctx.Err() == nil {
		running, gone := context.WithCancel(ctx)
		s.reflect(running, r, gone)
		gone()
		if ctx.Err() == nil {
			s.awaitResource(ctx, r)
		}
	}
}

// reflect runs until ctx ends, or until the API server says that there is no
// such resource, when gone is called.
func (s *Source) reflect(ctx context.Context, r resource, gone func()) {
	lw := s.listWatch(r)
	failed := func(ctx context.Context, err error) {
		if ctx.Err() != nil {
			return // it was told to end
		}
		s.failed(r, err)
		if r.added && apierrors.IsNotFound(err) {
			gone()
		}
	}
	watched := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			if o.ResourceVersion == "0" {
				// "Any", which may be older than the snapshot: a policy that
				// is in that, and not in a stale cache, must not go. The latest.
				o.ResourceVersion = ""
			}
			list, err := lw.ListWithContextFunc(ctx, o)
			if err != nil {
				failed(ctx, err)
			}
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := lw.WatchFuncWithContext(ctx, o)
			if err != nil {
				failed(ctx, err)
			} else {
				s.heard(r)
			}
			return w, err
		},
	}
	var example any
	switch r.name() {
	case "nodes":
		example = &corev1.Node{}
	case "pods":
		example = &corev1.Pod{}
	case "namespaces":
		example = &corev1.Namespace{}
	default:
		u := &unstructured.Unstructured{}
		u.SetGroupVersionKind(r.at.GroupVersion().WithKind(r.kind))
		example = u
	}
	quiet, least := klog.New(nil), watchTime
	if s.cfg.Prove && r.name() == "pods" {
		least = podWatchTime
	}
	cache.NewReflectorWithOptions(watched, example, &store{s, r}, cache.ReflectorOptions{Name: r.name(), Logger: &quiet, MinWatchTimeout: least,
		Backoff: &utilwait.Backoff{Duration: 500 * time.Millisecond, Factor: 2, Jitter: 1, Steps: 6, Cap: 15 * time.Second}}).RunWithContext(ctx)
}

func (s *Source) listWatch(r resource) *cache.ListWatch {
	if r.kind == "" {
		return cache.NewFilteredListWatchFromClient(s.core, r.name(), metav1.NamespaceAll, func(o *metav1.ListOptions) { o.FieldSelector = r.only })
	}
	client := s.dynamic.Resource(r.at)
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = r.has
			return client.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = r.has
			return client.Watch(ctx, o)
		},
	}
}

// awaitResource returns when the API server has a resource that it did not have.
// What was known of its objects stays until it has said so more than once: a
// policy that is forgotten by mistake opens what it shuts.
func (s *Source) awaitResource(ctx context.Context, r resource) {
	for {
		there, err := s.discover(ctx, r)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			s.failed(r, err)
		case there:
			s.absent(r, false)
			return
		default:
			s.absent(r, true)
		}
		// Not all agents of a cluster at once.
		if wait(ctx, s.discoverEvery/2+rand.N(s.discoverEvery)) != nil {
			return
		}
	}
}

// discovered is what the API server said of a group.
type discovered struct {
	list *metav1.APIResourceList
	at   time.Time
}

// discover asks whether the API server has the resource. An answer is good for
// all resources of its group that ask shortly after.
func (s *Source) discover(ctx context.Context, r resource) (bool, error) {
	s.discovery.Lock()
	defer s.discovery.Unlock()
	said, asked := s.discovered[r.at.GroupVersion()]
	if !asked || time.Since(said.at) > s.discoverEvery/4 {
		list, err := s.resourcesOf(ctx, r)
		if err != nil {
			return false, err
		}
		said = discovered{list, time.Now()}
		s.discovered[r.at.GroupVersion()] = said
	}
	for _, have := range said.list.APIResources {
		if have.Name == r.name() {
			return true, nil
		}
	}
	return false, nil
}

// resourcesOf returns the resources of r's group: none if there is no such group.
func (s *Source) resourcesOf(ctx context.Context, r resource) (*metav1.APIResourceList, error) {
	var list metav1.APIResourceList
	err := s.core.Get().AbsPath("/apis", r.at.Group, r.at.Version).SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Into(&list)
	if err != nil && !apierrors.IsNotFound(err) {
		return nil, err
	}
	return &list, nil
}

// absent notes an answer about a resource that may be missing.
func (s *Source) absent(r resource, missing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.watches[r.name()]
	was, listed := w.missing, w.listed
	w.missing = missing
	if !missing {
		w.absent = 0
		s.log.Info("the API server has this resource now", zap.String("resource", r.name()))
		return
	}
	w.heard, w.err = time.Now(), ""
	w.absent++
	n, _ := s.tables.count(r)
	if !was {
		s.log.Info("the API server does not have this resource; it is looked for again", zap.String("resource", r.name()), zap.Int("objects known", n))
	}
	if n == 0 || w.absent >= absentAnswers {
		w.listed = true
		if s.tables.replace(r, nil) || !listed {
			s.touch()
		}
	}
}

// heard notes that the API server speaks of a resource.
func (s *Source) heard(r resource) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hear(r)
}

// hear is heard, with mu held.
func (s *Source) hear(r resource) *watchState {
	w := s.watches[r.name()]
	if w.err != "" {
		s.log.Info("watching again", zap.String("resource", r.name()))
	}
	w.heard, w.err, w.missing, w.absent = time.Now(), "", false, 0
	return w
}

// failed notes why there is no watch. It is logged when it begins.
func (s *Source) failed(r resource, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.watches[r.name()]
	if w.err == "" && !(r.added && apierrors.IsNotFound(err)) {
		s.log.Warn("cannot watch, tried again; the last known stays", zap.String("resource", r.name()), zap.Error(err))
	}
	w.err = short(err)
}

// short leaves out the request, which is as long as it is known.
func short(err error) string {
	var request *url.Error
	if errors.As(err, &request) {
		return request.Err.Error()
	}
	return err.Error()
}

// store is where a reflector puts what it is told of one resource.
type store struct {
	s *Source
	r resource
}

var (
	_ cache.ReflectorStore         = (*store)(nil)
	_ cache.ReflectorBookmarkStore = (*store)(nil)
)

func (t *store) take(version string, change func(*tables) bool) {
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	w := t.s.hear(t.r)
	changed := change(t.s.tables)
	if changed && w.listed {
		t.s.changedRefusals()
	}
	if proved := t.s.progressed(t.r, version, false); (changed || proved) && w.listed {
		t.s.touch()
	}
}

// Add implements cache.ReflectorStore.
func (t *store) Add(obj any) error {
	c, err := convert(t.r, obj)
	if err != nil {
		return err
	}
	m, err := meta.Accessor(obj)
	if err != nil {
		return err
	}
	t.take(m.GetResourceVersion(), func(x *tables) bool { return x.put(t.r, c) })
	return nil
}

// Update implements cache.ReflectorStore.
func (t *store) Update(obj any) error { return t.Add(obj) }

// Delete implements cache.ReflectorStore.
func (t *store) Delete(obj any) error {
	m, err := meta.Accessor(obj)
	if err != nil {
		return fmt.Errorf("%s: a deletion without an object: %w", t.r.name(), err)
	}
	t.take(m.GetResourceVersion(), func(x *tables) bool { return x.drop(t.r, m.GetNamespace()+"/"+m.GetName()) })
	return nil
}

// Replace implements cache.ReflectorStore: it takes up a list.
func (t *store) Replace(objs []any, version string) error {
	all := make([]converted, 0, len(objs))
	for _, obj := range objs {
		c, err := convert(t.r, obj)
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	s := t.s
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.hear(t.r)
	if t.r.name() == "namespaces" {
		s.identify(all)
	}
	changed := s.tables.replace(t.r, all)
	proved := s.progressed(t.r, version, true)
	if !w.listed {
		w.listed, changed = true, true
		if s.listed() {
			s.log.Info("everything is listed", zap.String("server", s.server))
		}
	}
	if changed {
		s.changedRefusals()
	}
	if changed || proved {
		s.touch()
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (t *store) Resync() error { return nil }

// Bookmark implements cache.ReflectorBookmarkStore.
func (t *store) Bookmark(version string) error {
	t.take(version, func(*tables) bool { return false })
	return nil
}

// identify looks, with mu held, whether this is the cluster that the snapshot
// is of. Of another one's nothing counts, nor what was remembered of its nodes.
func (s *Source) identify(namespaces []converted) {
	for _, c := range namespaces {
		if c.key != "/"+metav1.NamespaceSystem || c.object == nil {
			continue
		}
		uid := c.object.Namespace.UID
		if s.cluster != "" && s.cluster != uid {
			s.other = true
			s.log.Error("the snapshot was of another cluster: what it said is forgotten", zap.String("its kube-system", s.cluster), zap.String("this one's", uid))
			s.snapshot = "of another cluster: forgotten"
			s.forget()
		}
		s.cluster = uid
	}
}

// forget drops, with mu held, everything that is of the snapshot still.
func (s *Source) forget() {
	s.former = nil
	fresh := newTables(s.cfg.Node)
	for _, r := range resources("") {
		if !s.watches[r.name()].listed {
			continue
		}
		switch r.name() {
		case "nodes":
			fresh.nodes = s.tables.nodes
		case "pods":
			fresh.pods = s.tables.pods
		default:
			fresh.objects[r.name()] = s.tables.objects[r.name()]
		}
	}
	fresh.refused = s.tables.refused
	s.tables = fresh
}

// changedRefusals logs, with mu held, what is refused now and was not before.
func (s *Source) changedRefusals() {
	now := s.tables.refusals()
	for _, r := range now {
		if !slices.Contains(s.shown, r) {
			s.log.Error("an object is refused and not in force", zap.Stringer("object", r.Ref), zap.Bool("earlier version in force", r.Kept), zap.String("why", r.Why))
		}
	}
	s.shown = now
}
