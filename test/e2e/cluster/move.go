package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
)

// spare is a second IPv4 address of the node, that Readdress gives it; its kubelet's
// certificate has it too.
func (n Node) spare() netip.Addr {
	a := n.IP4.As4()
	a[3] += 100
	return netip.AddrFrom4(a)
}

func (c *Cluster) nodeNamed(name string) (Node, error) {
	for _, n := range c.Nodes() {
		if n.Name == name {
			return n, nil
		}
	}
	return Node{}, fmt.Errorf("no node %s", name)
}

// Readdress gives a node another IPv4 address, as a DHCP server does: its kubelet is
// started with that, and the others' routes to its pods lead there. What the
// plan says of it, Nodes too, stays as it was. It returns the new address.
func (c *Cluster) Readdress(ctx context.Context, node string) (netip.Addr, error) {
	n, err := c.nodeNamed(node)
	if err != nil {
		return netip.Addr{}, err
	}
	to := n.spare()
	if err := c.ip(ctx, node, "addr", "add", to.String()+"/24", "dev", "eth0"); err != nil {
		return to, err
	}
	// Its primary goes, and takes its default route along.
	if err := c.ip(ctx, node, "addr", "del", n.IP4.String()+"/24", "dev", "eth0"); err != nil {
		return to, err
	}
	errs := []error{}
	if err := c.ip(ctx, node, "addr", "replace", to.String()+"/24", "dev", "eth0"); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, c.ip(ctx, node, "route", "replace", "default", "via", controlIP4))
	for _, o := range c.Nodes() {
		if o.Name != node {
			errs = append(errs, c.ip(ctx, o.Name, "route", "replace", n.Pods4.String(), "via", to.String()), c.ip(ctx, node, "route", "replace", o.Pods4.String(), "via", o.IP4.String()))
		}
	}
	moved := n
	moved.IP4 = to
	return to, errors.Join(append(errs, c.restartKubelet(moved))...)
}

// Rerange gives a node other ranges of pods, as one has that was removed from the
// cluster and added again: the network configuration of its pods, and the routes
// of the others. The Node object is the caller's, and so are its pods. Its kubelet
// ends with it, until StartKubelet.
func (c *Cluster) Rerange(ctx context.Context, node string, pods4, pods6 netip.Prefix) error {
	n, err := c.nodeNamed(node)
	if err != nil {
		return err
	}
	if err := c.stopKubelet(node); err != nil {
		return err
	}
	const file = "/etc/cni/net.d/10-pods.conflist"
	text, err := c.Exec(ctx, node, "cat", file)
	if err != nil {
		return err
	}
	var list map[string]any
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		return err
	}
	first := list["plugins"].([]any)[0].(map[string]any)
	first["ipam"].(map[string]any)["ranges"] = []any{[]any{map[string]any{"subnet": pods4.String()}}, []any{map[string]any{"subnet": pods6.String()}}}
	anew, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return err
	}
	_, err = c.Exec(ctx, node, "busybox", "sh", "-c", `printf '%s' "$0" >`+file, string(anew))
	errs := []error{err}
	for _, o := range c.Nodes() {
		if o.Name != node {
			errs = append(errs, c.ip(ctx, o.Name, "route", "del", n.Pods4.String()), c.ip(ctx, o.Name, "route", "replace", pods4.String(), "via", n.IP4.String()),
				c.ip(ctx, o.Name, "-6", "route", "del", n.Pods6.String()), c.ip(ctx, o.Name, "-6", "route", "replace", pods6.String(), "via", n.IP6.String()))
		}
	}
	return errors.Join(errs...)
}

func (c *Cluster) ip(ctx context.Context, node string, args ...string) error {
	_, err := c.Exec(ctx, node, append([]string{"ip"}, args...)...)
	return err
}

func (c *Cluster) stopKubelet(node string) error {
	_, _, err := ask(c.plan.path("nodes", node, "node.sock"), request{Op: "kill", Name: "kubelet", Signal: int(syscall.SIGTERM)})
	return err
}

// StartKubelet starts the kubelet of a node after Rerange.
func (c *Cluster) StartKubelet(node string) error {
	_, _, err := ask(c.plan.path("nodes", node, "node.sock"), request{Op: "start", Name: "kubelet"})
	return err
}

// restartKubelet starts a node's kubelet with the addresses of n.
func (c *Cluster) restartKubelet(n Node) error {
	if err := c.stopKubelet(n.Name); err != nil {
		return err
	}
	kubelet := nodeProcesses(c.plan, n)[0]
	_, _, err := ask(c.plan.path("nodes", n.Name, "node.sock"), request{Op: "start", Name: "kubelet", Process: &kubelet})
	return err
}
