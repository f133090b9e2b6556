// Package flow holds messages of Hubble's published API, generated from
// flow.proto by ../generate.sh. It imports nothing of this module but its
// siblings; nothing runs concurrently.
package flow
