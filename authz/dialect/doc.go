// Package dialect is what the parsers of policy files share: a file is split
// into documents, a document becomes a tree of values that know their line and
// their path, and a field that no parser has asked for is a problem, never
// ignored: a skipped field is a hole.
//
// The parsers are its sub-packages, one per dialect; who reads files passes
// those that it wants to ParseFile. It is pure, has no state, and imports
// authz and the YAML reader only. Input is hostile: size, number of values,
// depth and alias expansion are bounded before memory is spent.
package dialect
