// Package issue is `portcullis issuer`: it joins identity/issuer, which decides
// and signs, with agent/kube, by which it reviews tokens and keeps its Secret
// and its ConfigMap.
//
// It may import both. Run has one goroutine for each of the two parts of
// identity/issuer; nothing else is concurrent.
package issue
