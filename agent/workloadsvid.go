package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"portcullis/identity/svid"
)

// How the SPIRE agent is told which workload is meant, on its admin socket.
const (
	delegatedBySelectors = "selectors" // what its attestor would find of a pod
	delegatedByProcess   = "process"   // which it attests itself
)

// errNoWorkloadSVIDs: nothing that was configured gives the SVIDs of workloads.
var errNoWorkloadSVIDs = errors.New("--evidence svid needs workloads' own SVIDs, and no source of them is configured: name SPIRE's admin socket with --delegated-socket, or a directory of PEM files with --workload-svid-dir (a portcullis issuer gives SVIDs to agents only)")

// validateWorkloadSVIDs looks at where workloads' SVIDs come from, and by what
// those of other nodes are verified.
func (c *Config) validateWorkloadSVIDs() (errs []error) {
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.DelegatedSocket != "" && c.WorkloadSVIDDir != "" {
		bad("--workload-svid-dir and --delegated-socket exclude each other: workloads' SVIDs come from one place")
	}
	if path, ok := strings.CutPrefix(c.DelegatedSocket, "unix://"); c.DelegatedSocket != "" && (!ok || !filepath.IsAbs(path)) {
		bad("--delegated-socket %q: want unix:///path/to/admin.sock of the SPIRE agent", c.DelegatedSocket)
	}
	switch c.DelegatedBy {
	case "", delegatedBySelectors, delegatedByProcess:
	default:
		bad("--delegated-by %q: want %s, or %s", c.DelegatedBy, delegatedBySelectors, delegatedByProcess)
	}
	for flag, path := range map[string]string{"--workload-svid-dir": c.WorkloadSVIDDir, "--workload-bundle": c.WorkloadBundle} {
		if path != "" && !filepath.IsAbs(path) {
			bad("%s %q: want an absolute path", flag, path)
		}
	}
	if c.Evidence == "svid" && c.DelegatedSocket == "" && c.WorkloadSVIDDir == "" {
		errs = append(errs, errNoWorkloadSVIDs)
	}
	_, err := c.federated()
	return append(errs, split(err)...)
}

// federated returns the files of foreign trust domains' bundles.
func (c *Config) federated() (map[spiffeid.TrustDomain]string, error) {
	files := map[spiffeid.TrustDomain]string{}
	var errs []error
	for _, text := range c.FederatedBundles {
		name, path, ok := strings.Cut(text, "=")
		td, err := spiffeid.TrustDomainFromString(name)
		switch {
		case !ok || err != nil || !filepath.IsAbs(path):
			errs = append(errs, fmt.Errorf("--federated-bundle %q: want TRUST-DOMAIN=/path/to/file", text))
		case td.Name() == c.TrustDomain:
			errs = append(errs, fmt.Errorf("--federated-bundle %q: that is this agent's own trust domain, whose bundle comes with its SVID (--workload-bundle adds authorities of workloads)", text))
		case files[td] != "":
			errs = append(errs, fmt.Errorf("--federated-bundle: %s is there twice", td))
		default:
			files[td] = path
		}
	}
	return files, errors.Join(errs...)
}

// newWorkloads makes the source of workloads' SVIDs; nil: none is configured.
func newWorkloads(cfg Config, log *zap.Logger) (svid.Workloads, error) {
	switch {
	case cfg.DelegatedSocket != "":
		by := cfg.DelegatedBy
		return svid.NewDelegatedWorkloads(svid.DelegatedConfig{Address: cfg.DelegatedSocket, Kubernetes: by == delegatedBySelectors || by == "" && cfg.Kubernetes, Log: log})
	case cfg.WorkloadSVIDDir != "":
		return svid.NewPEMWorkloads(cfg.WorkloadSVIDDir, log)
	}
	return nil, nil
}

// newTrust makes what workloads' SVIDs are verified with.
func newTrust(cfg Config, source *svid.Source, log *zap.Logger) (*svid.Bundles, error) {
	own, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	files, err := cfg.federated()
	if err != nil {
		return nil, err
	}
	return svid.NewBundles(svid.TrustConfig{Own: own, Agent: source, OwnFile: cfg.WorkloadBundle, Files: files, Log: log})
}

// useWorkloads makes the sources of workloads' SVIDs and of the bundles that
// they are verified with.
func (l *loop) useWorkloads(source *svid.Source) (err error) {
	if l.workloadSVIDs, err = newWorkloads(l.cfg, l.log); err != nil {
		return err
	}
	l.trust, err = newTrust(l.cfg, source, l.log)
	return err
}

// runWorkloads keeps them up to date until ctx ends.
func (l *loop) runWorkloads(ctx context.Context) error {
	if l.workloadSVIDs == nil {
		<-ctx.Done()
		return nil
	}
	return l.workloadSVIDs.Run(ctx)
}

// alarmWorkloadSVIDs tells of files that cannot be used.
func (l *loop) alarmWorkloadSVIDs() {
	tell := func(alarm, what string, problem error) {
		if problem == nil {
			l.alarms.clear(alarm)
			return
		}
		l.alarms.raise(alarm, what+": "+problem.Error())
	}
	if source, ok := l.workloadSVIDs.(interface{ Problem() error }); ok {
		tell("workload-svids", "SVIDs of workloads are not used; what was read before stands until its end", source.Problem())
	}
	if l.trust != nil {
		tell("trust-bundles", "trust bundles are not used", l.trust.Problem())
	}
}
