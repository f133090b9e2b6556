package kube

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
)

// Reporter is the controller that events name.
const Reporter = "portcullis.io/agent"

// What the API server takes (events.k8s.io/v1).
const (
	maxNote     = 1024
	maxInstance = 128
	maxName     = 253
)

// writeTimeout is how long one write may take.
const writeTimeout = 10 * time.Second

// eventSink is the API server. Its methods return when it has answered, or when
// ctx ends.
type eventSink interface {
	create(ctx context.Context, e *eventsv1.Event) error
	patch(ctx context.Context, namespace, name string, patch []byte) error
}

// eventClient writes to an API server.
type eventClient struct{ rest *rest.RESTClient }

func newEventClient(rc *rest.Config, client *http.Client) (*eventClient, error) {
	scheme := runtime.NewScheme()
	if err := eventsv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, eventsv1.SchemeGroupVersion)
	c := rest.CopyConfig(rc)
	c.APIPath, c.GroupVersion = "/apis", &eventsv1.SchemeGroupVersion
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.QPS = -1 // Events has rates of its own
	r, err := rest.RESTClientForConfigAndClient(c, client)
	return &eventClient{r}, err
}

func (c *eventClient) create(ctx context.Context, e *eventsv1.Event) error {
	return c.rest.Post().Namespace(e.Namespace).Resource("events").Body(e).MaxRetries(0).Do(ctx).Error()
}

func (c *eventClient) patch(ctx context.Context, namespace, name string, patch []byte) error {
	return c.rest.Patch(types.MergePatchType).Namespace(namespace).Resource("events").Name(name).Body(patch).MaxRetries(0).Do(ctx).Error()
}

// answer is what a write came to.
type answer int

const (
	answerDone    answer = iota
	answerExists         // an event has that name
	answerGone           // there is none of that name, or no such namespace
	answerRefused        // for good
	answerLater          // the API server cannot be reached, or is busy
)

func answerOf(err error) answer {
	switch {
	case err == nil:
		return answerDone
	case apierrors.IsAlreadyExists(err):
		return answerExists
	case apierrors.IsNotFound(err):
		return answerGone
	case apierrors.IsTooManyRequests(err), apierrors.IsServerTimeout(err), apierrors.IsTimeout(err), apierrors.IsUnauthorized(err): // a token is renewed
		return answerLater
	}
	var said apierrors.APIStatus
	if errors.As(err, &said) && said.Status().Code >= 400 && said.Status().Code < 500 {
		return answerRefused
	}
	return answerLater
}

// write is one thing to be told to the API server: a series as it is now.
type write struct {
	event       Event
	name        string
	first, last time.Time
	count       uint64
	created     bool // it is there: its new count is told
	due         time.Time
}

func (s *series) write() write {
	return write{event: s.event, name: s.name, first: s.first, last: s.last, count: s.count, created: s.created, due: s.due}
}

func (e *Events) send(ctx context.Context, w write) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if !w.created {
		return e.sink.create(ctx, w.object(e.instance))
	}
	patch, err := json.Marshal(map[string]any{"series": w.series()})
	if err != nil {
		return err
	}
	return e.sink.patch(ctx, eventNamespace(w.event.About), w.name, patch)
}

// series is nil for what came once.
func (w *write) series() *eventsv1.EventSeries {
	if w.count < 2 {
		return nil
	}
	return &eventsv1.EventSeries{Count: int32(min(w.count, math.MaxInt32)), LastObservedTime: metav1.NewMicroTime(w.last)}
}

func (w write) object(instance string) *eventsv1.Event {
	a, kind := w.event.About, corev1.EventTypeNormal
	if w.event.Warning {
		kind = corev1.EventTypeWarning
	}
	return &eventsv1.Event{
		TypeMeta:   metav1.TypeMeta{APIVersion: "events.k8s.io/v1", Kind: "Event"},
		ObjectMeta: metav1.ObjectMeta{Namespace: eventNamespace(a), Name: w.name},
		EventTime:  metav1.NewMicroTime(w.first), Series: w.series(), ReportingController: Reporter, ReportingInstance: cut(instance, maxInstance),
		Action: w.event.Action, Reason: w.event.Reason, Type: kind, Note: cut(w.event.Note, maxNote),
		Regarding: corev1.ObjectReference{APIVersion: a.APIVersion, Kind: a.Kind, Namespace: a.Namespace, Name: a.Name, UID: types.UID(a.UID)},
	}
}

// eventNamespace: an event of what is in no namespace is in this one.
func eventNamespace(a About) string {
	if a.Namespace == "" {
		return metav1.NamespaceDefault
	}
	return a.Namespace
}

// eventName names the n-th event of this agent; a shared one by what it says.
func eventName(ev *Event, now time.Time, n uint64) string {
	end := fmt.Sprintf(".%x.%x", now.UnixNano(), n)
	if ev.Shared {
		sum := sha256.Sum256([]byte(strings.Join([]string{ev.About.UID, ev.Reason, ev.Key, ev.Note}, "\x00")))
		end = ".portcullis-" + hex.EncodeToString(sum[:8])
	}
	return strings.TrimRight(cut(ev.About.Name, maxName-len(end)), ".-") + end
}

// cut cuts at so many bytes, and between runes.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for most > 0 && !utf8.RuneStart(s[most]) {
		most--
	}
	return s[:most]
}
