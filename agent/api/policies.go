package api

import (
	"errors"
	"fmt"

	"portcullis/authz"
	"portcullis/authz/dialect"
	"portcullis/authz/dialect/cilium"
	"portcullis/authz/dialect/k8s"
)

// ParsedPolicy is a policy and the file that it stands in.
type ParsedPolicy struct {
	*authz.Policy
	File string
}

// ParsePolicies parses the files of one import, in every dialect that the
// agent takes. Any problem means that none of the policies is to be used.
// `policy validate` and the agent's import share it, so what the one takes the
// other does.
func ParsePolicies(files []*PolicyFile) (policies []ParsedPolicy, problems []*PolicyProblem) {
	first := map[authz.Ref]string{}
	for _, f := range files {
		parsed, err := dialect.ParseFile(f.GetName(), f.GetContent(), k8s.Dialect, cilium.Dialect)
		var found authz.Problems
		switch {
		case errors.As(err, &found):
			for _, p := range found {
				problems = append(problems, &PolicyProblem{
					File: p.File, Field: p.Path, Text: p.Message, Document: uint32(p.Document), Line: uint32(p.Line),
				})
			}
		case err != nil: // not of the file's author, but nothing is known about the file either
			problems = append(problems, &PolicyProblem{File: f.GetName(), Text: err.Error()})
		}
		for _, p := range parsed {
			if other, twice := first[p.Ref]; twice {
				problems = append(problems, &PolicyProblem{File: f.GetName(), Policy: FromRef(p.Ref).Ref(),
					Text: fmt.Sprintf("stands in %s already: keep one of them, or give one another name", other)})
			}
			first[p.Ref] = f.GetName()
			policies = append(policies, ParsedPolicy{Policy: p, File: f.GetName()})
		}
	}
	if len(problems) > 0 {
		return nil, problems
	}
	return policies, nil
}

// FromRef returns the wire form of a policy reference.
func FromRef(r authz.Ref) *PolicyRef {
	return &PolicyRef{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name}
}

// ToRef returns the policy reference of its wire form.
func ToRef(x *PolicyRef) authz.Ref {
	return authz.Ref{Kind: x.GetKind(), Namespace: x.GetNamespace(), Name: x.GetName()}
}
