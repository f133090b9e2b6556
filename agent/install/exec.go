package install

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Channels of Kubernetes' protocol for commands in containers, over WebSocket:
// the first byte of a message.
const (
	execProtocol = "v4.channel.k8s.io"
	stdoutStream = 1
	stderrStream = 2
	resultStream = 3
)

// maxExec bounds what a command may say, in bytes.
const maxExec = 16 << 20

// run runs a command in a container and returns what it wrote. A command that
// ended with another status than 0 is an error, beside its output.
func (c *Cluster) run(ctx context.Context, pod, container string, command ...string) (stdout []byte, err error) {
	s, err := c.stream(ctx, maxExec, pod, container, command...)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return io.ReadAll(s)
}

// stream runs a command in a container; what it writes is read from the stream,
// of all it says no more than so many bytes. The end of the stream is that of a
// command that went well; else its error says what the command said.
//
// WebSocket is spoken here, and not by a library: nothing is sent after the
// request, so reading frames is all there is.
func (c *Cluster) stream(ctx context.Context, most int64, pod, container string, command ...string) (*execStream, error) {
	u := c.url("/api/v1/namespaces/" + c.namespace + "/pods/" + pod + "/exec")
	u.RawQuery = url.Values{"container": {container}, "command": command, "stdout": {"true"}, "stderr": {"true"}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	key := make([]byte, 16)
	_, _ = rand.Read(key) // never fails
	for name, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
		"Sec-WebSocket-Key": base64.StdEncoding.EncodeToString(key), "Sec-WebSocket-Protocol": execProtocol} {
		req.Header.Set(name, value)
	}
	resp, err := c.ask(req, http.StatusSwitchingProtocols)
	if err != nil {
		return nil, err
	}
	// The request's context does not end the connection any more.
	stop := context.AfterFunc(ctx, func() { _ = resp.Body.Close() })
	return &execStream{ctx: ctx, r: bufio.NewReader(resp.Body), most: most, left: most, end: func() {
		stop()
		_ = resp.Body.Close() // it was read, or is given up
	}}, nil
}

// ask sends a request. An answer of another status than wanted is an error, with what
// the API server says of it; else the caller closes the body.
func (c *Cluster) ask(req *http.Request, wanted int) (*http.Response, error) {
	resp, err := c.exec.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != wanted {
		defer resp.Body.Close()
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxSaid)) // for the message only
		return nil, fmt.Errorf("%s: %s", resp.Status, said(b))
	}
	return resp, nil
}

// url is that of a path of the API server.
func (c *Cluster) url(path string) *url.URL {
	u, err := url.Parse(c.config.Host)
	if err != nil || u.Host == "" {
		u = &url.URL{Scheme: "https", Host: c.config.Host}
	}
	u.Path = strings.TrimSuffix(u.Path, "/") + path
	return u
}

// said is the message of a Status, or the text as it is.
func said(b []byte) string {
	var s metav1.Status
	if json.Unmarshal(b, &s) == nil && s.Message != "" {
		return s.Message
	}
	return strings.TrimSpace(string(b))
}

// execStream is the standard output of a command.
type execStream struct {
	ctx        context.Context
	r          io.Reader
	end        func()
	most, left int64 // bytes of all that it may say
	stdout     []byte
	stderr     bytes.Buffer
	message    []byte // the begin of one
}

// Close gives the connection back; the command ends when it writes again.
func (s *execStream) Close() { s.end() }

// Read returns what the command writes. io.EOF: it ended with status 0.
func (s *execStream) Read(p []byte) (int, error) {
	for len(s.stdout) == 0 {
		if err := s.next(); err != nil {
			if s.ctx.Err() != nil {
				err = s.ctx.Err()
			}
			return 0, err
		}
	}
	n := copy(p, s.stdout)
	s.stdout = s.stdout[n:]
	return n, nil
}

// next reads one frame.
func (s *execStream) next() error {
	final, op, payload, err := readFrame(s.r)
	if err != nil {
		return fmt.Errorf("the answer breaks off: %w", err)
	}
	switch op {
	case 0, 1, 2: // continued, text, binary
		s.message = append(s.message, payload...)
	case 8:
		return errors.New("the answer breaks off: closed")
	}
	if s.left -= int64(len(payload)); s.left < 0 {
		return fmt.Errorf("the answer is longer than %d MiB", s.most>>20)
	}
	if !final || op > 2 || len(s.message) == 0 {
		return nil
	}
	stream, text := s.message[0], s.message[1:]
	s.message = nil
	switch stream {
	case stdoutStream:
		s.stdout = text
	case stderrStream:
		s.stderr.Write(text)
	case resultStream:
		var result metav1.Status
		if err := json.Unmarshal(text, &result); err != nil {
			return fmt.Errorf("the result of the command: %w", err)
		}
		if result.Status != metav1.StatusSuccess {
			return fmt.Errorf("%s: %s", result.Message, strings.TrimSpace(s.stderr.String()))
		}
		return io.EOF
	}
	return nil
}

// readFrame reads one frame of WebSocket, as a server sends it: not masked.
func readFrame(r io.Reader) (final bool, op byte, payload []byte, err error) {
	var head [2]byte
	if _, err = io.ReadFull(r, head[:]); err != nil {
		return false, 0, nil, err
	}
	n := uint64(head[1] & 0x7f)
	if head[1]&0x80 != 0 {
		return false, 0, nil, errors.New("a masked frame, which no server sends")
	}
	switch n {
	case 126:
		var long [2]byte
		_, err = io.ReadFull(r, long[:])
		n = uint64(binary.BigEndian.Uint16(long[:]))
	case 127:
		var long [8]byte
		_, err = io.ReadFull(r, long[:])
		n = binary.BigEndian.Uint64(long[:])
	}
	if err != nil {
		return false, 0, nil, err
	}
	if n > maxExec {
		return false, 0, nil, fmt.Errorf("a frame of %d bytes", n)
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r, payload)
	return head[0]&0x80 != 0, head[0] & 0x0f, payload, err
}
