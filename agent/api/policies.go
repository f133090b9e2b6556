package api

import (
	"errors"
	"fmt"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
	"portcullis/authz/dialect/tree"
)

// ParsedPolicy is a policy and the file that it stands in.
type ParsedPolicy struct {
	*authz.Policy
	File string
}

// ParsedGroup is a group of addresses and the file that it stands in.
type ParsedGroup struct {
	*authz.Group
	File string
}

// ParsedNamespace is what is said of a namespace, and the file that says it.
type ParsedNamespace struct {
	*authz.NamespaceObject
	File string
}

// ParsedService is what is said of a service, and the file that says it.
type ParsedService struct {
	*authz.ServiceObject
	File string
}

// ParsedSlice is a part of what stands behind a service, and the file that says it.
type ParsedSlice struct {
	*authz.SliceObject
	File string
}

// Object is what can be imported, stored and deleted by its name: a policy, a
// group of addresses, a namespace's labels, what stands behind a service, or an
// EndpointSlice. One of the five is set.
type Object struct {
	authz.Ref
	File      string
	Source    string // the document, verbatim
	Policy    *authz.Policy
	Group     *authz.Group
	Namespace *authz.NamespaceObject
	Service   *authz.ServiceObject
	Slice     *authz.SliceObject
}

// Parsed is what the files of one import say.
type Parsed struct {
	Policies []ParsedPolicy
	Groups   []ParsedGroup
	Spaces   []ParsedNamespace
	Services []ParsedService
	Slices   []ParsedSlice
	// Not is what can be judged, but not enforced yet.
	Not []*PolicyProblem
}

// Dialects returns the parsers of every kind of policy that there is, and of
// what policies speak of.
func Dialects() []dialect.Dialect {
	return append(cilium.Dialects(), k8s.Dialect, k8s.Namespaces, k8s.Services, k8s.Slices, tree.Dialect)
}

// Parse parses files, in every dialect that there is. Any problem means that
// nothing of them is to be used. Who enforces uses ParsePolicies.
func Parse(files []*PolicyFile) (out Parsed, problems []*PolicyProblem) {
	first := map[authz.Ref]string{}
	for _, f := range files {
		parsed, err := dialect.ParseFile(f.GetName(), f.GetContent(), Dialects()...)
		var found authz.Problems
		switch {
		case errors.As(err, &found):
			problems = append(problems, fromProblems(found)...)
		case err != nil: // not of the file's author, but nothing is known about the file either
			problems = append(problems, &PolicyProblem{File: f.GetName(), Text: err.Error()})
		}
		for _, ref := range parsed.Refs() {
			if other, twice := first[ref]; twice {
				problems = append(problems, &PolicyProblem{File: f.GetName(), Policy: FromRef(ref).Ref(),
					Text: fmt.Sprintf("stands in %s already: keep one of them, or give one another name", other)})
			}
			first[ref] = f.GetName()
		}
		for _, p := range parsed.Policies {
			out.Policies = append(out.Policies, ParsedPolicy{Policy: p, File: f.GetName()})
			out.Not = append(out.Not, fromProblems(p.NotEnforced)...)
		}
		for _, g := range parsed.Groups {
			out.Groups = append(out.Groups, ParsedGroup{Group: g, File: f.GetName()})
		}
		for _, n := range parsed.Namespaces {
			out.Spaces = append(out.Spaces, ParsedNamespace{NamespaceObject: n, File: f.GetName()})
		}
		for _, s := range parsed.Services {
			out.Services = append(out.Services, ParsedService{ServiceObject: s, File: f.GetName()})
		}
		for _, s := range parsed.Slices {
			out.Slices = append(out.Slices, ParsedSlice{SliceObject: s, File: f.GetName()})
		}
	}
	if len(problems) > 0 {
		return Parsed{}, problems
	}
	return out, nil
}

// ParsePolicies parses files and refuses what cannot be enforced yet, as the
// agent's import does.
func ParsePolicies(files []*PolicyFile) (objects []Object, problems []*PolicyProblem) {
	out, problems := Parse(files)
	if problems = append(problems, out.Not...); len(problems) > 0 {
		return nil, problems
	}
	// Policies last: whoever goes through them finds what they speak of before
	// them.
	for _, n := range out.Spaces {
		objects = append(objects, Object{Ref: n.Ref, File: n.File, Source: n.Source, Namespace: n.NamespaceObject})
	}
	for _, s := range out.Services {
		objects = append(objects, Object{Ref: s.Ref, File: s.File, Source: s.Source, Service: s.ServiceObject})
	}
	for _, s := range out.Slices {
		objects = append(objects, Object{Ref: s.Ref, File: s.File, Source: s.Source, Slice: s.SliceObject})
	}
	for _, g := range out.Groups {
		objects = append(objects, Object{Ref: g.Ref, File: g.File, Source: g.Source, Group: g.Group})
	}
	for _, p := range out.Policies {
		objects = append(objects, Object{Ref: p.Ref, File: p.File, Source: p.Source, Policy: p.Policy})
	}
	return objects, nil
}

func fromProblems(problems []authz.Problem) (out []*PolicyProblem) {
	for _, p := range problems {
		out = append(out, &PolicyProblem{File: p.File, Field: p.Path, Text: p.Message, Document: uint32(p.Document), Line: uint32(p.Line)})
	}
	return out
}

// FromRef returns the wire form of a policy reference.
func FromRef(r authz.Ref) *PolicyRef {
	return &PolicyRef{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name}
}

// ToRef returns the policy reference of its wire form.
func ToRef(x *PolicyRef) authz.Ref {
	return authz.Ref{Kind: x.GetKind(), Namespace: x.GetNamespace(), Name: x.GetName()}
}
