// Package redact removes secrets from what is to be shown to others: private
// keys, tokens, passwords, credentials in URLs and headers, query strings, and
// what Kubernetes keeps in Secrets.
//
// It knows a secret by its form (a PEM block, a JWT, a key in base64, tokens of
// well-known makers) or by the name that stands before it (password, X-Auth-Token,
// client-key-data). What could be one is removed: a reader who misses a harmless
// word loses less than the one whose key is in a bug report. A password that has
// neither form nor name cannot be known for one.
//
//	Writer  streams of lines: logs, listings; a line that is JSON is read as that
//	JSON    one document, by its structure
//	YAML    documents, by their structure; comments go
//	Args    a command line
//
// In the place of a secret stands Removed. Done twice, it changes nothing more.
//
// Pure: no I/O beyond the writer that it is given. A Writer is used by one
// goroutine at a time; the functions are safe for concurrent use. It imports
// go.yaml.in/yaml, and nothing of the module.
package redact
