package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

const pythonWebSocket = `
import asyncio, sys, websockets
async def main():
    async with websockets.connect(sys.argv[1], max_size=None) as ws:
        for n in (0, 5, 126, 70000, 1 << 20):
            await ws.send("x" * n)
            assert await ws.recv() == "x" * n
        await (await ws.ping())
    print("ok")
asyncio.run(main())
`

const pythonWebSocketRefused = `
import asyncio, sys, websockets
async def main():
    try:
        await websockets.connect(sys.argv[1])
    except websockets.exceptions.InvalidStatusCode as e:
        print(e.status_code)
asyncio.run(main())
`

func sockets(w *world) []check {
	return []check{
		w.command("Python websockets", "python3-websockets", "messages of up to 1 MiB both ways, ping, close; permessage-deflate offered", "as without", []string{"/usr/bin/python3", w.file("ws.py", pythonWebSocket), "ws://{host}:8080/public/ws"}, "=ok"),
		w.command("Python websockets", "python3-websockets", "a refused path", "403", []string{"/usr/bin/python3", w.file("wsno.py", pythonWebSocketRefused), "ws://{host}:8080/v1/ws"}, "=403"),
		{client: "Go x/net/websocket", pack: "golang.org/x/net", what: "messages of up to 1 MiB both ways", out: "as without", run: w.goWebSocket},
	}
}

func (w *world) goWebSocket(ctx context.Context, p place) error {
	conn, err := w.dial(ctx, p, p.at(webPort))
	if err != nil {
		return err
	}
	defer conn.Close()
	cfg, err := websocket.NewConfig("ws://"+p.at(webPort)+"/public/ws", "http://origin.example")
	if err != nil {
		return err
	}
	c, err := websocket.NewClient(cfg, conn)
	if err != nil {
		return err
	}
	defer c.Close()
	for _, n := range []int{1, 1000, megabyte} {
		var got []byte
		if err := websocket.Message.Send(c, make([]byte, n)); err != nil {
			return err
		}
		if err := websocket.Message.Receive(c, &got); err != nil || len(got) != n {
			return fmt.Errorf("%d bytes, want %d: %w", len(got), n, err)
		}
	}
	return nil
}

// tester answers calls of gRPC as its interoperability tests have it.
type tester struct {
	pb.UnimplementedTestServiceServer
	w *world
}

func (t *tester) EmptyCall(ctx context.Context, _ *pb.Empty) (*pb.Empty, error) {
	in, _ := metadata.FromIncomingContext(ctx)
	return &pb.Empty{}, errors.Join(grpc.SetHeader(ctx, metadata.Pairs("x-head", fmt.Sprint(in.Get("x-ask")))), grpc.SetTrailer(ctx, metadata.Pairs("x-tail-bin", "\x00\x01")))
}

func (t *tester) UnaryCall(_ context.Context, q *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	if s := q.ResponseStatus; s != nil {
		return nil, status.Error(codes.Code(s.Code), s.Message)
	}
	return &pb.SimpleResponse{Payload: &pb.Payload{Body: make([]byte, q.ResponseSize)}}, nil
}

func (t *tester) StreamingOutputCall(q *pb.StreamingOutputCallRequest, s pb.TestService_StreamingOutputCallServer) error {
	for _, p := range q.ResponseParameters {
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: &pb.Payload{Body: make([]byte, p.Size)}}); err != nil {
			return err
		}
	}
	return nil
}

func (t *tester) StreamingInputCall(s pb.TestService_StreamingInputCallServer) error {
	n := 0
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return s.SendAndClose(&pb.StreamingInputCallResponse{AggregatedPayloadSize: int32(n)})
		}
		if err != nil {
			return err
		}
		n += len(m.Payload.Body)
	}
}

func (t *tester) FullDuplexCall(s pb.TestService_FullDuplexCallServer) error {
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(&pb.StreamingOutputCallResponse{Payload: m.Payload}); err != nil {
			return err
		}
	}
}

func (t *tester) HalfDuplexCall(pb.TestService_HalfDuplexCallServer) error {
	t.w.came("gRPC HalfDuplexCall")
	return nil
}

func (t *tester) CacheableUnaryCall(context.Context, *pb.SimpleRequest) (*pb.SimpleResponse, error) {
	t.w.came("gRPC CacheableUnaryCall")
	return &pb.SimpleResponse{}, nil
}

func (w *world) serveGRPC() error {
	l, err := w.listen("tcp", grpcPort)
	if err != nil {
		return err
	}
	// Pings every second, and the end of who does not answer.
	s := grpc.NewServer(grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Second, Timeout: time.Second}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	pb.RegisterTestServiceServer(s, &tester{w: w})
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }() // until close
	w.onClose(func() { s.Stop(); <-done })
	return nil
}

// calls are those of gRPC.
func calls(w *world) []check {
	try := func(what, out string, do func(context.Context, pb.TestServiceClient) error) check {
		return check{client: "Go gRPC", pack: "google.golang.org/grpc", what: what, out: out, run: func(ctx context.Context, p place) error {
			return w.calling(p, func(c pb.TestServiceClient) error { return do(ctx, c) })
		}}
	}
	return []check{
		try("unary calls: 314 kB, metadata both ways, errors in the trailer, gzip", "as without", unary),
		try("streams of the server, of the client and both ways: 500 messages, 1 MiB, at once", "as without", streams),
		try("a refused method, unary and a stream", "`PermissionDenied`; the next call on the same connection passes", refusedCalls),
		try("a deadline, a cancelled stream", "`DeadlineExceeded`, `Canceled`; the connection stays", ended),
		try("a stream idle for 4 s, keepalive pings of the server every second", "it stays, and goes on", idleStream),
	}
}

// calling makes calls on one connection.
func (w *world) calling(p place, do func(pb.TestServiceClient) error) (err error) {
	var dials atomic.Int32
	c, err := grpc.NewClient("passthrough:///"+p.at(grpcPort), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second, PermitWithoutStream: true}),
		grpc.WithContextDialer(func(ctx context.Context, to string) (net.Conn, error) {
			dials.Add(1)
			return w.dial(ctx, p, to)
		}))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	if err := do(pb.NewTestServiceClient(c)); err != nil {
		return err
	}
	if n := dials.Load(); n != 1 {
		return fmt.Errorf("%d connections", n)
	}
	return nil
}

func unary(ctx context.Context, c pb.TestServiceClient) error {
	var head, tail metadata.MD
	if _, err := c.EmptyCall(metadata.AppendToOutgoingContext(ctx, "x-ask", "me"), &pb.Empty{}, grpc.Header(&head), grpc.Trailer(&tail)); err != nil {
		return err
	}
	if fmt.Sprint(head.Get("x-head")) != "[[me]]" || fmt.Sprint(tail.Get("x-tail-bin")) != "[\x00\x01]" {
		return fmt.Errorf("metadata %v, %v", head, tail)
	}
	for _, o := range [][]grpc.CallOption{nil, {grpc.UseCompressor(gzip.Name)}} {
		a, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseSize: 314159, Payload: &pb.Payload{Body: make([]byte, 271828)}}, o...)
		if err != nil || len(a.Payload.Body) != 314159 {
			return fmt.Errorf("%d bytes: %w", len(a.GetPayload().GetBody()), err)
		}
	}
	_, err := c.UnaryCall(ctx, &pb.SimpleRequest{ResponseStatus: &pb.EchoStatus{Code: int32(codes.Aborted), Message: "ünï\tcode"}})
	if s := status.Convert(err); s.Code() != codes.Aborted || s.Message() != "ünï\tcode" {
		return fmt.Errorf("an error of the server: %w", err)
	}
	return nil
}

func streams(ctx context.Context, c pb.TestServiceClient) error {
	errs := make(chan error, 3)
	go func() { errs <- output(ctx, c) }()
	go func() { errs <- input(ctx, c) }()
	go func() { errs <- duplex(ctx, c) }()
	return errors.Join(<-errs, <-errs, <-errs)
}

func output(ctx context.Context, c pb.TestServiceClient) error {
	q := &pb.StreamingOutputCallRequest{}
	for range 500 {
		q.ResponseParameters = append(q.ResponseParameters, &pb.ResponseParameters{Size: 10_000})
	}
	s, err := c.StreamingOutputCall(ctx, q)
	n := 0
	for ; err == nil; n++ {
		_, err = s.Recv()
	}
	if !errors.Is(err, io.EOF) || n != 501 {
		return fmt.Errorf("stream of the server, %d messages: %w", n, err)
	}
	return nil
}

func input(ctx context.Context, c pb.TestServiceClient) error {
	s, err := c.StreamingInputCall(ctx)
	for i := 0; err == nil && i < 500; i++ {
		err = s.Send(&pb.StreamingInputCallRequest{Payload: &pb.Payload{Body: make([]byte, 2000)}})
	}
	if err != nil {
		return err
	}
	a, err := s.CloseAndRecv()
	if err != nil || a.AggregatedPayloadSize != 1_000_000 {
		return fmt.Errorf("stream of the client, %d bytes: %w", a.GetAggregatedPayloadSize(), err)
	}
	return nil
}

func duplex(ctx context.Context, c pb.TestServiceClient) error {
	s, err := c.FullDuplexCall(ctx)
	for i := 0; err == nil && i < 500; i++ {
		n := 1 + i*37%1000
		if i == 250 {
			n = megabyte
		}
		if err = s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: make([]byte, n)}}); err == nil {
			var m *pb.StreamingOutputCallResponse
			if m, err = s.Recv(); err == nil && len(m.Payload.Body) != n {
				err = fmt.Errorf("%d bytes, want %d", len(m.Payload.Body), n)
			}
		}
	}
	if err != nil {
		return fmt.Errorf("stream both ways: %w", err)
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the end of a stream both ways: %w", err)
	}
	return nil
}

func refusedCalls(ctx context.Context, c pb.TestServiceClient) error {
	for range 5 {
		if _, err := c.CacheableUnaryCall(ctx, &pb.SimpleRequest{Payload: &pb.Payload{Body: make([]byte, 100_000)}}); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("unary: %w", err)
		}
		s, err := c.HalfDuplexCall(ctx)
		if err != nil {
			return err
		}
		if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("stream: %w", err)
		}
		if _, err := c.EmptyCall(ctx, &pb.Empty{}); err != nil {
			return fmt.Errorf("the call behind it: %w", err)
		}
	}
	return nil
}

func ended(ctx context.Context, c pb.TestServiceClient) error {
	short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancel()
	s, err := c.FullDuplexCall(short)
	if err != nil {
		return err
	}
	if _, err := s.Recv(); status.Code(err) != codes.DeadlineExceeded {
		return fmt.Errorf("a deadline: %w", err)
	}
	given, giveUp := context.WithCancel(ctx)
	if s, err = c.FullDuplexCall(given); err != nil {
		giveUp()
		return err
	}
	err = s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{}})
	giveUp()
	if err != nil {
		return err
	}
	for err == nil {
		_, err = s.Recv()
	}
	if status.Code(err) != codes.Canceled {
		return fmt.Errorf("a stream that is given up: %w", err)
	}
	_, err = c.EmptyCall(ctx, &pb.Empty{})
	return err
}

func idleStream(ctx context.Context, c pb.TestServiceClient) error {
	s, err := c.FullDuplexCall(ctx)
	if err != nil {
		return err
	}
	for range 2 {
		if err := s.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{}}); err != nil {
			return err
		}
		if _, err := s.Recv(); err != nil {
			return err
		}
		time.Sleep(4 * time.Second)
	}
	return nil
}
