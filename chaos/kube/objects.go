package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"portcullis/chaos"
	"portcullis/chaos/kube/breaker"
)

type object = map[string]any

// owned marks what is this package's to remove.
const owned = "portcullis-chaos"

const managedBy = "app.kubernetes.io/managed-by"

// namespaceObject is the run's namespace. Where pods that break things are to be
// made, it must admit privileged ones.
func (p *plan) namespaceObject() object {
	labels := object{managedBy: owned}
	for _, f := range p.faults {
		if f.breaks {
			labels["pod-security.kubernetes.io/enforce"] = "privileged"
		}
	}
	return object{"apiVersion": "v1", "kind": "Namespace", "metadata": object{"name": p.Namespace, "labels": labels}}
}

// policies are the rules' manifests. They say nothing of a namespace: kubectl
// puts them into the run's.
func policies() []byte { return []byte(chaos.Policies) }

// talkerPod is a pod that talks, with the arguments of the talking program.
func (w *world) talkerPod(name, is, node string, args ...string) object {
	field := func(name, path string) object {
		return object{"name": name, "valueFrom": object{"fieldRef": object{"fieldPath": path}}}
	}
	return object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "labels": object{"is": is, managedBy: owned}},
		"spec": object{
			"nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 5,
			"automountServiceAccountToken": false, "enableServiceLinks": false,
			"securityContext": object{"runAsNonRoot": true, "runAsUser": 65534, "seccompProfile": object{"type": "RuntimeDefault"}},
			// A node that is cut off from the API server keeps its pods.
			"tolerations": []any{object{"operator": "Exists"}},
			"containers": []any{object{
				"name": "talk", "image": w.image, "imagePullPolicy": "IfNotPresent",
				"command":         append([]string{"/portcullis", "chaos", "talk"}, args...),
				"env":             []any{field("POD_UID", "metadata.uid")},
				"securityContext": object{"allowPrivilegeEscalation": false, "capabilities": object{"drop": []string{"ALL"}}},
			}},
		}}
}

// breakerPod is a pod that breaks something on its node. It ends by itself.
func (w *world) breakerPod(name, node string, o breaker.Options) object {
	args := []string{"/portcullis", "chaos", "break", "--after", o.After.String(), "--for", o.For.String()}
	for _, e := range o.Cut {
		args = append(args, "--cut", e.String())
	}
	if o.Signal != 0 {
		args = append(args, "--signal", strconv.Itoa(int(o.Signal)))
	}
	return object{"apiVersion": "v1", "kind": "Pod",
		"metadata": object{"name": name, "labels": object{managedBy: owned}},
		"spec": object{
			"nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 30,
			"activeDeadlineSeconds": int((o.After + o.For + 2*time.Minute).Seconds()),
			"hostNetwork":           true, "hostPID": true, "automountServiceAccountToken": false,
			"tolerations": []any{object{"operator": "Exists"}},
			"containers": []any{object{"name": "break", "image": w.image, "imagePullPolicy": "IfNotPresent", "command": args,
				"securityContext": object{"privileged": true, "runAsUser": 0}}},
		}}
}

func marshal(objects ...object) []byte {
	b, err := json.Marshal(object{"apiVersion": "v1", "kind": "List", "items": objects})
	if err != nil {
		panic(err) // strings and numbers
	}
	return b
}

// podState is a pod as the API server has it.
type podState struct {
	Metadata struct {
		Name, UID         string
		DeletionTimestamp *string
	}
	Spec   struct{ NodeName string }
	Status struct {
		Phase, Reason, Message string
		Conditions             []struct{ Type, Status string }
		ContainerStatuses      []struct {
			RestartCount int
			State        struct {
				Waiting *struct{ Reason, Message string }
			}
		}
	}
}

func (p *podState) ready() bool {
	if p.Metadata.DeletionTimestamp != nil {
		return false
	}
	for _, c := range p.Status.Conditions {
		if c.Type == "Ready" {
			return c.Status == "True"
		}
	}
	return false
}

// why says why a pod does not run.
func (p *podState) why() string {
	out := []string{p.Status.Phase, p.Status.Reason, p.Status.Message}
	for _, c := range p.Status.ContainerStatuses {
		if c.State.Waiting != nil {
			out = append(out, c.State.Waiting.Reason, c.State.Waiting.Message)
		}
	}
	return strings.Join(strings.Fields(strings.Join(out, " ")), " ")
}

// installation is what is read of the one that is judged.
type installation struct {
	image    string
	evidence string
	ttl      time.Duration
}

// readInstallation reads the DaemonSet of the agents, and their settings.
func readInstallation(daemonSet, configMap []byte) (i installation, err error) {
	var d struct {
		Spec struct {
			Template struct {
				Spec struct {
					Containers []struct{ Name, Image string }
				}
			}
		}
	}
	if err := json.Unmarshal(daemonSet, &d); err != nil {
		return i, fmt.Errorf("the agents' DaemonSet: %w", err)
	}
	for _, c := range d.Spec.Template.Spec.Containers {
		if c.Name == "agent" {
			i.image = c.Image
		}
	}
	if i.image == "" {
		return i, fmt.Errorf("the agents' DaemonSet has no container named agent")
	}
	var m struct{ Data map[string]string }
	if err := json.Unmarshal(configMap, &m); err != nil {
		return i, fmt.Errorf("the agents' settings: %w", err)
	}
	// The agents' defaults: see docs/operations.md.
	i.evidence, i.ttl = "lease", 30*time.Second
	for line := range bytes.Lines([]byte(m.Data["agent.yaml"])) {
		key, value, _ := strings.Cut(string(line), ":")
		value, _, _ = strings.Cut(value, " #")
		switch value = strings.Trim(strings.TrimSpace(value), `"'`); key {
		case "evidence":
			i.evidence = value
		case "ttl":
			if i.ttl, err = time.ParseDuration(value); err != nil {
				return i, fmt.Errorf("the agents' ttl: %w", err)
			}
		}
	}
	return i, nil
}
