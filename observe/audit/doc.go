// Package audit writes the confirmation log (I6): one JSON line for each grant,
// refusal, revocation, quarantine, release and renewal gap.
//
// A line has these fields; what is empty is left out:
//
//	time        RFC 3339, UTC, nanoseconds: when the line was written
//	node        whose agent wrote it
//	kind        lease.LogKind
//	peer        the other agent
//	ip          whose binding it is about
//	generation  decimal, as a string: many readers keep 53 bits of a number
//	uid         of the workload
//	identity    {trustDomain, namespace, serviceAccount, labels} or {reserved}
//	evidence    lease, svid, ...
//	reason      of a refusal, of a session's end
//	duration    of a quarantine or gap, in seconds
//
// Each line is one write to a file opened for appending, so that lines of a
// dying agent and its successor do not mix. A line that cannot be written is
// counted, logged as an alarm, and told to the caller; it is never silent.
//
// It may import identity and ipcache/lease. A Log is safe for concurrent use and
// has no goroutines.
package audit
