package redact

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"strings"
	"testing"
)

// keys returns one private key of each kind, in DER, with the name of its PEM
// block.
func keys(t testing.TB) map[string][]byte {
	t.Helper()
	p256, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	p384, err2 := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	r, err3 := rsa.GenerateKey(rand.Reader, 2048)
	_, ed, err4 := ed25519.GenerateKey(rand.Reader)
	out := map[string][]byte{}
	pkcs8 := func(name string, key any) error {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		out[name] = der
		return err
	}
	sec1, err5 := x509.MarshalECPrivateKey(p256)
	out["EC PRIVATE KEY"] = sec1
	out["RSA PRIVATE KEY"] = x509.MarshalPKCS1PrivateKey(r)
	for _, err := range []error{err1, err2, err3, err4, err5, pkcs8("PRIVATE KEY", p256), pkcs8("PRIVATE KEY 384", p384), pkcs8("PRIVATE KEY rsa", r), pkcs8("PRIVATE KEY ed", ed)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

// written passes a text through a Writer, so many bytes at a time.
func written(t testing.TB, s string, step int) (string, int) {
	t.Helper()
	var out bytes.Buffer
	w := NewWriter(&out)
	for b := []byte(s); len(b) > 0; {
		n := min(step, len(b))
		if _, err := w.Write(b[:n]); err != nil {
			t.Fatal(err)
		}
		b = b[n:]
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String(), w.Removed()
}

// No form of a private key comes through, and what stands around it does.
func TestPrivateKeys(t *testing.T) {
	for name, der := range keys(t) {
		block := string(pem.EncodeToMemory(&pem.Block{Type: strings.Fields(name + " ")[0] + " PRIVATE KEY", Bytes: der}))
		lines := strings.Split(strings.TrimSpace(block), "\n")
		secret := strings.Join(lines[1:len(lines)-1], "")
		quoted, err := json.Marshal(map[string]string{"text": block, "after": "kept"})
		if err != nil {
			t.Fatal(err)
		}
		for form, text := range map[string]string{
			"plain":         "before\n" + block + "kept\n",
			"indented":      "key: |\n  " + strings.ReplaceAll(block, "\n", "\n  ") + "\nkept: yes\n",
			"of a log":      "2026-11-22T12:00:00.1Z stderr F " + strings.ReplaceAll(strings.TrimSpace(block), "\n", "\n2026-11-22T12:00:00.1Z stderr F ") + "\nkept\n",
			"cut off":       strings.Join(lines[:len(lines)-2], "\n") + "\nkept: by its colon\n",
			"in JSON":       string(quoted),
			"in quotes":     fmt.Sprintf("msg=%q kept\n", block),
			"DER":           "svid " + base64.StdEncoding.EncodeToString(der) + " kept\n",
			"PEM in base64": "data " + base64.StdEncoding.EncodeToString([]byte(block)) + " kept\n",
		} {
			got, n := written(t, text, 7)
			// A piece of the key, wherever lines end.
			for i := 0; i+20 <= len(secret); i += 10 {
				if strings.Contains(got, secret[i:i+20]) {
					t.Fatalf("%s, %s: a part of the key is left:\n%s", name, form, got)
				}
			}
			if n == 0 || !strings.Contains(got, "kept") {
				t.Errorf("%s, %s: removed %d, left\n%s", name, form, n, got)
			}
		}
	}
}

// Each secret goes; the rest of its text stays.
func TestText(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"Authorization: Bearer abcdef.ghijkl", "Authorization: [removed]"},
		{`curl -H "Authorization: Basic dXNlcjpwYXNz" https://x`, `curl -H "Authorization: [removed]" https://x`},
		{"token eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl ends", "token [removed] ends"},
		{"Cookie: session=abc; jwt=eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", "Cookie: [removed]"},
		{"got header Set-Cookie: id=hunter2; Path=/ from", "got header Set-Cookie: [removed]"},
		{"x-api-key: hunter2 of x", "x-api-key: [removed]"},
		{"DB_PASSWORD=a b c", "DB_PASSWORD=[removed]"},
		{"export AWS_SECRET_ACCESS_KEY=hunter2", "export AWS_SECRET_ACCESS_KEY=[removed]"},
		{"  password: hunter two # mine", "  password: [removed]"},
		{"level=info token=hunter2 peer=n1", "level=info token=[removed] peer=n1"},
		{`{"a":1,"clientSecret":"hun\"ter2","b":2`, `{"a":1,"clientSecret":"[removed]","b":2`}, // no JSON: cut off
		{`msg="{\"token\":\"hunter2\",\"x\":1}"`, `msg="{\"token\":\"[removed]\",\"x\":1}"`},
		{"run --token hunter2 --node n1", "run --token [removed] --node n1"},
		{"run --token=hunter2 --node n1", "run --token=[removed] --node n1"},
		{"https://user:hunter2@registry.example.com/v2", "https://[removed]@registry.example.com/v2"},
		{"GET /login?user=x&pw=hunter2 HTTP/1.1", "GET /login?[removed] HTTP/1.1"},
		{"https://x.example/a?k=hunter2#frag", "https://x.example/a?[removed]#frag"},
		{"AKIAIOSFODNN7EXAMPLE and ghp_abcdefghijklmnopqrstuv0123", "[removed] and [removed]"},
		{"kubeadm join --token abcdef.0123456789abcdef x", "kubeadm join --token [removed] x"},
		{"- name: DB_PASSWORD\n  value: hunter2\n- name: MODE\n  value: fast", "- name: DB_PASSWORD\n  value: [removed]\n- name: MODE\n  value: fast"},
		{"secret: |-\n  hunter2\n\n  more\nnext: kept", "secret: |-\nnext: kept"},

		// These are no secrets.
		{"issuer-token: /var/run/secrets/portcullis/token", "issuer-token: /var/run/secrets/portcullis/token"},
		{"--issuer-token=/var/run/secrets/portcullis/token", "--issuer-token=/var/run/secrets/portcullis/token"},
		{"issuer-token: \"\" # default", "issuer-token: \"\" # default"},
		{"nf_conntrack_sctp_timeout_cookie_wait = 3", "nf_conntrack_sctp_timeout_cookie_wait = 3"},
		{"automountServiceAccountToken: false", "automountServiceAccountToken: false"},
		{"tokenExpirationSeconds: 3600", "tokenExpirationSeconds: 3600"},
		{"socket cookie=4711", "socket cookie=4711"},
		{"spiffe://lab.test/ns/default/sa/xwing", "spiffe://lab.test/ns/default/sa/xwing"},
		{"portcullis_drops_total{reason=\"policy-denied\"} 3", "portcullis_drops_total{reason=\"policy-denied\"} 3"},
		{"image: registry.example.com/portcullis@sha256:0123456789abcdef", "image: registry.example.com/portcullis@sha256:0123456789abcdef"},
		{"-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIQ\n-----END CERTIFICATE-----", "-----BEGIN CERTIFICATE-----\nMIIBszCCAVmgAwIBAgIQ\n-----END CERTIFICATE-----"},
	} {
		got, n := Text(tc.text)
		if got != tc.want || (n > 0) != strings.Contains(tc.want, Removed) && !strings.Contains(tc.text, "|-") {
			t.Errorf("%q, %d removed:\n got %q\nwant %q", tc.text, n, got, tc.want)
		}
		for _, step := range []int{1, 3, 1 << 20} {
			if again, _ := written(t, tc.text, step); again != tc.want {
				t.Errorf("%q by a Writer, %d bytes at a time: %q", tc.text, step, again)
			}
		}
	}
}

// Documents are read by their structure.
func TestDocuments(t *testing.T) {
	const in = `{"kind": "List", "items": [
	 {"kind": "Secret", "metadata": {"name": "s"}, "data": {"tls.key": "aHVudGVyMg=="}, "stringData": {"a": ["hunter2"]}},
	 {"kind": "Pod", "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{\"spec\":{\"env\":[{\"name\":\"DB_PASSWORD\",\"value\":\"hunter2\"}]}}"}},
	  "spec": {"automountServiceAccountToken": true, "volumes": [{"name": "token", "secret": {"secretName": "portcullis-token"}}],
	   "containers": [{"command": ["run", "--token", "hunter2", "--issuer-token", "/var/run/secrets/x/token"],
	    "env": [{"name": "API_TOKEN", "value": "hunter2"}, {"name": "MODE", "value": "fast"}, {"name": "K", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}],
	    "livenessProbe": {"httpGet": {"path": "/healthz?key=hunter2", "httpHeaders": [{"name": "X-Probe", "value": "hunter2"}]}}}]}},
	 {"flow": {"l7": {"http": {"method": "GET", "url": "http://a/b?c=hunter2", "headers": [{"key": "X-Anything", "value": "hunter2"}]}, "dns": {"query": "www.example.org."}}}},
	 {"l7": {"path": "/v1?pin=hunter2", "header": ["X-Has-Force: hunter2", "Host"]}},
	 {"headers": {"A": "hunter2", "B": ["hunter2"]}, "query": "a=hunter2", "password": 4711471, "tokenTTLSeconds": 30, "token": ["hunter2", 12]},
	 {"users": [{"name": "u", "user": {"token": "hunter2", "client-key-data": "aHVudGVyMg==", "client-certificate-data": "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUIKLS0tLS1FTkQgQ0VSVElGSUNBVEUtLS0tLQo="}}]}]}`
	doc, n := JSON([]byte(in))
	text := string(doc)
	for _, secret := range []string{"hunter2", "aHVudGVyMg", "4711471"} {
		if strings.Contains(text, secret) {
			t.Errorf("%s is left", secret)
		}
	}
	for _, kept := range []string{"portcullis-token", `"fast"`, "secretKeyRef", "www.example.org.", "/var/run/secrets/x/token", "X-Anything", "X-Has-Force", "X-Probe", "tls.key", `"tokenTTLSeconds": 30`, `"automountServiceAccountToken": true`, "LS0tLS1CRUdJTiBDRVJU"} {
		if !strings.Contains(text, kept) {
			t.Errorf("%s is gone", kept)
		}
	}
	if n != 19 || !json.Valid(doc) || t.Failed() {
		t.Errorf("removed %d, want 19:\n%s", n, text)
	}
	if twice, m := JSON(doc); m != 0 || !bytes.Equal(twice, doc) {
		t.Errorf("done twice it removes %d more:\n%s", m, twice)
	}
	if text, _ := YAML([]byte("a: 1\n---\nb: [x, {token: hunter2}]\n")); string(text) != "a: 1\n---\nb:\n  - x\n  - token: '[removed]'\n" {
		t.Errorf("documents of YAML: %q", text)
	}
	// The same as YAML; and as a line of a log.
	again, m := YAML([]byte(in))
	if m != n || !strings.Contains(string(again), "client-certificate-data: LS0tLS1C") || !strings.Contains(string(again), "X-Anything") || strings.Contains(string(again), "hunter2") || strings.Contains(string(again), "aHVudGVyMg") {
		t.Errorf("as YAML, removed %d:\n%s", m, again)
	}
	line, k := written(t, strings.ReplaceAll(in, "\n", " ")+"\n", 100)
	if k != n || strings.Contains(line, "hunter2") || !json.Valid([]byte(line)) {
		t.Errorf("as a line, removed %d: %s", k, line)
	}
}

// Of a name that stands twice in a document, neither value is left.
func TestTwice(t *testing.T) {
	got, _ := written(t, `{"password":"hunter2","password":null}`+"\n", 10)
	if strings.Contains(got, "hunter2") {
		t.Error(got)
	}
	doc, _ := JSON([]byte(`{"x":"{\"token\":\"hunter2\",\"token\":1}"}`))
	if strings.Contains(string(doc), "hunter2") {
		t.Errorf("%s", doc)
	}
	text, _ := YAML([]byte("# hunter2\npassword: hunter2\npassword: null\n"))
	if strings.Contains(strings.TrimPrefix(string(text), "# hunter2\n"), "hunter2") {
		t.Errorf("%s", text)
	}
}

// A line without an end is not held in memory, nor passed on in part.
func TestEndlessLine(t *testing.T) {
	got, n := written(t, "first\n"+strings.Repeat("A", 3*LongestLine)+"password=hunter2\nlast", 4096)
	if want := fmt.Sprintf("first\n[a line of %d bytes was left out]\nlast", 3*LongestLine+16); got != want || n != 1 {
		t.Errorf("removed %d, %.100q", n, got)
	}
}

func TestArgs(t *testing.T) {
	got, n := Args([]string{"x", "--token", "hunter2", "--password=hunter2", "--node", "n1", "--issuer-token", "/var/run/x", "API_KEY=hunter2"})
	if want := "x --token [removed] --password=[removed] --node n1 --issuer-token /var/run/x API_KEY=[removed]"; strings.Join(got, " ") != want || n != 3 {
		t.Errorf("%d: %q", n, got)
	}
}

// seeds are texts that a fuzzer begins with.
var seeds = []string{"", "x\ny", "password: |\n  a\n", "-----BEGIN RSA PRIVATE KEY-----\nabc", "{\"a\":\"b\"}", "name: TOKEN\nvalue: x", "[removed]", "a=b,token='x'", "{\"token\":{\"a\":[1,\"b\"]}}", "? ! &a *a"}

// FuzzAround: whatever stands before and after, and however it is cut, a secret
// on lines of its own does not come through; nothing that was removed appears
// by doing it again.
func FuzzAround(f *testing.F) {
	for _, s := range seeds {
		f.Add(s, s, uint8(3))
	}
	const secret = "hunter2hunter2hunter2"
	block := "-----BEGIN PRIVATE KEY-----\n" + secret + "\n-----END PRIVATE KEY-----"
	kinds := []string{"Authorization: Bearer " + secret, "password=" + secret, `{"token":"` + secret + `"}`, block,
		"eyJhbGciOiJub25lIn0." + secret + ".", "https://u:" + secret + "@h/", "/a?b=" + secret, `{"headers":["X: ` + secret + `"]}`}
	f.Fuzz(func(t *testing.T, before, after string, step uint8) {
		if strings.Contains(before+after, "hunter2") {
			return
		}
		for _, k := range kinds {
			got, _ := written(t, before+"\n"+k+"\n"+after, int(step)+1)
			if strings.Contains(got, secret) {
				t.Fatalf("%q is left of %q", secret, k)
			}
			whole, _ := written(t, before+"\n"+k+"\n"+after, 1<<20)
			if got != whole {
				t.Fatalf("in pieces %q, whole %q", got, whole)
			}
		}
	})
}

// FuzzDocuments: a secret within a document of any form does not come through,
// and JSON stays JSON.
func FuzzDocuments(f *testing.F) {
	for _, s := range seeds {
		f.Add(s, s)
	}
	const secret = "hunter2hunter2hunter2"
	f.Fuzz(func(t *testing.T, name, text string) {
		if strings.Contains(name+text, "hunter2") {
			return
		}
		doc, err := json.Marshal(map[string]any{name: text, "list": []any{text, map[string]any{name: text, "apiToken": secret}}, "headers": []any{map[string]any{"name": name, "value": secret}}})
		if err != nil {
			return
		}
		got, _ := JSON(doc)
		if strings.Contains(string(got), secret) || !json.Valid(got) {
			t.Fatalf("of %s is left %s", doc, got)
		}
		if got, _ = YAML(doc); strings.Contains(string(got), secret) {
			t.Fatalf("of %s is left, as YAML, %s", doc, got)
		}
		YAML([]byte(text)) // must not panic
		JSON([]byte(text))
	})
}
