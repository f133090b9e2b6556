package hubble

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"portcullis/bpf/abi"
	"portcullis/identity"
	"portcullis/observe/flow"
)

// Extra are conditions beside Hubble's filters, all of which a flow must meet:
// they travel in a request's extension, as a google.protobuf.Struct of lists of
// text (evidence, reason, process) and of text (olderThan). The zero Extra is
// met by every flow.
type Extra struct {
	Evidence  []identity.Evidence // of the peer's binding
	Reasons   []abi.Reason        // of a drop
	Processes []string            // patterns (path.Match) of the binary, or of its last element
	OlderThan time.Duration       // the peer's binding is older; 0: any
}

// Match reports whether the record meets the conditions.
func (x *Extra) Match(r *flow.Record) bool {
	return x == nil ||
		(len(x.Evidence) == 0 || slices.Contains(x.Evidence, r.Evidence)) &&
			(len(x.Reasons) == 0 || slices.Contains(x.Reasons, r.Reason)) &&
			(x.OlderThan == 0 || r.Stamp != 0 && r.BindingAge > x.OlderThan) &&
			(len(x.Processes) == 0 || r.Process != nil && slices.ContainsFunc(x.Processes, func(p string) bool {
				whole, _ := path.Match(p, r.Process.Binary)
				last, _ := path.Match(p, path.Base(r.Process.Binary))
				return whole || last
			}))
}

// Extension returns the conditions as a request's extension; nil for none.
func (x Extra) Extension() (*anypb.Any, error) {
	fields := map[string]any{}
	list := func(key string, n int, of func(int) string) {
		var words []any
		for i := range n {
			words = append(words, of(i))
		}
		if n > 0 {
			fields[key] = words
		}
	}
	list("evidence", len(x.Evidence), func(i int) string { return x.Evidence[i].String() })
	list("reason", len(x.Reasons), func(i int) string { return x.Reasons[i].String() })
	list("process", len(x.Processes), func(i int) string { return x.Processes[i] })
	if x.OlderThan != 0 {
		fields["olderThan"] = seconds(x.OlderThan)
	}
	if len(fields) == 0 {
		return nil, nil
	}
	s, err := structpb.NewStruct(fields)
	if err != nil {
		return nil, err
	}
	return anypb.New(s)
}

// extraOf reads a request's extension. What it does not know is an error: a
// condition is never ignored.
func extraOf(a *anypb.Any) (*Extra, error) {
	if a == nil {
		return nil, nil
	}
	var s structpb.Struct
	if err := a.UnmarshalTo(&s); err != nil {
		return nil, fmt.Errorf("the request's extension: %w", err)
	}
	x := &Extra{}
	var errs []error
	for key, v := range s.Fields {
		var words []string
		for _, w := range v.GetListValue().GetValues() {
			words = append(words, w.GetStringValue())
		}
		switch key {
		case "evidence":
			x.Evidence = parsed(words, flow.ParseEvidence, &errs)
		case "reason":
			x.Reasons = parsed(words, flow.ParseReason, &errs)
		case "process":
			x.Processes = words
			for _, w := range words {
				if _, err := path.Match(w, ""); err != nil {
					errs = append(errs, fmt.Errorf("process %q: %w", w, err))
				}
			}
		case "olderThan":
			d, err := time.ParseDuration(v.GetStringValue())
			x.OlderThan, errs = d, append(errs, err)
		default:
			errs = append(errs, fmt.Errorf("the request's extension has %q, which this version does not know", key))
		}
		if key != "olderThan" && len(words) == 0 {
			errs = append(errs, fmt.Errorf("the request's extension: %q names nothing", key))
		}
	}
	return x, errors.Join(errs...)
}

func parsed[T any](words []string, parse func(string) (T, error), errs *[]error) (out []T) {
	for _, w := range words {
		v, err := parse(w)
		out, *errs = append(out, v), append(*errs, err)
	}
	return out
}
