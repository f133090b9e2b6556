package install

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// Why an installation keeps, for as long as it lives, the values of its first day.
const (
	whyTrustDomain = "identities of another trust domain are no longer verified, agents of the two do not believe each other until the last is replaced, and an issuer does not start on the keys of the other one"
	whyMoved       = "agents put the plugin into the new directory, and what they put into the former one stays on every node: no uninstall finds it, and a runtime that reads it starts no pod once the agents are gone"
)

// change is a value of the installation that a release would change.
type change struct{ value, was, where, becomes, why string }

func (c change) String() string {
	return fmt.Sprintf("\n  %s: is %q by %s, would become %q: %s", c.value, c.was, c.where, c.becomes, c.why)
}

// sameInstallation refuses a release that would give what is installed another
// trust domain, or its nodes' CNI another place, the latter unless it is wanted.
// What cannot be known counts as another: nothing is lost by asking.
func (c *Cluster) sameInstallation(ctx context.Context, o Options) (moved []change, err error) {
	agents, err := c.get(ctx, kindNamed("DaemonSet"), agentName)
	if err != nil {
		return nil, err
	}
	changes, err := c.otherDomains(ctx, agents, o.Release.Values.TrustDomain)
	if err != nil {
		return nil, err
	}
	if agents != nil {
		if moved, err = otherPlaces(agents, o.Release); err != nil {
			return nil, err
		}
	}
	flag := ""
	if len(moved) > 0 && !o.Release.Values.CNI.Move {
		changes = append(changes, moved...)
		flag = "; where the nodes' runtime has moved, --set cni.move=true goes on"
	}
	if len(changes) == 0 {
		return moved, nil
	}
	var b strings.Builder
	for _, c := range changes {
		b.WriteString(c.String())
	}
	return nil, fmt.Errorf("nothing was changed: this is not what an upgrade may change:%s\ngive the former values, for those that are not given are the defaults again; or `portcullis uninstall --namespace %s` first%s", b.String(), c.namespace, flag)
}

// otherDomains compares the trust domain with that of the agents' settings, and
// with that of the issuer, whose keys are of it.
func (c *Cluster) otherDomains(ctx context.Context, agents *unstructured.Unstructured, want string) (changes []change, err error) {
	settings, err := c.get(ctx, kindNamed("ConfigMap"), agentName)
	if err != nil {
		return nil, err
	}
	issuer, err := c.get(ctx, kindNamed("Deployment"), issuerName)
	if err != nil {
		return nil, err
	}
	told := map[string]bool{}
	add := func(was, where string) {
		if was != want && !told[was] {
			changes = append(changes, change{"trustDomain", was, where, want, whyTrustDomain})
		}
		told[was] = true
	}
	if settings != nil {
		was, err := domainOf(settings)
		if err != nil {
			return nil, fmt.Errorf("nothing was changed: the agents' trust domain cannot be told, for ConfigMap %s %w: mend it by `kubectl -n %s edit configmap %[1]s`, or `portcullis uninstall` first", agentName, err, c.namespace)
		}
		add(was, "ConfigMap "+agentName)
	}
	if issuer != nil {
		if was := argument(issuer, "issuer", "--trust-domain"); was != "" {
			add(was, "Deployment "+issuerName)
		}
	}
	if agents != nil && len(told) == 0 {
		return nil, fmt.Errorf("nothing was changed: the agents' trust domain cannot be told, for ConfigMap %[2]s is gone and there is no issuer: make their settings again by `kubectl -n %[1]s create configmap %[2]s --from-literal=agent.yaml='trust-domain: DOMAIN'`, or `portcullis uninstall` first", c.namespace, agentName)
	}
	return changes, nil
}

// domainOf is the trust domain in the settings of all agents.
func domainOf(settings *unstructured.Unstructured) (string, error) {
	text, found, err := unstructured.NestedString(settings.Object, "data", "agent.yaml")
	if err != nil || !found {
		return "", errors.New("has no agent.yaml")
	}
	var flags map[string]any
	if err := yaml.Unmarshal([]byte(text), &flags); err != nil {
		return "", fmt.Errorf("has an agent.yaml that is no YAML (%s)", strings.TrimPrefix(err.Error(), "error converting YAML to JSON: "))
	}
	domain, ok := flags["trust-domain"].(string)
	if !ok || domain == "" {
		return "", errors.New("has no trust-domain in its agent.yaml")
	}
	return domain, nil
}

// argument is the value of a flag of a container of an object's pods, others in which
// may have been put there by somebody else; "": it has none.
func argument(o *unstructured.Unstructured, container, flag string) (found string) {
	containers, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "containers")
	for _, c := range containers {
		if m, _ := c.(map[string]any); m["name"] == container {
			args, _, _ := unstructured.NestedStringSlice(m, "args")
			found = flagOf(args, flag)
		}
	}
	return found
}

// flagOf is the value of a flag among arguments, the last one as the command has it: --flag=VALUE,
// as this package writes it, or --flag VALUE, as somebody may have; "": there is none.
func flagOf(args []string, flag string) (value string) {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, flag+"="); ok {
			value = v
		} else if a == flag && i+1 < len(args) {
			value = args[i+1]
		}
	}
	return value
}

// otherPlaces compares the directories of the nodes' CNI with those of the
// agents that are installed. Agents that were given none keep no plugin.
func otherPlaces(agents *unstructured.Unstructured, r Release) (changes []change, err error) {
	installed, err := recordOf(agents, r)
	if err != nil {
		return nil, fmt.Errorf("nothing was changed: %w", err)
	}
	was, want := installed.Release.Values.CNI, r.Values.CNI
	for _, d := range []struct{ value, was, want string }{{"cni.binDir", was.BinDir, want.BinDir}, {"cni.confDir", was.ConfDir, want.ConfDir}} {
		if path.Clean(d.was) != path.Clean(d.want) {
			changes = append(changes, change{d.value, d.was, "DaemonSet " + agentName, d.want, whyMoved})
		}
	}
	return changes, nil
}

// sayLeft says what a move of the CNI has left on the nodes.
func sayLeft(moved []change, say func(string, ...any)) {
	for _, m := range moved {
		what := "portcullis-cni"
		if m.value == "cni.confDir" {
			what = "the plugin's entry in the network configurations"
		}
		say("left on the nodes, where no uninstall looks: %s in %s: take it away when no runtime reads it (docs/upgrade.md)", what, m.was)
	}
}
