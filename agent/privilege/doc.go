// Package privilege gives up the capabilities (capabilities(7)) that a process does
// not need, for good: it takes them out of the bounding set, too, and executes the
// program again, so that no thread has them.
package privilege
