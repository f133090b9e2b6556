package sysdump

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	observerpb "github.com/cilium/cilium/api/v1/observer"
	"portcullis/agent/api"
	"portcullis/observe/archive"
	"portcullis/observe/hubble"
)

var marshal = protojson.MarshalOptions{EmitDefaultValues: true}

// agentParts are what the agent says of itself. Where none answers, the first
// one fails and says why.
func (c *Config) agentParts() []archive.Part {
	ask := func(name string, call func(context.Context, *api.Client) (proto.Message, error)) archive.Part {
		return archive.Part{Name: "agent/" + name, Gather: func(ctx context.Context, out *archive.Files) error {
			client, err := api.Dial(c.Socket)
			if err != nil && name != "status" {
				return archive.NotHere("the agent does not answer: see agent/status")
			}
			if err != nil {
				return err
			}
			defer client.Close()
			m, err := call(ctx, client)
			if err != nil {
				return err
			}
			b, err := marshal.Marshal(m)
			if err != nil {
				return err
			}
			return out.JSON("agent/"+name+".json", json.RawMessage(b))
		}}
	}
	return []archive.Part{
		ask("status", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.Status(ctx, &api.StatusRequest{})
		}),
		ask("endpoints", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListEndpoints(ctx, &api.ListEndpointsRequest{})
		}),
		ask("policies", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListPolicies(ctx, &api.ListPoliciesRequest{})
		}),
		ask("bindings", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListBindings(ctx, &api.ListBindingsRequest{})
		}),
		ask("sessions", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListSessions(ctx, &api.ListSessionsRequest{})
		}),
		ask("identities", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListIdentities(ctx, &api.ListIdentitiesRequest{Reserved: true})
		}),
		ask("names", func(ctx context.Context, a *api.Client) (proto.Message, error) {
			return a.ListNames(ctx, &api.ListNamesRequest{})
		}),
		{Name: "agent/policy-files", Gather: c.policyFiles},
	}
}

// policyFiles are the policies as they were written. Each is read by its
// structure, so that secrets in it are known; comments go.
func (c *Config) policyFiles(ctx context.Context, out *archive.Files) error {
	client, err := api.Dial(c.Socket)
	if err != nil {
		return archive.NotHere("the agent does not answer: see agent/status")
	}
	defer client.Close()
	list, err := client.ListPolicies(ctx, &api.ListPoliciesRequest{Source: true})
	if err != nil {
		return err
	}
	for _, p := range list.GetPolicies() {
		ref := p.GetRef()
		name := fmt.Sprintf("agent/policies/%s_%s_%s.yaml", ref.GetKind(), ref.GetNamespace(), ref.GetName())
		if err := out.YAML(name, []byte(p.GetSource())); err != nil {
			return err
		}
	}
	return nil
}

// flows are the last that the agent keeps, as JSON lines.
func (c *Config) flows(ctx context.Context, out *archive.Files) error {
	if c.HubbleSocket == "" {
		return archive.NotHere("no agent serves flows here (--flows, --hubble-socket)")
	}
	path := c.Agent.path(c.HubbleSocket)
	if _, err := os.Stat(path); err != nil {
		return notHere(err)
	}
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := observerpb.NewObserverClient(conn).GetFlows(ctx, &observerpb.GetFlowsRequest{Number: uint64(c.Flows)})
	if err != nil {
		return err
	}
	return out.Write("flows.jsonl", func(w io.Writer) error {
		p := hubble.Printer{Form: hubble.JSON, Out: w, Err: io.Discard}
		for {
			resp, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				return p.Close()
			}
			if err == nil {
				err = p.Print(resp)
			}
			if err != nil {
				return err
			}
		}
	})
}

// metrics are what Prometheus would be served, and the probes of health.
func (c *Config) metrics(ctx context.Context, out *archive.Files) error {
	if c.MetricsAddress == "" {
		return archive.NotHere("the agent serves none: --metrics-address is not set")
	}
	at, err := netip.ParseAddrPort(c.MetricsAddress)
	host := c.MetricsAddress
	if err == nil && at.Addr().IsUnspecified() {
		host = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), at.Port()).String()
	} else if c.MetricsAddress[0] == ':' {
		host = "127.0.0.1" + c.MetricsAddress
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = c.Agent.inNetwork(func() (err error) {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}}}
	var errs []error
	for _, name := range []string{"metrics", "healthz", "readyz"} {
		errs = append(errs, fetch(ctx, &client, "http://"+host+"/"+name, name+".txt", out))
	}
	return errors.Join(errs...)
}

func fetch(ctx context.Context, client *http.Client, url, name string, out *archive.Files) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := readAll(resp.Body, 8<<20)
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if resp.StatusCode != http.StatusOK {
		fmt.Fprintf(&text, "# %s\n", resp.Status)
	}
	text.Write(body)
	return out.Copy(name, &text)
}

// readAll reads up to a bound.
func readAll(r io.Reader, most int64) ([]byte, error) { return io.ReadAll(io.LimitReader(r, most)) }
