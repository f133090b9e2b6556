package agent

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/authz/l7"
	"portcullis/datapath"
)

// On what an address of a name is admitted, for people.
const (
	onLookup     = "lookup"     // an answer whose lifetime is not over
	onConnection = "connection" // one that lives, or was seen within the grace
	onGrace      = "grace"      // the lifetime has ended just now
)

// namePattern parses what names are meant; empty: all.
func namePattern(s string) (l7.Name, error) {
	s = strings.ToLower(strings.TrimSuffix(s, "."))
	n := l7.Name{Name: s}
	if strings.Contains(s, "*") || s == "" {
		n = l7.Name{Pattern: cmp.Or(s, "*")}
	}
	if err := n.Validate(); err != nil {
		return n, fmt.Errorf("%w: name: %w", errMalformed, err)
	}
	return n, nil
}

// ListNames implements api.AgentServer.
func (s *server) ListNames(ctx context.Context, r *api.ListNamesRequest) (*api.ListNamesResponse, error) {
	meant, err := namePattern(r.Name)
	if err != nil {
		return nil, asStatus(err)
	}
	resp := &api.ListNamesResponse{}
	flows := map[datapath.Pair]int{}
	of := map[*api.LearntAddress][]datapath.Pair{}
	err = s.ask(ctx, func() error {
		resp.Names = s.l.listNames(r.Uid, meant, func(a *api.LearntAddress, p datapath.Pair) {
			flows[p] = 0
			of[a] = append(of[a], p)
		})
		return nil
	})
	if err != nil || len(flows) == 0 {
		return resp, err
	}
	// Beside the loop: it reads a map of many entries.
	if err := s.l.dp.CountFlows(flows); err != nil {
		return nil, asStatus(err)
	}
	for a, pairs := range of {
		for _, p := range pairs {
			a.Connections += uint32(flows[p])
		}
	}
	return resp, nil
}

// listNames tells what endpoints know, and between whom a connection to each
// address would be.
func (l *loop) listNames(uid string, meant l7.Name, between func(*api.LearntAddress, datapath.Pair)) (out []*api.LearntName) {
	now := int64(l.now())
	for _, e := range slices.SortedFunc(maps.Values(l.endpoints), func(a, b *endpoint) int { return cmp.Compare(a.id, b.id) }) {
		if e.book == nil || uid != "" && uid != e.uid.String() {
			continue
		}
		var last *api.LearntName
		for _, x := range e.book.Entries() { // by name
			if !meant.Matches(x.Name) {
				continue
			}
			if last == nil || last.Name != x.Name {
				last = &api.LearntName{Endpoint: e.id, Workload: &api.Workload{Uid: e.uid.String(), Namespace: e.namespace, Name: e.name}, Name: x.Name}
				out = append(out, last)
			}
			a := &api.LearntAddress{Ip: x.IP.String(), Source: onLookup}
			for _, own := range e.ips {
				if own.Is4() == x.IP.Is4() {
					between(a, datapath.Pair{Local: own, Remote: x.IP})
				}
			}
			switch {
			case now < x.Expires:
				a.Ttl = durationpb.New(time.Duration(x.Expires - now))
			case x.Used > 0:
				a.Source = onConnection
			default:
				a.Source = onGrace
			}
			last.Addresses = append(last.Addresses, a)
		}
	}
	return out
}
