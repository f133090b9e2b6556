package install

import (
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func layer(t *testing.T, text string) Layer {
	t.Helper()
	l, err := FileLayer("my.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func set(t *testing.T, text string) Layer {
	t.Helper()
	l, err := SetLayer(text)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestMergeLaysLayersOverDefaults(t *testing.T) {
	got, err := Merge(
		layer(t, "image: {repository: registry.example.com:5000/portcullis}\nconfig: {ttl: 60s, log-level: debug, heartbeat: null}\nagent: {tolerations: [], nodeSelector: {a: b, c: d}}\n"),
		layer(t, "agent: {nodeSelector: {a: null}, resources: {limits: {memory: null, cpu: 2}}}"),
		set(t, "image.tag=1.10"), set(t, "issuer.replicas=3"), set(t, "config.ttl=90s"), set(t, "agent.maxUnavailable=20%"), set(t, "metrics.enabled=true"))
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Image.Repository, want.Image.Tag = "registry.example.com:5000/portcullis", "1.10"
	want.Config = map[string]any{"ttl": "90s", "log-level": "debug", "reuse-margin": "1s"}
	want.Agent.Tolerations = []map[string]any{}
	want.Agent.NodeSelector = map[string]any{"c": "d"}
	want.Agent.Resources = map[string]any{"limits": map[string]any{"cpu": 2.0}, "requests": want.Agent.Resources["requests"]}
	want.Agent.MaxUnavailable = "20%"
	want.Issuer.Replicas = 3
	want.Metrics.Enabled = true
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	again, err := Merge()
	if err != nil {
		t.Fatal(err)
	}
	want = Default()
	want.Agent.MaxUnavailable = float64(1) // as JSON has it
	if d := cmp.Diff(want, again); d != "" {
		t.Errorf("the defaults were changed: %s", d)
	}
}

// Every error says which value, what is wrong and what is taken.
func TestMergeRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"agent: {resurces: {}}":                         "my.yaml: agent.resurces: there is no such value: want agent.maxUnavailable, ",
		"trust_domain: a.example":                       "trust_domain: there is no such value: did you mean trustDomain?",
		"issuer: {replicas: many}":                      "issuer.replicas: many: want a number from 1 to 9",
		"issuer: {replicas: 1.5}":                       "issuer.replicas: 1.5: want a number from 1 to 9",
		"image: {tag: 1.10}":                            "image.tag: 1.1: want a text: put it in quotes",
		"image: {pullPolicy: Sometimes}":                `image.pullPolicy: "Sometimes": want one of Always, IfNotPresent, Never`,
		"image: {repository: 'x:y'}":                    "image.repository: ",
		"image: portcullis":                             "image: portcullis: want keys and values",
		"image: null":                                   "image: has no value",
		"cni: {binDir: opt/cni/bin}":                    `cni.binDir: "opt/cni/bin" does not match`,
		"metrics: {enabled: 'yes'}":                     "metrics.enabled: yes: want true or false",
		"metrics: {port: 70000}":                        "metrics.port: 70000: want a number from 1 to 65535",
		"agent: {tolerations: {}}":                      "agent.tolerations: map[]: want a list",
		"agent: {tolerations: [x]}":                     "agent.tolerations: [x]: want a list",
		"agent: {tolerations: [{opertor: x}]}":          `agent.tolerations: [map[opertor:x]]: `,
		"agent: {tolerations: [{key: a, value: true}]}": `agent.tolerations: [map[key:a value:true]]: cannot unmarshal bool into`,
		"agent: {resources: {limits: {memory: lots}}}":  "agent.resources: map[limits:map[memory:lots]]: quantities must match the regular expression",
		"relay: {resources: {memory: 1Gi}}":             `relay.resources: map[memory:1Gi]: unknown field "memory"`,
		"issuer: {nodeSelector: {a: true}}":             "issuer.nodeSelector.a: true: want a text: put it in quotes",
		"image: {pullSecrets: [{nam: x}]}":              `image.pullSecrets: [map[nam:x]]: unknown field "nam"`,
		"agent: {maxUnavailable: some}":                 "agent.maxUnavailable: some: want a number from 1 on, or a share",
		"agent: {maxUnavailable: 0}":                    "agent.maxUnavailable: 0: want a number from 1 on, or a share",
		"config: [ttl]":                                 "config: [ttl]: want keys and values",
		"config: {trust-domain: x}":                     "config.trust-domain: is not set here: trustDomain",
		"config: {metrics-address: ':1'}":               "config.metrics-address: is not set here: metrics.enabled",
		"trustDomain: spiffe://x":                       "trustDomain: ",
		"spire: {socketPath: run/agent.sock}":           "spire.socketPath: ",
		"tolerations: []":                               "tolerations: there is no such value: did you mean issuer.tolerations or agent.tolerations?",
		"imagePullSecrets: []":                          "imagePullSecrets: there is no such value: did you mean image.pullSecrets?",
		"agent: {node_selector: {}}":                    "agent.node_selector: there is no such value: did you mean agent.nodeSelector?",
		"image: {digest: 'sha256:12'}":                  "image.digest: ",
		"image: {repository: 'a\"b'}":                   "image.repository: ",
		"agent: {maxUnavailable: 200%}":                 "agent.maxUnavailable: 200%: want a number",
		"agent: {priorityClassName: 'a: b'}":            "agent.priorityClassName: ",
	} {
		_, err := Merge(layer(t, text))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", text, err, want)
		}
	}
	_, err := Merge(layer(t, "x: 1\ny: 2"), set(t, "image.pullPolicy=No"))
	if err == nil || strings.Count(err.Error(), "\n") != 2 || !strings.Contains(err.Error(), "--set image.pullPolicy: ") {
		t.Errorf("not everything is reported: %v", err)
	}
	for _, text := range []string{"a: 1\na: 2", "[1]", "text", "a: [", "\xff"} {
		if l, err := FileLayer("f", []byte(text)); err == nil {
			t.Errorf("%q: %v", text, l)
		}
	}
	for _, text := range []string{"image.tag", "=x", "a..b=1", "issuer.replicas={"} {
		if l, err := SetLayer(text); err == nil {
			t.Errorf("%q: %v", text, l)
		}
	}
}

// What a struct may hold must be what checkField knows.
func TestEveryValueIsChecked(t *testing.T) {
	var walk func(t *testing.T, at string, typ reflect.Type)
	walk = func(t *testing.T, at string, typ reflect.Type) {
		for f := range fields(typ) {
			name := at + f.Tag.Get("json")
			if f.Type.Kind() == reflect.Struct {
				walk(t, name+".", f.Type)
				continue
			}
			wrong := any("wrong")
			switch f.Type.Kind() {
			case reflect.String:
				wrong = true
			case reflect.Int:
				wrong = float64(bound(f) + 1)
			}
			if errs := checkField(name, f, wrong); len(errs) != 1 {
				t.Errorf("%s takes %v: %v", name, wrong, errs)
			}
		}
	}
	walk(t, "", reflect.TypeFor[Values]())
}

func bound(f reflect.StructField) int { _, high := bounds(f); return high }
