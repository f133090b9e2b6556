package cni

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"portcullis/agent/api"
	"portcullis/identity"
)

// Defaults of the network configuration.
const (
	defaultPinDir  = "/sys/fs/bpf/portcullis"
	defaultAddWait = 3 * time.Second
	maxAddWait     = time.Minute // runtimes give up on a plugin after some minutes
)

// conf is the plugin's part of a network configuration.
type conf struct {
	CNIVersion string `json:"cniVersion"`
	Name       string `json:"name"`
	Type       string `json:"type"`

	Socket   string `json:"socket"`   // of the agent
	PinDir   string `json:"pinDir"`   // of the agent, for DEL while it is down
	AddWait  string `json:"addWait"`  // how long ADD waits in quarantine, as "3s": see wait
	LogFile  string `json:"logFile"`  // empty: the standard error
	LogLevel string `json:"logLevel"` // debug, info, warn, error

	Args struct {
		Portcullis *person `json:"portcullis"`
	} `json:"args"`
	RuntimeConfig struct {
		Portcullis *person `json:"portcullis"`
	} `json:"runtimeConfig"`

	PrevResult       json.RawMessage      `json:"prevResult"`
	ValidAttachments []types.GCAttachment `json:"cni.dev/valid-attachments"`
	// The same under the name that runtimes of CNI 1.1's first days give it.
	Attachments []types.GCAttachment `json:"cni.dev/attachments"`

	told    map[string]json.RawMessage // everything in it, by key
	unknown []string                   // keys that are neither the plugin's nor CNI's
}

// person says who a workload is, where no Kubernetes does.
type person struct {
	UID            string            `json:"uid"`
	Namespace      string            `json:"namespace"`
	Name           string            `json:"name"`
	ServiceAccount string            `json:"serviceAccount"`
	Labels         map[string]string `json:"labels"`
}

// known are the keys of a configuration that are no mistake.
var known = []string{"cniVersion", "cniVersions", "name", "type", "socket", "pinDir", "addWait", "logFile", "logLevel", "args", "runtimeConfig",
	"capabilities", "prevResult", "ipam", "dns", "ipMasq", "disableCheck", "disableGC", "loadOnlyInlinedPlugins"}

// parseConf reads the configuration that a runtime gives on the standard input.
func parseConf(stdin []byte) (*conf, error) {
	c := &conf{Socket: api.DefaultSocket, PinDir: defaultPinDir, LogLevel: "warn"}
	if err := json.Unmarshal(stdin, c); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration: "+err.Error(), "")
	}
	if err := json.Unmarshal(stdin, &c.told); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "network configuration: "+err.Error(), "")
	}
	for _, key := range slices.Sorted(maps.Keys(c.told)) {
		if !slices.Contains(known, key) && !strings.HasPrefix(key, "cni.dev/") {
			c.unknown = append(c.unknown, key)
		}
	}
	return c, nil
}

// wait is how long ADD waits in quarantine. Only who waits asks: a DEL must not
// fail for it.
func (c *conf) wait() (time.Duration, error) {
	if c.AddWait == "" {
		return defaultAddWait, nil
	}
	d, err := time.ParseDuration(c.AddWait)
	if err != nil || d < 0 || d > maxAddWait {
		return 0, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("addWait %q: want a duration from 0s to %v, e.g. \"3s\"", c.AddWait, maxAddWait), "")
	}
	return d, nil
}

// valid returns the attachments that a runtime still knows, for GC. That it does
// not say is not that there are none.
func (c *conf) valid() ([]types.GCAttachment, error) {
	for _, said := range []struct {
		key  string
		list []types.GCAttachment
	}{{"cni.dev/valid-attachments", c.ValidAttachments}, {"cni.dev/attachments", c.Attachments}} {
		if _, told := c.told[said.key]; told {
			return said.list, nil
		}
	}
	return nil, types.NewError(types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments: the runtime does not say which attachments it still knows: nothing was ended", "")
}

// workload is who a command is about.
type workload struct {
	person
	uid identity.UID
	// byUID: nobody here says what labels and service account it has.
	byUID bool
}

// errNoUID: the runtime named a pod, but not by what names it for ever.
var errNoUID = errors.New("the runtime did not pass K8S_POD_UID in CNI_ARGS, by which alone the agent can find out who the pod is")

// who joins what the runtime says of the workload with what the configuration
// does. Names and UID are rather the runtime's; labels and service account the
// configuration's, for a runtime has none.
func (c *conf) who(args *skel.CmdArgs) (w workload, err error) {
	k8s, err := parseArgs(args.Args)
	if err != nil {
		return w, err
	}
	p := c.RuntimeConfig.Portcullis
	if p == nil {
		p = c.Args.Portcullis
	}
	if w.byUID = p == nil; !w.byUID {
		w.person = *p
	}
	for key, to := range map[string]*string{"K8S_POD_UID": &w.UID, "K8S_POD_NAMESPACE": &w.Namespace, "K8S_POD_NAME": &w.Name} {
		if k8s[key] != "" {
			*to = k8s[key]
		}
	}
	if w.Namespace == "" {
		w.Namespace = "default"
	}
	if w.Name == "" {
		w.Name = args.ContainerID
	}
	switch {
	case w.UID != "":
		w.uid, err = parseUID(w.UID)
	case w.byUID:
		err = errNoUID
	default:
		w.uid = madeUID(c.Name, args.ContainerID, args.IfName)
	}
	return w, err
}

// parseUID also takes the UIDs of the kubelet's static pods, which are written
// without hyphens.
func parseUID(s string) (identity.UID, error) {
	if len(s) == 32 {
		s = s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
	}
	uid, err := identity.ParseUID(strings.ToLower(s))
	if err != nil {
		return uid, fmt.Errorf("uid of the workload: %w", err)
	}
	return uid, nil
}

// madeUID names a workload that has no UID by its attachment: container ids are
// not used again. It is the same in ADD and in DEL.
func madeUID(network, container, ifname string) (uid identity.UID) {
	sum := sha256.Sum256([]byte("portcullis-cni\x00" + network + "\x00" + container + "\x00" + ifname))
	copy(uid[:], sum[:])
	uid[6] = uid[6]&0x0f | 0x80 // version 8 (RFC 9562): made in a way of one's own
	uid[8] = uid[8]&0x3f | 0x80
	return uid
}

// parseArgs reads CNI_ARGS: K=V;K=V.
func parseArgs(s string) (map[string]string, error) {
	out := map[string]string{}
	for _, pair := range strings.Split(s, ";") {
		if pair == "" {
			continue
		}
		k, v, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: %q: want KEY=VALUE pairs with semicolons between them", pair), "")
		}
		out[k] = v
	}
	return out, nil
}

// result is what the plugins before this one made. All versions of the
// protocol that the plugin speaks agree on these fields.
type result struct {
	IPs []struct {
		Interface *int   `json:"interface"`
		Address   string `json:"address"`
	} `json:"ips"`
	Interfaces []struct {
		Name    string `json:"name"`
		Sandbox string `json:"sandbox"`
	} `json:"interfaces"`
}

// previous returns the addresses that a result gives to a device in a sandbox.
func (c *conf) previous(ifname string) ([]netip.Addr, error) {
	if len(c.PrevResult) == 0 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, "no prevResult: portcullis-cni is a chained plugin and must stand last in its list", "")
	}
	var r result
	if err := json.Unmarshal(c.PrevResult, &r); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, "prevResult: "+err.Error(), "")
	}
	var ips []netip.Addr
	for _, ip := range r.IPs {
		if i := ip.Interface; i != nil && *i >= 0 && *i < len(r.Interfaces) {
			if of := r.Interfaces[*i]; of.Sandbox == "" || of.Name != ifname {
				continue
			}
		}
		p, err := netip.ParsePrefix(ip.Address)
		if err != nil {
			return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: ips: %q: %v", ip.Address, err), "")
		}
		ips = append(ips, p.Addr().Unmap())
	}
	if len(ips) == 0 {
		return nil, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("prevResult gives %s no address: a plugin before this one must", ifname), "")
	}
	return ips, nil
}

// ipTexts formats addresses for the agent.
func ipTexts(ips []netip.Addr) (out []string) {
	for _, ip := range ips {
		out = append(out, ip.String())
	}
	return out
}
