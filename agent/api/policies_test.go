package api

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
)

const deny = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: default}
spec:
  podSelector: {}
  policyTypes: [Ingress]
`

func TestParsePolicies(t *testing.T) {
	policies, problems := ParsePolicies([]*PolicyFile{{Name: "a.yaml", Content: []byte(deny)}})
	if len(problems) > 0 || len(policies) != 1 || policies[0].File != "a.yaml" || FromRef(policies[0].Ref).Ref() != "NetworkPolicy/default/deny" {
		t.Fatalf("policies %+v, problems %v", policies, problems)
	}
	if ToRef(FromRef(policies[0].Ref)) != policies[0].Ref {
		t.Error("the reference changes on the wire")
	}
}

func TestParsePoliciesAllOrNone(t *testing.T) {
	policies, problems := ParsePolicies([]*PolicyFile{
		{Name: "a.yaml", Content: []byte(deny)},
		{Name: "b.yaml", Content: []byte(deny)},
		{Name: "c.yaml", Content: []byte(deny + "  shinyNewField: 1\n")},
	})
	if policies != nil {
		t.Errorf("beside problems there are policies: %v", policies)
	}
	if len(problems) != 2 {
		t.Fatalf("want two problems, got %v", problems)
	}
	want := &PolicyProblem{File: "b.yaml", Policy: "NetworkPolicy/default/deny",
		Text: "stands in a.yaml already: keep one of them, or give one another name"}
	if diff := cmp.Diff(want, problems[0], protocmp.Transform()); diff != "" {
		t.Errorf("the policy that stands twice (-want +got):\n%s", diff)
	}
	if p := problems[1]; p.GetFile() != "c.yaml" || p.GetField() != "spec.shinyNewField" || p.GetLine() != 7 || p.GetDocument() != 1 || p.GetText() == "" {
		t.Errorf("the unknown field: %v", p)
	}
}
