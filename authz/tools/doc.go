// Package tools says what policies mean for a whole cluster: who may call whom
// (Matrix), why (Trace), and what a change would change (Compare). The cluster
// is a World, read from manifests or made by who knows a running one. Verdicts
// are those of the compiled entries, by authz's evaluator, the same that the
// kernel is tested against; nothing here judges anything by itself.
//
//	manifests --Reader--> World --Judge--> Matrix, Trace, Changes --> text, JSON, HTML
//
// It is pure: bytes and objects in, results out. It imports authz, bpf/abi,
// identity and authz/dialect, whose bounded reader it shares with the parsers of
// policies; those are the caller's to choose. Nothing in it is safe for
// concurrent use.
package tools
