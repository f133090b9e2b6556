// Command portcullis is the one binary: the agent, its command line, and the
// lab. This package holds cobra commands only: flags, a call to a package that
// does the work, and the printing of its answer.
//
// Commands take an *Env, so that they are tested without a process; none of
// them calls os.Exit or reads os.Args. A new command is a function
// newXCmd(*Env) *cobra.Command in a file of its own and a line in root.go.
package main
