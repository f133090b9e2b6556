package redact

import (
	"encoding/json"
	"strings"
	"testing"
)

// Each holds hunter2 as a secret in a place where one was once left, or might be.
var smuggled = []string{
	"dial https://user:pa@hunter2@host/x", "postgres://u:hunter2/w@host/db", "//user:hunter2@host/x", "amqp://u:hunter2@h,amqp://u:hunter2@g",
	"url=https%3A%2F%2Fuser%3Ahunter2%40host", "mysql user:hunter2@tcp(192.0.2.1:3306)/db", "webhook https://hooks.slack.com/services/T00/B00/hunter2",
	"DB_PASS=hunter2", "export MYSQL_PWD=hunter2", "dbPass: hunter2", "pass: hunter2", "x PGPASS=hunter2", "auth: aHVudGVyMhunter2=", "//r/:_auth=hunter2",
	"psk = hunter2", "PresharedKey = hunter2", "hmac_key: hunter2", "PrivateKey = hunter2", "sas=hunter2", "sessionid=hunter2", "otp=hunter2", "licenseKey=hunter2",
	`x Authorization: Digest username="a", response="hunter2"`, `x Cookie: a=1; b="hunter2"`,
	"run --password 'hunter2 x' end", `run --password "hunter2"`, `run --pass hunter2 end`, `args ["--token","hunter2"]`, `args ["--token", "hunter2"] x`, `[]string{"--password", "hunter2"}`, `msg="run --token \"hunter2\""`,
	"AGE-SECRET-KEY-1" + strings.Repeat("Q", 51) + "HUNTER2", "hvs.CAESIhunter2hunter2hunter2", "npm_hunter2hunter2hunter2aaaa", "sk-hunter2hunter2hunter2hunter2hunter2", "dckr_pat_hunter2hunter2hunter2", "ya29.hunter2hunter2hunter2",
	"\x1b[36mtoken\x1b[0m=hunter2", "password:\n  hunter2\nkept: yes", "password:\n\n    hunter2\nkept: yes", "passwords:\n- hunter2\nkept: yes",
	`{"auths":{"reg":{"auth":"aHVudGVyMg-hunter2"}}}`, `{"kty":"EC","crv":"P-256","d":"hunter2","x":"a"}`, `{"keys":[{"kty":"oct","k":"hunter2"}]}`,
	`{"kind":"ConfigMap","binaryData":{"a":"hunter2"}}`, `{"password":{"value":"hunter2"}}`, `{"credentials":{"user":"a","login":["hunter2"]}}`, `{"tokens":[{"id":"hunter2"}]}`,
	`{"kind":"SecretList","items":[{"data":{"a":"hunter2"}}]}`, `{"env":[{"name":"DB_PASS","value":"hunter2"}]}`, `{"Name":"PASSWORD","Value":"hunter2"}`, `{"variable":"PASSWORD","value":"hunter2"}`, `{"key":"PASSWORD","val":"hunter2"}`,
	`{"args":["sh","-c","login --password 'hunter2'"]}`, `{"command":["curl","-H","Authorization: Digest r=\"hunter2\""]}`,
}

// None of them comes through, as a text, in pieces, as a document, or in the
// annotation of one.
func TestSmuggled(t *testing.T) {
	for _, s := range smuggled {
		wrapped, err := json.Marshal(map[string]any{"data": map[string]any{"file": s}})
		if err != nil {
			t.Fatal(err)
		}
		asText, _ := written(t, s, 5)
		asJSON, _ := JSON([]byte(s))
		asYAML, _ := YAML([]byte(s))
		within, _ := JSON(wrapped)
		for form, got := range map[string]string{"text": asText, "JSON": string(asJSON), "YAML": string(asYAML), "a value": string(within)} {
			if strings.Contains(strings.ToLower(got), "hunter2") {
				t.Errorf("as %s, of %q is left %q", form, s, got)
			}
		}
		if strings.Contains(s, "kept") && !strings.Contains(asText, "kept: yes") {
			t.Errorf("of %q too much is gone: %q", s, asText)
		}
		if again, _ := written(t, asText, 5); again != asText {
			t.Errorf("done twice %q becomes %q", asText, again)
		}
	}
}

// What looks a little like it, and is what an archive is for, stays.
func TestHarmless(t *testing.T) {
	for _, s := range []string{
		"verdict pass, 3 packets passed through the compass", "bypass=on", "passive: yes", "n1: pass", "http://10.0.0.1:4262/metrics and operator@example.com",
		"12: veth0@if4: <BROADCAST> mtu 1500", "spiffe://cluster.local/ns/a/sa/b", "authMode: lease", "author=somebody", "sk-frontend-7d9c8b6f5d-abcde", "unix:///run/portcullis/agent.sock",
		`{"volumes":[{"name":"v","secret":{"secretName":"s","items":[{"key":"k","path":"p"}],"defaultMode":420}}]}`, `{"valueFrom":{"secretKeyRef":{"name":"s","key":"k"}}}`,
		`{"imagePullSecrets":[{"name":"registry"}],"key":"value","kind":"Pod"}`, `{"rules":[{"resources":["secrets"],"verbs":["get"],"resourceNames":["portcullis-issuer"]}]}`,
		`{"serviceAccountToken":{"audience":"portcullis-issuer","expirationSeconds":3600,"path":"token"}}`,
	} {
		if got, n := written(t, s, 1<<20); got != s && !strings.HasPrefix(s, "{") || n != 0 {
			t.Errorf("%q becomes %q, %d removed", s, got, n)
		}
	}
}
