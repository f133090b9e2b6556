package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// DefaultSocket is where the agent listens unless told otherwise.
const DefaultSocket = "/run/portcullis/agent.sock"

// MaxMessage bounds one message in either direction, in bytes: a server
// passes it to grpc.MaxRecvMsgSize. Listings of a large node exceed gRPC's 4 MiB.
const MaxMessage = 64 << 20

// UnreachableError tells that nobody answers on the agent's socket.
type UnreachableError struct {
	Socket string
	Err    error
}

// Error says why, and what to do.
func (e *UnreachableError) Error() string {
	const hint = "start `portcullis agent`, or name the socket with --socket or PORTCULLIS_SOCKET"
	switch {
	case errors.Is(e.Err, fs.ErrPermission):
		return fmt.Sprintf("may not open the agent's socket %s: run this as root or as a member of the socket's group", e.Socket)
	case errors.Is(e.Err, fs.ErrNotExist):
		return fmt.Sprintf("the agent is not running or its socket is elsewhere: there is no %s: %s", e.Socket, hint)
	case errors.Is(e.Err, syscall.ECONNREFUSED):
		return fmt.Sprintf("the agent is not running or its socket is elsewhere: nobody listens on %s: %s", e.Socket, hint)
	}
	return fmt.Sprintf("the agent is not running or its socket is elsewhere: %s: %v: %s", e.Socket, e.Err, hint)
}

// Unwrap returns the cause.
func (e *UnreachableError) Unwrap() error { return e.Err }

// Client speaks to one agent. It is safe for concurrent use.
type Client struct {
	AgentClient
	conn *grpc.ClientConn
}

// Dial connects to the agent that listens on the unix socket. It makes sure
// that somebody does: the error is an *UnreachableError otherwise.
func Dial(socket string) (*Client, error) {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	dial := func(ctx context.Context, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", socket) }
	// gRPC connects late and reports it badly; find out now.
	probe, err := dial(context.Background(), "")
	if err != nil {
		return nil, &UnreachableError{Socket: socket, Err: err}
	}
	probe.Close()
	// The target is never resolved: the dialer knows the socket.
	conn, err := grpc.NewClient("passthrough:///portcullis-agent",
		grpc.WithContextDialer(dial),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // file permissions guard the socket
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage)),
	)
	if err != nil {
		return nil, &UnreachableError{Socket: socket, Err: err}
	}
	return &Client{AgentClient: NewAgentClient(conn), conn: conn}, nil
}

// Close ends the connection and every call on it.
func (c *Client) Close() error { return c.conn.Close() }

// Listen makes the agent's socket, readable and writable by owner and group
// only (0660), and its directory. A socket left behind by a dead agent is
// replaced; one that somebody listens on is an error. Closing the listener
// removes the socket.
func Listen(socket string) (net.Listener, error) { return ListenUnix(socket, "--api-socket") }

// ListenUnix makes such a socket for another purpose; flag is the setting that
// named it, for errors.
func ListenUnix(socket, flag string) (net.Listener, error) {
	if conn, err := net.DialTimeout("unix", socket, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("%s: another agent listens there: stop it, or give this one another %s", socket, flag)
	}
	if info, err := os.Lstat(socket); err == nil && info.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("%s: exists and is not a socket: remove it, or give another %s", socket, flag)
	}
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the socket's directory: %w", err)
	}
	// Bound in a directory that nobody else may enter, then moved: at no
	// moment can the socket be opened with wider permissions.
	private, err := os.MkdirTemp(dir, ".sock")
	if err != nil {
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	defer os.RemoveAll(private)
	bound := filepath.Join(private, "s")
	if len(bound) >= len(syscall.RawSockaddrUnix{}.Path) {
		return nil, fmt.Errorf("%s: too long for a socket's name: give a shorter %s", socket, flag)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: bound, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	l.SetUnlinkOnClose(false) // it would unlink the first name
	if err := errors.Join(os.Chmod(bound, 0o660), os.Rename(bound, socket)); err != nil {
		l.Close()
		return nil, fmt.Errorf("make the agent's socket: %w", err)
	}
	return &listener{UnixListener: l, socket: socket}, nil
}

type listener struct {
	*net.UnixListener
	socket string
	once   sync.Once
}

// Close removes the socket, then stops listening. Only the first call does
// anything: by the second the name may be another agent's.
func (l *listener) Close() (err error) {
	l.once.Do(func() { err = errors.Join(ignoreMissing(os.Remove(l.socket)), l.UnixListener.Close()) })
	return err
}

// Addr returns the name by which clients find the socket.
func (l *listener) Addr() net.Addr { return &net.UnixAddr{Name: l.socket, Net: "unix"} }

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
