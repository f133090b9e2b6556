// Package observer holds messages of Hubble's published API, generated from
// observer.proto by ../generate.sh. It imports nothing of this module but its
// siblings; nothing runs concurrently.
package observer
