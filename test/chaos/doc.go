// Chaos runs every fault in the lab under every kind of evidence, and says in
// docs/chaos-results.md what came of it.
//
// Each cell (what the workloads do, what breaks, on what a binding is believed) is
// one or more runs of `portcullis chaos run`. What a run came to is kept in a
// file, by what the judged binary consists of: stopped and started again, the tool
// goes on with what is missing, also with runs that were cut short. One that comes
// to no end is tried again, and said to have shown nothing if it never does.
// Cells that wait for the end of the longest lease run beside the others. It
// imports chaos/check and chaos/fault.
package main
