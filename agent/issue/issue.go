package issue

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portcullis/agent/kube"
	"portcullis/identity/issuer"
)

// Keys in the objects.
const (
	SecretKey    = "keyring.json"
	ConfigMapKey = "bundle.json"
)

// Config is what an issuer is told at its start.
type Config struct {
	TrustDomain    string
	Listen         string // ADDRESS:PORT
	Kubeconfig     string // path; empty: this is a pod
	Namespace      string // of the agents, the Secret and the ConfigMap; empty: this pod's
	Secret         string
	ConfigMap      string
	ServiceAccount string // of the agents
	RelayAccount   string // of relays; empty: none gets an SVID
	Audience       string // of their tokens
	SVIDLife       time.Duration
	AuthorityLife  time.Duration
	UserAgent      string
}

// Default returns the configuration that flags start from.
func Default() Config {
	return Config{
		Listen: fmt.Sprintf(":%d", issuer.DefaultPort), Secret: "portcullis-issuer", ConfigMap: "portcullis-bundle",
		ServiceAccount: "portcullis-agent", RelayAccount: "portcullis-relay", Audience: issuer.DefaultAudience,
		SVIDLife: issuer.DefaultSVIDLife, AuthorityLife: issuer.DefaultAuthorityLife,
		UserAgent: "portcullis-issuer",
	}
}

// namespaceFile is where a pod finds its namespace.
const namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"

var objectName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$`)

// Validate reports every problem of the configuration, one error for each,
// joined. It fills in the namespace of the pod.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		bad("--trust-domain %q: %v", c.TrustDomain, err)
	}
	if _, port, err := net.SplitHostPort(c.Listen); err != nil || port == "" {
		bad("--listen %q: want ADDRESS:PORT, or :PORT for every address", c.Listen)
	}
	if c.Namespace == "" {
		data, err := os.ReadFile(namespaceFile)
		if c.Namespace = strings.TrimSpace(string(data)); err != nil {
			bad("--namespace is missing, and this is no pod: name the namespace of the agents")
		}
	}
	for _, o := range []struct{ flag, name string }{{"namespace", c.Namespace}, {"secret", c.Secret}, {"bundle-configmap", c.ConfigMap}, {"agent-service-account", c.ServiceAccount}} {
		if (o.flag != "namespace" || o.name != "") && !objectName.MatchString(o.name) {
			bad("--%s %q: want a name of Kubernetes", o.flag, o.name)
		}
	}
	if c.RelayAccount != "" && (!objectName.MatchString(c.RelayAccount) || c.RelayAccount == c.ServiceAccount) {
		bad("--relay-service-account %q: want a name of Kubernetes, and not the agents'", c.RelayAccount)
	}
	if c.Audience == "" {
		bad("--audience is missing: a token for any audience would be the API server's, too")
	}
	if err := issuer.CheckTimes(c.SVIDLife, c.AuthorityLife); err != nil {
		bad("--svid-ttl %s, --authority-ttl %s: %v", c.SVIDLife, c.AuthorityLife, err)
	}
	return errors.Join(errs...)
}

// Run is the issuer: it returns when ctx ends (nil), after requests under way
// are answered, or when it cannot listen.
func Run(ctx context.Context, cfg Config, log *zap.Logger) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return err
	}
	api, err := kube.NewAPI(cfg.Kubeconfig, cfg.Namespace, cfg.UserAgent)
	if err != nil {
		return err
	}
	keeper, err := issuer.NewKeeper(issuer.KeeperConfig{TrustDomain: td, SVIDLife: cfg.SVIDLife, AuthorityLife: cfg.AuthorityLife, Log: log,
		Keys: store{api.Secret(cfg.Secret, SecretKey)}, Bundle: store{api.ConfigMap(cfg.ConfigMap, ConfigMapKey)}})
	if err != nil {
		return err
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return fmt.Errorf("listen for agents: %w", err)
	}
	user := func(account string) string { return "system:serviceaccount:" + cfg.Namespace + ":" + account }
	rules := issuer.Rules{Audience: cfg.Audience, Account: user(cfg.ServiceAccount)}
	if cfg.RelayAccount != "" {
		rules.Relay = user(cfg.RelayAccount)
	}
	server, err := issuer.NewServer(issuer.ServerConfig{Keeper: keeper, Reviewer: reviewer{api}, Listener: listener, Log: log, Rules: rules})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return keeper.Run(ctx) })
	group.Go(func() error { return server.Run(ctx) })
	err = group.Wait()
	log.Info("issuer stopped; agents go on with the SVIDs that they have")
	return err
}

// reviewer is an API as identity/issuer wants it.
type reviewer struct{ api *kube.API }

// Review implements issuer.Reviewer.
func (r reviewer) Review(ctx context.Context, token, audience string) (issuer.Review, error) {
	s, err := r.api.ReviewToken(ctx, token, audience)
	if err != nil {
		return issuer.Review{}, err
	}
	out := issuer.Review{Authenticated: s.Authenticated, Error: s.Error, Audiences: s.Audiences, Username: s.User.Username, Extra: map[string][]string{}}
	for key, values := range s.User.Extra {
		out.Extra[key] = values
	}
	return out, nil
}

// store is an object as identity/issuer wants it.
type store struct{ *kube.Value }

// Load implements issuer.Store.
func (s store) Load(ctx context.Context) ([]byte, string, error) {
	value, version, err := s.Value.Load(ctx)
	return value, version, translate(err)
}

// Save implements issuer.Store.
func (s store) Save(ctx context.Context, value []byte, version string) error {
	return translate(s.Value.Save(ctx, value, version))
}

// translate puts the errors that identity/issuer asks for in front.
func translate(err error) error {
	switch {
	case errors.Is(err, kube.ErrMissing):
		return fmt.Errorf("%w: %w", issuer.ErrMissing, err)
	case errors.Is(err, kube.ErrConflict):
		return fmt.Errorf("%w: %w", issuer.ErrConflict, err)
	}
	return err
}
