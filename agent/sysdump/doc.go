// Package sysdump gathers on a node what a maintainer asks for: what the agent
// says of itself, and what the node shows, whether an agent runs or not.
//
//	Find    whose process the agent is, its command line, its namespaces
//	Parts   what to gather, for an archive.Archive, which bounds it and removes secrets
//
// It reads and changes nothing. What is the agent's own (its files, its network
// namespace) is looked at where the agent is, also from outside of its container.
//
// It imports agent/api, datapath, datapath/doctor, ipcache/journal, observe/hubble
// and observe/archive. Each part is gathered in its own goroutine, which archive
// owns; what enters another network namespace does so on a thread of its own, and
// waits for it.
package sysdump
