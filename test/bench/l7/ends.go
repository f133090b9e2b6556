package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"

	"portcullis/chaos/lab"
)

// endArgument is the first argument of a process that is one end of the traffic.
const endArgument = "end"

// order is what an end is told on its standard input, one line each.
type order struct {
	Listen []string `json:"listen,omitempty"` // of a server
	GRPC   []string `json:"grpc,omitempty"`   // of a server

	Load   string  `json:"load,omitempty"` // of a client: keep, conn, grpc, idle
	To     string  `json:"to,omitempty"`
	Conns  int     `json:"conns,omitempty"`
	Millis int     `json:"millis,omitempty"` // how long to run; the connections stay
	Rate   float64 `json:"rate,omitempty"`   // requests per second; 0: as they are answered
}

// done is what an end says after each order.
type done struct {
	Error    string  `json:"error,omitempty"`
	Requests int     `json:"requests"`
	Failed   int     `json:"failed"`
	Seconds  float64 `json:"seconds"`
	P50      float64 `json:"p50"` // us
	P99      float64 `json:"p99"`
}

// end is such a process.
type end struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
	mu  sync.Mutex
}

// startEnd starts one in a workload's network namespace.
func startEnd(l *lab.Lab, workload string) (*end, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	e := &end{cmd: exec.Command(self, endArgument)}
	e.cmd.Stderr = os.Stderr
	if e.in, err = e.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := e.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	e.out = bufio.NewReader(out)
	return e, l.InWorkload(workload, e.cmd.Start)
}

// do gives an order and waits until it is carried out.
func (e *end) do(o order) (d done, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	b, err := json.Marshal(o)
	if err != nil {
		return d, err
	}
	if _, err := e.in.Write(append(b, '\n')); err != nil {
		return d, err
	}
	line, err := e.out.ReadBytes('\n')
	if err != nil {
		return d, fmt.Errorf("an end of the traffic is gone: %w", err)
	}
	if err = json.Unmarshal(line, &d); err == nil && d.Error != "" {
		err = errors.New(d.Error)
	}
	return d, err
}

// stop ends the process: it goes with its standard input.
func (e *end) stop() error {
	return errors.Join(e.in.Close(), e.cmd.Wait())
}

// runEnd is the process.
func runEnd() error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	var c client
	for in.Scan() {
		var o order
		if err := json.Unmarshal(in.Bytes(), &o); err != nil {
			return err
		}
		d, err := c.carryOut(o)
		if err != nil {
			d.Error = strings.TrimSpace(err.Error())
		}
		b, err := json.Marshal(d)
		if err != nil {
			return err
		}
		fmt.Println(string(b))
	}
	return in.Err()
}

// carryOut begins to serve, or makes requests.
func (c *client) carryOut(o order) (done, error) {
	switch o.Load {
	case "":
		go func() { // for as long as the process lives
			fmt.Fprintln(os.Stderr, serveHTTP(o.Listen))
			os.Exit(1)
		}()
		return done{}, serveGRPC(o.GRPC)
	case "keep":
		return c.keep(o)
	case "conn":
		return c.each(o)
	case "grpc":
		return c.calls(o)
	case "idle":
		return c.idle(o)
	}
	return done{}, fmt.Errorf("no load %q", o.Load)
}
