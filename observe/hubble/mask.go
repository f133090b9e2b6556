package hubble

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	flowpb "github.com/cilium/cilium/api/v1/flow"
)

// Mask says which fields of a flow are sent. The nil Mask: all.
type Mask struct{ root *maskNode }

// maskNode is a field's part of a mask; without children it is taken whole.
type maskNode struct {
	fields map[protoreflect.FieldDescriptor]*maskNode
}

// NewMask compiles a field mask. An empty one is nil. A path that a flow does
// not have is an error that names it.
func NewMask(m *fieldmaskpb.FieldMask) (*Mask, error) {
	if len(m.GetPaths()) == 0 {
		return nil, nil
	}
	root := &maskNode{}
	for _, path := range slices.Sorted(slices.Values(m.GetPaths())) { // a field before what is in it
		if _, err := fieldmaskpb.New(&flowpb.Flow{}, path); err != nil {
			return nil, fmt.Errorf("field mask: a flow has no field %q", path)
		}
		root.add((&flowpb.Flow{}).ProtoReflect().Descriptor(), strings.Split(path, "."))
	}
	return &Mask{root}, nil
}

func (n *maskNode) add(desc protoreflect.MessageDescriptor, path []string) {
	fd := desc.Fields().ByName(protoreflect.Name(path[0]))
	child, known := n.fields[fd]
	if !known {
		child = &maskNode{}
		if n.fields == nil {
			n.fields = map[protoreflect.FieldDescriptor]*maskNode{}
		}
		n.fields[fd] = child
	}
	if len(path) == 1 || known && child.fields == nil {
		child.fields = nil // it is taken whole
		return
	}
	child.add(fd.Message(), path[1:])
}

// Apply returns the flow with the fields of the mask only. It shares what both
// have.
func (m *Mask) Apply(f *flowpb.Flow) *flowpb.Flow {
	if m == nil {
		return f
	}
	out := &flowpb.Flow{}
	m.root.copy(out.ProtoReflect(), f.ProtoReflect())
	return out
}

func (n *maskNode) copy(to, from protoreflect.Message) {
	for fd, child := range n.fields {
		if !from.Has(fd) {
			continue
		}
		if child.fields == nil {
			to.Set(fd, from.Get(fd))
			continue
		}
		child.copy(to.Mutable(fd).Message(), from.Get(fd).Message())
	}
}

// shallow returns a copy of a flow that shares what it points to.
func shallow(f *flowpb.Flow) *flowpb.Flow {
	out := &flowpb.Flow{}
	copyFields(out, f)
	return out
}

// copyFields copies the fields of a message; what they point to is shared.
func copyFields(to, from proto.Message) {
	t := to.ProtoReflect()
	from.ProtoReflect().Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		t.Set(fd, v)
		return true
	})
}
