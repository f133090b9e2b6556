package authz

// NamespaceObject is what is said of a namespace: its labels. It becomes known
// by Repository.SetNamespaceLabels.
type NamespaceObject struct {
	Ref
	UID    string // of the object in its API server; may be empty
	Source string // the document, verbatim
	Labels map[string]string
}
