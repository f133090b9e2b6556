// Package archive writes what a maintainer asks for into one file: a compressed
// tar of parts, each gathered by a function of its own, with a manifest of what
// is there, what is not, and why.
//
//	parts ──Run──> Files ──redact──> held in memory ──commit──> tar.gz ──> File
//	                 one for each part, bounded            manifest.json, errors.txt at last
//
// Whatever is put into a Files goes through package redact: there is no other way
// in. A part that fails, or is not done in its time, ends nothing but itself; what
// it had put in until then is kept, and the manifest says so.
//
// A part that does not end with its context (a read of /proc that hangs) is left
// behind: its goroutine goes on until it returns, and what it puts in then is
// thrown away. All others are waited for. An Archive is safe for concurrent use;
// a Files too. It imports observe/redact, and nothing else of the module.
package archive
