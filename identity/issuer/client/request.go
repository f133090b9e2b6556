package client

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"portcullis/identity/issuer"
)

// newHTTP makes the client. Each connection is checked against the bundle of
// its moment; none outlives its question, so a withdrawn authority has no old
// connection to speak through.
func (c *Client) newHTTP() *http.Client {
	cfg := tlsconfig.TLSClientConfig(newestBundle{c.trust}, tlsconfig.AuthorizeID(c.issuer))
	cfg.MinVersion = tls.VersionTLS13
	cfg.SessionTicketsDisabled, cfg.ClientSessionCache = true, nil
	return &http.Client{
		Timeout: requestTime,
		Transport: &http.Transport{
			TLSClientConfig: cfg, DisableKeepAlives: true, Proxy: nil,
			MaxResponseHeaderBytes: 16 << 10,
		},
		// The token goes to the issuer and nowhere else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the issuer must not redirect") },
	}
}

// request gets a new SVID for a new key.
func (c *Client) request(ctx context.Context) error {
	token, err := readBounded(c.cfg.TokenFile, issuer.MaxToken)
	if err != nil {
		return fmt.Errorf("the token for the issuer: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.url(issuer.PathSVID), bytes.NewReader(csr))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	req.Header.Set("Content-Type", "application/pkcs10")
	body, _, err := c.do(req)
	if err != nil {
		return err
	}
	var answer issuer.Issued
	if err := json.Unmarshal(body, &answer); err != nil {
		return fmt.Errorf("the issuer's answer: %w", err)
	}
	cert, err := x509.ParseCertificate(answer.Certificate)
	if err != nil {
		return fmt.Errorf("the issuer's certificate: %w", err)
	}
	if public, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !public.Equal(key.Public()) {
		return errors.New("the issuer's certificate is for another key")
	}
	if err := c.trust.offer(answer.Bundle); err != nil {
		return fmt.Errorf("the issuer's bundle: %w", err)
	}
	if err := c.verify(cert, c.trust.bundle()); err != nil {
		return fmt.Errorf("the issuer's certificate: %w", err)
	}
	c.use(key, cert)
	return nil
}

// poll asks for a newer bundle.
func (c *Client) poll(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.url(issuer.PathBundle), nil)
	if err != nil {
		return err
	}
	if n, ok := c.trust.bundle().SequenceNumber(); ok {
		req.Header.Set("If-None-Match", `"`+strconv.FormatUint(n, 10)+`"`)
	}
	body, code, err := c.do(req)
	if err != nil || code == http.StatusNotModified {
		return err
	}
	return c.trust.offer(body)
}

// do sends a request and reads the answer, 200 or 304.
func (c *Client) do(req *http.Request) (body []byte, code int, err error) {
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, 0, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, issuer.MaxAnswer+1))
	switch {
	case err != nil:
		return nil, 0, fmt.Errorf("the issuer's answer: %w", err)
	case len(body) > issuer.MaxAnswer:
		return nil, 0, fmt.Errorf("the issuer's answer is longer than %d bytes", issuer.MaxAnswer)
	case resp.StatusCode == http.StatusOK, resp.StatusCode == http.StatusNotModified:
		return body, resp.StatusCode, nil
	}
	var p issuer.Problem
	if json.Unmarshal(body, &p) == nil && p.Reason != "" {
		return nil, 0, fmt.Errorf("the issuer refuses (%s): %.500s", p.Reason, p.Message)
	}
	return nil, 0, fmt.Errorf("the issuer answers %s", resp.Status)
}

func (c *Client) url(path string) string { return strings.TrimSuffix(c.cfg.URL, "/") + path }
