package proxy

import "time"

// Options are the limits of a Server. A zero field has the default.
type Options struct {
	Connections   int           // at once; further ones are reset (32,768)
	PerClient     int           // of them, of one client's address (half of them)
	HeaderBytes   int           // of the head of a request or an answer (64 KiB)
	Fields        int           // lines of a head (256)
	HeaderTimeout time.Duration // from the first byte of a head to its end, and to the first byte of a connection (10 s)
	Idle          time.Duration // without a byte in either direction (1 h)
	DialTimeout   time.Duration // to the server (5 s)
	DrainBytes    int64         // of a refused request's body that are read to keep the connection (64 KiB)
	DrainTimeout  time.Duration // for them, and for what is under way when the server ends (5 s)
	Recheck       time.Duration // between two looks at every connection (1 s)
	Streams       int           // of an HTTP/2 connection at once (256)
	Queries       bool          // records hold query strings
	Headers       []string      // records hold the values of these headers
	chunkedWait   time.Duration // for the end of a refused request's chunks, before it is answered (250 ms)
	pipelined     int           // requests of a connection that wait for their answers (16)
	controlPerSec int           // frames of an HTTP/2 connection that carry no request and no data (1,000)
	resetsPerSec  int           // streams that an HTTP/2 client resets (100)
}

func (o Options) withDefaults() Options {
	number(&o.Connections, 32768)
	number(&o.PerClient, max(1, o.Connections/2))
	number(&o.HeaderBytes, 64<<10)
	number(&o.Fields, 256)
	number(&o.HeaderTimeout, 10*time.Second)
	number(&o.Idle, time.Hour)
	number(&o.DialTimeout, 5*time.Second)
	number(&o.DrainBytes, 64<<10)
	number(&o.DrainTimeout, 5*time.Second)
	number(&o.Recheck, time.Second)
	number(&o.Streams, 256)
	number(&o.chunkedWait, 250*time.Millisecond)
	number(&o.pipelined, 16)
	number(&o.controlPerSec, 1000)
	number(&o.resetsPerSec, 100)
	return o
}

func number[T int | int64 | time.Duration](to *T, by T) {
	if *to <= 0 {
		*to = by
	}
}
