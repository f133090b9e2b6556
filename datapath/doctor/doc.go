// Package doctor looks at a node and says what is wrong with it, why that
// matters, and what to do: the kernel's features, clocks, file systems, the
// agents' port, other programs on workloads' devices, and data paths that
// bypass the hook.
//
// It is two halves. Gather tries and reads things, and returns Facts; it leaves
// nothing behind, and changes nothing that outlives it. Judge is a pure
// function of Facts.
//
// It may import datapath, bpf/abi, netlink, netns and x/sys. Gather starts one
// goroutine, whose thread enters a network namespace of its own, and waits for
// it. Both functions are safe for concurrent use.
package doctor
