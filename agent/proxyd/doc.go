// Package proxyd is the process of the node's L7 proxy, `portcullis proxy`: it
// joins the proxies for HTTP, TLS and DNS with the datapath's judgements and the
// agent's tables, in a network namespace of its own.
//
//	Enter   lock -> namespace -> fewer capabilities -> exec itself
//	Run     sockets into the datapath's places; serve; ask the datapath and the
//	        agent's tables about every request
//
// The process outlives the agent, and the agent starts it again when it is gone.
// Until its sockets are in their places, and as soon as they are closed, the
// kernel refuses what is steered here.
package proxyd
