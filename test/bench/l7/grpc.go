package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// connsOfCalls are the connections of all calls.
const connsOfCalls = 4

// serveGRPC answers calls on every address, for as long as the process lives.
func serveGRPC(addresses []string) error {
	for _, a := range addresses {
		l, err := net.Listen("tcp4", a)
		if err != nil {
			return err
		}
		s := grpc.NewServer()
		grpc_health_v1.RegisterHealthServer(s, health.NewServer())
		go func() {
			fmt.Fprintln(os.Stderr, s.Serve(l))
			os.Exit(1)
		}()
	}
	return nil
}

// calls makes unary calls.
func (c *client) calls(o order) (done, error) {
	for len(c.grpc) < connsOfCalls {
		// Of a resolver and a proxy of the environment nothing is wanted.
		conn, err := grpc.NewClient("passthrough:///"+o.To, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
		if err != nil {
			return done{}, err
		}
		c.grpc = append(c.grpc, conn)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(o.Millis)*time.Millisecond+patience)
	defer cancel()
	// The first of each connection waits for it.
	for _, conn := range c.grpc {
		if _, err := grpc_health_v1.NewHealthClient(conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{}, grpc.WaitForReady(true)); err != nil {
			return done{}, err
		}
	}
	var fails atomic.Int64
	var mu sync.Mutex
	var wg sync.WaitGroup
	begin := time.Now()
	stop := begin.Add(time.Duration(o.Millis) * time.Millisecond)
	for i := range o.Conns {
		wg.Go(func() {
			var took []time.Duration
			h := grpc_health_v1.NewHealthClient(c.grpc[i%len(c.grpc)])
			for from := time.Now(); from.Before(stop); {
				_, err := h.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
				now := time.Now()
				if err != nil {
					fails.Add(1)
					break
				}
				took = append(took, now.Sub(from))
				from = now
			}
			mu.Lock()
			c.took = append(c.took, took...)
			mu.Unlock()
		})
	}
	wg.Wait()
	c.fails = int(fails.Load())
	return c.sum(stop.Sub(begin)), nil
}
