// Package peak measures how much memory a process has at the most while it
// reads a file, for tests of parsers: each file is read in a process of its own,
// whose peak the kernel knows. Only tests import it.
package peak
