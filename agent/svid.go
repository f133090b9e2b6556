package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/zap"

	"portcullis/identity"
	"portcullis/identity/issuer/client"
	"portcullis/identity/svid"
)

// keptSVID is the file in --journal-dir in which an SVID of an issuer outlives
// the agent: on a tmpfs, so it does not outlive the boot.
const keptSVID = "node-svid.json"

// newSource makes the source of the agent's own SVID.
func newSource(cfg Config, log *zap.Logger) (*svid.Source, error) {
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, err
	}
	id, err := spiffeid.FromPath(td, identity.AgentSPIFFEPath(cfg.Node))
	if err != nil {
		return nil, err
	}
	from, err := newProvider(cfg, id, log)
	if err != nil {
		return nil, err
	}
	return svid.New(svid.Config{From: from, ID: id, Log: log})
}

func newProvider(cfg Config, id spiffeid.ID, log *zap.Logger) (svid.Provider, error) {
	switch {
	case cfg.Issuer != "":
		return client.New(*cfg.issuerClient(id, log))
	case cfg.SVIDDir != "":
		return svid.Directory(cfg.SVIDDir)
	}
	return svid.WorkloadAPI(cfg.WorkloadAPI)
}

func (c *Config) issuerClient(id spiffeid.ID, log *zap.Logger) *client.Config {
	return &client.Config{URL: withoutDNS(c.Issuer, podNamespace(), os.Getenv), TokenFile: c.IssuerToken, BundleFile: c.IssuerBundle, CacheFile: filepath.Join(c.JournalDir, keptSVID), ID: id, Log: log}
}

// validateSVID looks at where the SVID comes from.
func (c *Config) validateSVID() (errs []error) {
	if c.Issuer != "" {
		if c.SVIDDir != "" {
			errs = append(errs, fmt.Errorf("--svid-dir and --issuer exclude each other: an agent's SVID comes from one place"))
		}
		return append(errs, split(c.issuerClient(spiffeid.ID{}, nil).Check())...)
	}
	if c.SVIDDir != "" && !filepath.IsAbs(c.SVIDDir) {
		errs = append(errs, fmt.Errorf("--svid-dir %q: want an absolute path", c.SVIDDir))
	}
	if c.IssuerToken != "" || c.IssuerBundle != "" {
		errs = append(errs, fmt.Errorf("--issuer is missing: --issuer-token and --issuer-bundle are for asking one"))
	}
	if path, ok := strings.CutPrefix(c.WorkloadAPI, "unix://"); !ok || !filepath.IsAbs(path) {
		errs = append(errs, fmt.Errorf("--workload-api %q: want unix:///path/to/socket of the SPIFFE Workload API", c.WorkloadAPI))
	}
	return errs
}

// split returns what errors.Join has joined.
func split(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}
