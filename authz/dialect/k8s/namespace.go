package k8s

import (
	"portcullis/authz"
	"portcullis/authz/dialect"
)

// NamespaceKind is the kind of the objects that say what labels a namespace has.
const NamespaceKind = "Namespace"

// nameLabel is a namespace's name, as the API server sees to.
const nameLabel = "kubernetes.io/metadata.name"

// Namespaces is the dialect of Namespace objects. Of one only its name and labels
// say something to policy.
var Namespaces = dialect.Dialect{APIVersion: "v1", Kind: NamespaceKind, Parse: parseNamespace}

func parseNamespace(doc *dialect.Document) (dialect.Result, []authz.Problem) {
	m := doc.ClusterMeta(NamespaceKind)
	n := &authz.NamespaceObject{Ref: m.Ref, UID: m.UID, Source: doc.Source, Labels: m.Labels}
	if n.Labels == nil {
		n.Labels = map[string]string{} // said to have none: they are known
	}
	doc.Object(dialect.Fields{"spec": dialect.Accept})
	if metadata := doc.Root().Field("metadata"); m.Name != "" {
		metadata.Field("name").IsNamespace(m.Name)
		if says, there := m.Labels[nameLabel]; there && says != m.Name {
			metadata.Field("labels").Field(nameLabel).Refuse("%q is not the namespace's name: the label always is, so leave it out", says)
		}
	}
	if bad := doc.Problems(); len(bad) > 0 {
		return dialect.Result{}, bad
	}
	return dialect.Result{Namespaces: []*authz.NamespaceObject{n}}, nil
}
