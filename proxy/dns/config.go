package dns

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"

	"portcullis/proxy"
)

// The protocols of flows.
const (
	TCP = 6
	UDP = 17
)

// Learner is told what an answer says before the client hears it, if a rule of its
// policy set may hang on that (Decision.NoNames), with the
// decision by which it was asked for, from many goroutines. The answer goes on only when Learn returns nil; it must return soon
// after ctx ends.
type Learner interface {
	Learn(ctx context.Context, c proxy.Conn, d proxy.Decision, a Answer) error
}

// Answer is what a client is about to learn: the addresses of the name that it
// asked for, whatever other names lead to them.
type Answer struct {
	Name      string // as l7.NormalName has it
	Addresses []Address
}

// Address is one address of a name.
type Address struct {
	IP netip.Addr
	// TTL is the shortest of the record's and those of the records that lead to it.
	TTL time.Duration
}

// Outcome says what became of a query.
type Outcome string

// The outcomes. Only of Answered does the client hear what the server said. The
// others begin a record's reason.
const (
	Answered   Outcome = "answered"
	Denied     Outcome = "denied"     // no rule allows the name
	NotJudged  Outcome = "not-judged" // the flow is not known, or no more
	Malformed  Outcome = "malformed"  // or a kind of query that is not relayed
	NoServer   Outcome = "no-server"  // it cannot be reached
	Timeout    Outcome = "timeout"    // it did not answer in time
	BadAnswer  Outcome = "bad-answer" // which cannot be read
	NotLearnt  Outcome = "not-learnt" // what it answered was not admitted
	Overloaded Outcome = "overloaded" // too many outstanding
	Ended      Outcome = "ended"      // the client, or the relay, went before
)

func (o Outcome) verdict() proxy.Verdict {
	switch o {
	case Answered:
		return proxy.Forwarded
	case Denied:
		return proxy.Denied
	case Malformed:
		return proxy.Malformed
	}
	return proxy.Failed
}

// Config is a Relay's. On an error of the Judge nothing is relayed: the query is
// refused, a TCP connection ends. Judge, Learner, Recorder and Dial must be given.
type Config struct {
	Judge    proxy.Judge
	Learner  Learner
	Recorder proxy.Recorder // of each query once, when it is over
	// Dial connects to the flow's server by its protocol, in the client's name
	// where the network gives that. It is called by many goroutines.
	Dial func(ctx context.Context, c proxy.Conn) (net.Conn, error)

	NXDomain bool // answer refused names with NXDOMAIN instead of REFUSED

	Timeout      time.Duration // of a server's answer; 0: 5 s
	LearnTimeout time.Duration // 0: 2 s
	DialTimeout  time.Duration // of TCP; 0: 5 s
	Idle         time.Duration // of a TCP connection with nothing outstanding; 0: 30 s
	PerClient    int           // queries outstanding of one client address; 0: 256
	Outstanding  int           // in all; 0: 4096
	Connections  int           // TCP connections in all; 0: 1024
	PerClientTCP int           // TCP connections of one client address; 0: 64
}

func (c *Config) defaults() error {
	for what, missing := range map[string]bool{"judge": c.Judge == nil, "learner": c.Learner == nil, "recorder": c.Recorder == nil, "dialer": c.Dial == nil} {
		if missing {
			return fmt.Errorf("dns: a relay needs a %s", what)
		}
	}
	c.Timeout = cmp.Or(c.Timeout, 5*time.Second)
	c.LearnTimeout = cmp.Or(c.LearnTimeout, 2*time.Second)
	c.DialTimeout = cmp.Or(c.DialTimeout, 5*time.Second)
	c.Idle = cmp.Or(c.Idle, 30*time.Second)
	c.PerClient = cmp.Or(c.PerClient, 256)
	c.Outstanding = cmp.Or(c.Outstanding, 4096)
	c.Connections = cmp.Or(c.Connections, 1024)
	c.PerClientTCP = cmp.Or(c.PerClientTCP, 64)
	if min(c.Timeout, c.LearnTimeout, c.DialTimeout, c.Idle) < 0 || min(c.PerClient, c.Outstanding, c.Connections, c.PerClientTCP) < 0 {
		return errors.New("dns: a bound of the relay is negative")
	}
	return nil
}

func (c *Config) refusal() int {
	if c.NXDomain {
		return dns.RcodeNameError
	}
	return dns.RcodeRefused
}

// Packets is where UDP queries come from and answers go to. ReadFrom and
// WriteTo may be called at once; Close ends a ReadFrom that waits.
type Packets interface {
	// ReadFrom reads a query, and between whom it is.
	ReadFrom(b []byte) (n int, client, server netip.AddrPort, err error)
	// WriteTo writes an answer in the server's name.
	WriteTo(b []byte, server, client netip.AddrPort) error
	Close() error
}
