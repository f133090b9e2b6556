package session

import (
	"time"

	"portcullis/ipcache/lease"
)

// Bounds on what a peer may say. A frame beyond them ends the stream.
const (
	// MaxHeld is how many bindings one Hello or Welcome may list: as many as a
	// node can have IPs of pods many times over.
	MaxHeld = 1 << 16
	// maxFrame bounds a frame; a Hello with MaxHeld bindings fits.
	maxFrame = 8 << 20

	maxLabels   = 256
	maxLabelKey = 253 + 1 + 63 // prefix/name
	maxLabel    = 253          // Kubernetes allows 63
	// maxLabelBytes bounds keys and values of one identity in all: every
	// identity in use is kept in memory and on a tmpfs.
	maxLabelBytes = 16 << 10
	maxName       = 253 // namespace, service account, trust domain
	maxPorts      = 256
	maxPortName   = 63

	maxSPIFFEID   = 2048 // as the SPIFFE standard has it
	maxChain      = 8    // certificates of one workload
	maxChainBytes = 32 << 10
	maxRSABits    = 8192
	maxSignature  = maxRSABits / 8 // in bytes; of all other keys they are shorter

	maxTTL = lease.MaxLease
	// maxFlight bounds Binding.Flight: a packet older than a lease is nobody's.
	maxFlight = lease.MaxLease
)

// Defaults of Config.
const (
	DefaultQueue       = 4096
	DefaultDialTimeout = time.Second
	DefaultPeerTimeout = 3 * time.Second
	DefaultConnections = 8192
)

const (
	// handshakeTimeout is how long an accepted connection may take to
	// authenticate and to open its stream.
	handshakeTimeout = 2 * time.Second
	// maxPerVerifier is how many streams one verifier may have at a time: the
	// last one, and some that are not known to be dead yet.
	maxPerVerifier = 4
	// maxPerNode is how many connections may come from one address of a known
	// node, or by its name from elsewhere: several times the streams that it may
	// have. What its workloads send under its address counts, too.
	maxPerNode = 64
	// Who comes from elsewhere and has not authenticated shares an eighth as many
	// places; one address has an eighth of an eighth of those, and at least 4.
	strangersShare = 8
	leastStrangers = 4
	// maxHeaders bounds the HTTP/2 headers of a message, which carry no part of
	// the protocol, and maxWords what a peer says in words; in bytes.
	maxHeaders = 8 << 10
	maxWords   = 256
	// window is HTTP/2's flow control window. It is fixed, so that gRPC sends
	// no probes of its own.
	window = 1 << 20
)
