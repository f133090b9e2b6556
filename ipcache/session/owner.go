package session

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"portcullis/ipcache/lease"
)

// ownerSide serves the streams that verifiers open.
type ownerSide struct {
	UnimplementedBindingLeaseServer
	t *Transport
}

// Session implements BindingLeaseServer.
func (o *ownerSide) Session(g grpc.BidiStreamingServer[FromVerifier, FromOwner]) error {
	auth, err := authOf(g.Context())
	if err != nil {
		return status.Error(codes.Unauthenticated, err.Error())
	}
	// The header tells the verifier that it was let in: in TLS 1.3 its own
	// handshake ends before its certificate is judged here.
	if err := g.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	s, err := o.t.register(RoleOwner, auth)
	if err != nil {
		return status.Error(codes.Unavailable, err.Error())
	}
	o.t.run(s, wire{
		recv: func() (lease.Message, error) {
			f, err := g.Recv()
			if err != nil {
				return nil, err
			}
			m, err := decodeFromVerifier(f, auth.node)
			if err != nil {
				return nil, &malformed{err}
			}
			return m, nil
		},
		send: func(m lease.Message) error {
			f, err := encodeFromOwner(m)
			if err != nil {
				return &unsendable{err}
			}
			return g.Send(f)
		},
	})
	return status.Error(codes.Aborted, s.why)
}
