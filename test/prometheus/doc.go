// Command prometheus tries the dashboard and the alerts of deploy/monitoring on
// a real Prometheus that scrapes the agents of a lab. As root, with Debian's
// package prometheus installed (its service need not run), from the top of the
// module:
//
//	make prometheus
//
// promtool checks the rules and tries them on made-up series. Then a lab of
// three nodes runs, with policies, requests that are allowed and denied and
// packets that are dropped; a Prometheus in the first node's network namespace
// scrapes every agent once a second. Every query of the dashboard must answer
// with at least one series, every rule must be evaluated without an error, and
// the alert on an agent that is gone must come when one is killed. With -write
// the result goes into docs/metrics.md. The exit status is 1 if anything failed.
package main
