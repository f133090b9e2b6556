package kube

import (
	"context"
	"errors"
	"fmt"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// Errors of a Value. The text around them says more.
var (
	ErrMissing  = errors.New("there is no such object")
	ErrConflict = errors.New("the object was changed meanwhile")
)

// API asks the API server single questions, for the issuer of node SVIDs. Safe
// for concurrent use.
type API struct {
	core, authentication *rest.RESTClient
	namespace            string
}

// NewAPI prepares an API for one namespace. It does not ask the API server.
// kubeconfig is a path; empty: the service account of the pod that this is.
func NewAPI(kubeconfig, namespace, userAgent string) (*API, error) {
	rc, err := restConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	rc.UserAgent = userAgent
	rc.QPS, rc.Burst = 50, 100
	a := &API{namespace: namespace}
	if a.core, err = groupClient(rc, "/api", corev1.SchemeGroupVersion, corev1.AddToScheme); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	if a.authentication, err = groupClient(rc, "/apis", authenticationv1.SchemeGroupVersion, authenticationv1.AddToScheme); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return a, nil
}

// groupClient speaks JSON, and knows one group only.
func groupClient(rc *rest.Config, path string, gv schema.GroupVersion, add func(*runtime.Scheme) error) (*rest.RESTClient, error) {
	scheme := runtime.NewScheme()
	if err := add(scheme); err != nil {
		return nil, err
	}
	c := rest.CopyConfig(rc)
	c.APIPath, c.GroupVersion = path, &gv
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	return rest.RESTClientFor(c)
}

// ReviewToken returns what the API server says of a token, for an audience. A
// token that it rejects is no error.
func (a *API) ReviewToken(ctx context.Context, token, audience string) (authenticationv1.TokenReviewStatus, error) {
	question := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}}}
	var answer authenticationv1.TokenReview
	err := a.authentication.Post().Resource("tokenreviews").Body(question).Do(ctx).Into(&answer)
	return answer.Status, err
}

// Value is one value in a Secret or a ConfigMap.
type Value struct {
	api       *API
	kind      string
	resource  string
	name, key string
}

// Secret returns the value of one key of a Secret.
func (a *API) Secret(name, key string) *Value { return &Value{a, "Secret", "secrets", name, key} }

// ConfigMap returns the value of one key of a ConfigMap.
func (a *API) ConfigMap(name, key string) *Value {
	return &Value{a, "ConfigMap", "configmaps", name, key}
}

// String names the object.
func (o *Value) String() string { return fmt.Sprintf("%s %s/%s", o.kind, o.api.namespace, o.name) }

// Load returns the value, nil if the object has none, and the object's version.
func (o *Value) Load(ctx context.Context) (value []byte, version string, err error) {
	obj, err := o.get(ctx)
	if err != nil {
		return nil, "", err
	}
	switch obj := obj.(type) {
	case *corev1.Secret:
		return obj.Data[o.key], obj.ResourceVersion, nil
	case *corev1.ConfigMap:
		if text, ok := obj.Data[o.key]; ok {
			value = []byte(text)
		}
		return value, obj.ResourceVersion, nil
	}
	return nil, "", fmt.Errorf("%s is a %T", o, obj)
}

// Save writes the value if the object still has that version, and leaves the
// rest of it as it is. With the version "" it makes the object.
func (o *Value) Save(ctx context.Context, value []byte, version string) error {
	if version == "" {
		return o.explain(o.request(o.api.core.Post()).Body(o.filled(nil, value)).Do(ctx).Error())
	}
	obj, err := o.get(ctx)
	if errors.Is(err, ErrMissing) {
		return fmt.Errorf("%s: %w", o, ErrConflict) // it was there
	}
	if err != nil {
		return err
	}
	meta, ok := obj.(metav1.Object)
	if !ok || meta.GetResourceVersion() != version {
		return fmt.Errorf("%s: %w", o, ErrConflict)
	}
	// The version goes with it: the API server refuses it if it is old by then.
	return o.explain(o.request(o.api.core.Put()).Name(o.name).Body(o.filled(obj, value)).Do(ctx).Error())
}

func (o *Value) get(ctx context.Context) (runtime.Object, error) {
	obj, err := o.request(o.api.core.Get()).Name(o.name).Do(ctx).Get()
	return obj, o.explain(err)
}

func (o *Value) request(r *rest.Request) *rest.Request {
	return r.Namespace(o.api.namespace).Resource(o.resource)
}

// filled puts the value into an object, a new one if there is none.
func (o *Value) filled(obj runtime.Object, value []byte) runtime.Object {
	meta := metav1.ObjectMeta{Name: o.name, Namespace: o.api.namespace}
	switch obj := obj.(type) {
	case *corev1.Secret:
		if obj.Data == nil {
			obj.Data = map[string][]byte{}
		}
		obj.Data[o.key] = value
		return obj
	case *corev1.ConfigMap:
		if obj.Data == nil {
			obj.Data = map[string]string{}
		}
		obj.Data[o.key] = string(value)
		return obj
	}
	if o.kind == "Secret" {
		return o.filled(&corev1.Secret{ObjectMeta: meta, Type: corev1.SecretTypeOpaque}, value)
	}
	return o.filled(&corev1.ConfigMap{ObjectMeta: meta}, value)
}

func (o *Value) explain(err error) error {
	switch {
	case err == nil:
		return nil
	case apierrors.IsNotFound(err):
		return fmt.Errorf("%s: %w", o, ErrMissing)
	case apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		return fmt.Errorf("%s: %w", o, ErrConflict)
	}
	return err
}
