package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"time"
)

// lifetime is longer than any run.
const lifetime = 30 * 24 * time.Hour

// authority signs the certificates of a cluster.
type authority struct {
	plan   plan
	cert   *x509.Certificate
	key    *ecdsa.PrivateKey
	serial int64
}

// writePKI makes keys, certificates and kubeconfigs of everything in the
// cluster.
func writePKI(p plan) error {
	if err := os.MkdirAll(p.path("pki"), 0o700); err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	a := &authority{plan: p, key: key, serial: 1}
	template := a.template(pkix.Name{CommonName: "portcullis-e2e"})
	template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign|x509.KeyUsageDigitalSignature
	if a.cert, err = a.sign("ca", template, nil, key); err != nil {
		return err
	}
	masters := []string{"system:masters"}
	errs := []error{
		a.serviceAccounts(),
		a.issue("apiserver", pkix.Name{CommonName: "kube-apiserver"}, []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
			"127.0.0.1", controlIP4, controlIP6, apiServiceIP),
		a.issue("kubelet-client", pkix.Name{CommonName: "apiserver-kubelet-client", Organization: masters}, nil),
		a.issue("admin", pkix.Name{CommonName: "admin", Organization: masters}, nil),
		a.issue("kcm", pkix.Name{CommonName: "system:kube-controller-manager"}, nil),
		a.issue("scheduler", pkix.Name{CommonName: "system:kube-scheduler"}, nil),
		a.issue("proxy", pkix.Name{CommonName: "system:kube-proxy"}, nil),
	}
	clients := []string{"admin", "kcm", "scheduler", "proxy"}
	for i, name := range p.Nodes {
		n := p.node(i)
		errs = append(errs, a.issue("kubelet-"+name, pkix.Name{CommonName: "system:node:" + name, Organization: []string{"system:nodes"}}, []string{name}, n.IP4.String(), n.IP6.String(), n.spare().String()))
		clients = append(clients, "kubelet-"+name)
	}
	for _, c := range clients {
		b, err := kubeconfig(p, c)
		errs = append(errs, err, os.WriteFile(p.pki(c+".kubeconfig"), b, 0o600))
	}
	return errors.Join(errs...)
}

func (a *authority) template(subject pkix.Name) *x509.Certificate {
	a.serial++
	return &x509.Certificate{SerialNumber: big.NewInt(a.serial), Subject: subject, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(lifetime)}
}

// issue writes a key and a certificate for client and server.
func (a *authority) issue(name string, subject pkix.Name, dns []string, ips ...string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	t := a.template(subject)
	t.KeyUsage, t.ExtKeyUsage = x509.KeyUsageDigitalSignature, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	t.DNSNames = dns
	for _, ip := range ips {
		t.IPAddresses = append(t.IPAddresses, net.ParseIP(ip))
	}
	_, err = a.sign(name, t, a.cert, key)
	return err
}

// sign writes NAME.crt and NAME.key; without a parent the certificate is its own.
func (a *authority) sign(name string, t, parent *x509.Certificate, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	if parent == nil {
		parent = t
	}
	der, err := x509.CreateCertificate(rand.Reader, t, parent, &key.PublicKey, a.key)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(a.write(name+".crt", "CERTIFICATE", der), a.writeKey(name+".key", key)); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// serviceAccounts writes the pair that signs and checks tokens.
func (a *authority) serviceAccounts() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	return errors.Join(a.writeKey("sa.key", key), a.write("sa.pub", "PUBLIC KEY", der))
}

func (a *authority) writeKey(file string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return a.write(file, "PRIVATE KEY", der)
}

func (a *authority) write(file, kind string, der []byte) error {
	return os.WriteFile(a.plan.pki(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600)
}
