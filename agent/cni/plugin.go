package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/datapath"
)

// BinaryName is the name under which the one binary is the plugin, whatever
// its arguments.
const BinaryName = "portcullis-cni"

// Codes of errors that are the plugin's own; those below 100 are CNI's.
const (
	codeAgentDown = 100 // the agent does not answer
	codeRefused   = 101 // the agent, or the node, cannot take the workload
	codeNotWhole  = 102 // CHECK: something does not stand any more
)

// callTime is how long one question to the agent may take, beside the wait in
// quarantine: the programs of a node that starts fifty workloads at a time come
// onto their devices one after the other, at 25 ms each.
const callTime = 20 * time.Second

// Versions of the protocol that the plugin speaks.
var versions = version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")

const about = `Portcullis: the chained CNI plugin. A container runtime calls it, by the CNI protocol: the
command in CNI_COMMAND, the network configuration on the standard input. It stands last in
the list of plugins; see docs/cni.md.`

// Main serves the one command that the environment and the standard input
// name, and returns the exit status. ctx bounds what waits.
func Main(ctx context.Context) int {
	run := func(f func(*call) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error { return serve(ctx, args, f) }
	}
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add: run((*call).add), Del: run((*call).del), Check: run((*call).check), GC: run((*call).gc), Status: run((*call).status),
	}, versions, about)
	if err == nil {
		return 0
	}
	if err := err.Print(); err != nil {
		fmt.Fprintln(os.Stderr, "portcullis-cni: error to standard output:", err)
	}
	return 1
}

// call is one command.
type call struct {
	*skel.CmdArgs
	ctx  context.Context
	conf *conf
	log  *zap.Logger
}

func serve(ctx context.Context, args *skel.CmdArgs, f func(*call) error) error {
	conf, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	log, done := newLog(conf)
	defer done()
	log = log.With(zap.String("command", os.Getenv("CNI_COMMAND")), zap.String("network", conf.Name))
	if args.ContainerID != "" {
		log = log.With(zap.String("container", args.ContainerID), zap.String("device", args.IfName))
	}
	if len(conf.unknown) > 0 {
		log.Warn("the network configuration has keys that this plugin does not know", zap.Strings("keys", conf.unknown))
	}
	began := time.Now()
	err = f(&call{CmdArgs: args, ctx: ctx, conf: conf, log: log})
	log = log.With(zap.Duration("took", time.Since(began)))
	if err != nil {
		log.Error("failed", zap.Error(err))
	} else {
		log.Info("done")
	}
	return err
}

// newLog never fails: a file that cannot be opened is no reason to keep a
// workload from starting, or from ending.
func newLog(c *conf) (log *zap.Logger, done func()) {
	level, levelErr := zapcore.ParseLevel(c.LogLevel)
	if levelErr != nil {
		level = zapcore.WarnLevel
	}
	out, done := os.Stderr, func() {}
	var openErr error
	if c.LogFile != "" {
		f, err := os.OpenFile(c.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
		if openErr = err; err == nil {
			out, done = f, func() { _ = f.Close() } // every line was written already
		}
	}
	encoder := zap.NewProductionEncoderConfig()
	encoder.EncodeTime, encoder.EncodeDuration = zapcore.ISO8601TimeEncoder, zapcore.StringDurationEncoder
	log = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(encoder), zapcore.AddSync(out), level)).Named(BinaryName)
	if err := errors.Join(levelErr, openErr); err != nil {
		log.Warn("log", zap.Error(err))
	}
	return log, done
}

func (c *call) attachment() *api.Attachment {
	return &api.Attachment{Container: c.ContainerID, Ifname: c.IfName, Network: c.conf.Name}
}

// ask asks the agent one question, which may take so long at the most.
func ask[Q, A any](c *call, limit time.Duration, how func(*api.Client, context.Context, *Q, ...grpc.CallOption) (*A, error), question *Q) (*A, error) {
	ctx, cancel := context.WithTimeout(c.ctx, limit)
	defer cancel()
	client, err := api.Dial(c.conf.Socket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	return how(client, ctx, question)
}

// sandbox is what the runtime and the plugins before this one say of the
// workload, and what the kernel does.
func (c *call) sandbox() (who workload, link link, ips []netip.Addr, err error) {
	if ips, err = c.conf.previous(c.IfName); err != nil {
		return who, link, nil, err
	}
	if who, err = c.conf.who(c.CmdArgs); err != nil {
		return who, link, nil, refused(err)
	}
	link, err = findLink(c.Netns, c.IfName)
	return who, link, ips, err
}

// ---- ADD -----------------------------------------------------------------

func (c *call) add() error {
	wait, err := c.conf.wait()
	if err != nil {
		return err
	}
	who, link, ips, err := c.sandbox()
	if err != nil {
		return refused(err)
	}
	req := &api.RegisterWorkloadRequest{Uid: who.uid.String(), Namespace: who.Namespace, Name: who.Name, ServiceAccount: who.ServiceAccount,
		Labels: who.Labels, IdentityByUid: who.byUID, Ips: ipTexts(ips), HostIfname: link.host, HostIfindex: link.ifindex, Mac: link.mac,
		Wait: durationpb.New(wait), Attachment: c.attachment()}
	resp, err := ask(c, callTime+wait, (*api.Client).RegisterWorkload, req)
	if err != nil {
		if unsettled(err) {
			c.takeBack(req.Uid)
		}
		return asError(err)
	}
	if resp.State != "active" {
		// So that the runtime tries again, and IPAM may give it another IP.
		c.takeBack(req.Uid)
		return types.NewError(types.ErrTryAgainLater, fmt.Sprintf("%s/%s is %s after %v, its IPs are not free yet: try again", who.Namespace, who.Name, resp.State,
			resp.Waited.AsDuration().Round(time.Millisecond)), resp.Detail)
	}
	// As it came: nothing was changed, and nothing is lost on the way.
	_, err = os.Stdout.Write(append(slices.Clone(c.conf.PrevResult), '\n'))
	if err != nil {
		c.takeBack(req.Uid) // the runtime takes it for failed
	}
	return err
}

// takeBack ends what an ADD that fails may have registered. If that fails too,
// the endpoint ends with the DEL that a runtime sends then, or with its device.
func (c *call) takeBack(uid string) {
	c.ctx = context.WithoutCancel(c.ctx)
	if _, err := c.deregister(uid, c.attachment()); err != nil {
		c.log.Warn("take the registration back", zap.Error(err))
	}
}

// unsettled reports whether the agent may have registered the workload although
// the call failed.
func unsettled(err error) bool {
	switch status.Code(err) {
	case codes.DeadlineExceeded, codes.Canceled, codes.Unavailable, codes.Internal:
		return true
	}
	return false
}

func (c *call) deregister(uid string, a *api.Attachment) (existed bool, err error) {
	resp, err := ask(c, callTime, (*api.Client).DeregisterWorkload, &api.DeregisterWorkloadRequest{Uid: uid, Attachment: a})
	return resp.GetExisted(), err
}

// ---- DEL -----------------------------------------------------------------

func (c *call) del() error {
	who, err := c.conf.who(c.CmdArgs)
	uid := ""
	if err == nil {
		uid = who.uid.String()
	} // else the attachment names it; a DEL must not fail for want of names
	existed, err := c.deregister(uid, c.attachment())
	switch {
	case err == nil:
		c.log.Debug("deregistered", zap.Bool("existed", existed))
		return nil
	case agentDown(err):
		return c.bury(who, uid != "")
	case status.Code(err) == codes.InvalidArgument:
		// What cannot be named was never registered: ADD was refused for it.
		c.log.Warn("nothing to end", zap.Error(err))
		return nil
	}
	return asError(err)
}

// bury closes the workload's gate while no agent runs. The next agent finds it
// closed, and ends what it was. Without its namespace, the device is gone, and
// with it the gate: the next agent sees that too.
func (c *call) bury(who workload, named bool) error {
	if c.Netns == "" || !named {
		c.log.Warn("no agent runs, and what the runtime says leads to no device: left to the agent's next start")
		return nil
	}
	link, err := findLink(c.Netns, c.IfName)
	if err != nil && gone(err) {
		c.log.Warn("no agent runs, and the workload's device is gone: left to the agent's next start", zap.Error(err))
		return nil
	}
	if err == nil {
		// Whichever addresses it has: the workload may have taken its own from
		// the device.
		err = datapath.TombstoneDevice(c.conf.PinDir, netip.Addr{}, who.uid, link.ifindex)
	}
	if err != nil {
		// The gate may be open: the runtime is to ask again, and must not
		// give the IP back before.
		return types.NewError(codeAgentDown, "the agent does not answer, and the gate could not be closed without it: "+err.Error(), "")
	}
	c.log.Warn("no agent runs: the gate was closed in the kernel", zap.String("hostDevice", link.host))
	return nil
}

// ---- CHECK, GC, STATUS ---------------------------------------------------

func (c *call) check() error {
	who, link, ips, err := c.sandbox()
	if err == nil {
		err = link.has(ips)
	}
	if err != nil {
		return withCode(codeNotWhole, err)
	}
	req := &api.CheckWorkloadRequest{Uid: who.uid.String(), Attachment: c.attachment(), Ips: ipTexts(ips), HostIfname: link.host, HostIfindex: link.ifindex, Mac: link.mac}
	resp, err := ask(c, callTime, (*api.Client).CheckWorkload, req)
	if err != nil {
		return asError(err)
	}
	if len(resp.Problems) > 0 {
		return types.NewError(codeNotWhole, fmt.Sprintf("%s/%s: %s", who.Namespace, who.Name, strings.Join(resp.Problems, "; ")), "")
	}
	return nil
}

// gc ends every endpoint of this network whose attachment is not among the
// valid ones. Those of other networks, and of other callers, are not touched.
func (c *call) gc() error {
	valid, err := c.conf.valid()
	if err != nil {
		return err
	}
	list, err := ask(c, callTime, (*api.Client).ListEndpoints, &api.ListEndpointsRequest{})
	if err != nil {
		return asError(err)
	}
	var errs []error
	for _, e := range list.Endpoints {
		a := e.GetAttachment()
		if a == nil || a.Network != c.conf.Name || slices.Contains(valid, types.GCAttachment{ContainerID: a.Container, IfName: a.Ifname}) {
			continue
		}
		if _, err := c.deregister(e.Workload.GetUid(), a); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", a.Container, err))
			continue
		}
		c.log.Warn("ended an endpoint that the runtime does not know", zap.String("container", a.Container), zap.String("workload", e.Workload.GetNamespace()+"/"+e.Workload.GetName()))
	}
	if err := errors.Join(errs...); err != nil {
		return asError(err)
	}
	return nil
}

func (c *call) status() error {
	wait, err := c.conf.wait()
	if err != nil {
		return err
	}
	s, err := ask(c, callTime, (*api.Client).Status, &api.StatusRequest{})
	switch {
	case err != nil:
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	case s.StartupWait.AsDuration() > wait:
		return types.NewError(types.ErrPluginNotAvailable, fmt.Sprintf("no IP is given to a workload for another %v: leases of before the agent's start may be alive",
			s.StartupWait.AsDuration().Round(time.Second)), "")
	case !s.Healthy:
		return types.NewError(types.ErrLimitedConnectivity, strings.Join(s.Problems, "; "), "")
	}
	return nil
}

// ---- errors ----------------------------------------------------------------

// agentDown reports whether no agent serves the socket: none is there, or it is
// stopping. One that hangs, or that may not be asked, is not down.
func agentDown(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || status.Code(err) == codes.Unavailable
}

func refused(err error) error { return withCode(codeRefused, err) }

// withCode gives an error a code that has none.
func withCode(code uint, err error) error {
	if has := (*types.Error)(nil); errors.As(err, &has) {
		return err
	}
	return types.NewError(code, err.Error(), "")
}

// asError gives an error of a call to the agent its code.
func asError(err error) error {
	var unreachable *api.UnreachableError
	switch {
	case errors.As(err, &unreachable):
		return types.NewError(codeAgentDown, unreachable.Error(), "no workload starts without the agent")
	case unsettled(err) && status.Code(err) != codes.Internal: // that is an answer
		return types.NewError(codeAgentDown, "the agent does not answer: "+status.Convert(err).Message(), "")
	case status.Code(err) == codes.ResourceExhausted, status.Code(err) == codes.Aborted:
		return types.NewError(types.ErrTryAgainLater, status.Convert(err).Message(), "")
	}
	return types.NewError(codeRefused, status.Convert(err).Message(), "")
}
