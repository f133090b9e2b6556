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
//
// WebSocket is spoken here, and not by a library: nothing is sent after the
// request, so reading frames is all there is.
func (c *Cluster) run(ctx context.Context, pod, container string, command ...string) (stdout []byte, err error) {
	u, err := url.Parse(c.config.Host)
	if err != nil || u.Host == "" {
		u = &url.URL{Scheme: "https", Host: c.config.Host}
	}
	u.Path = strings.TrimSuffix(u.Path, "/") + "/api/v1/namespaces/" + c.namespace + "/pods/" + pod + "/exec"
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
	resp, err := c.exec.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxSaid)) // for the message only
		return nil, fmt.Errorf("%s: %s", resp.Status, said(b))
	}
	// The request's context does not end the connection any more.
	defer context.AfterFunc(ctx, func() { _ = resp.Body.Close() })()
	stdout, err = readExec(bufio.NewReader(resp.Body))
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return stdout, err
}

// said is the message of a Status, or the text as it is.
func said(b []byte) string {
	var s metav1.Status
	if json.Unmarshal(b, &s) == nil && s.Message != "" {
		return s.Message
	}
	return strings.TrimSpace(string(b))
}

// readExec reads messages until the result of the command.
func readExec(r io.Reader) (stdout []byte, err error) {
	var stderr bytes.Buffer
	var message []byte
	for {
		final, op, payload, err := readFrame(r)
		if err != nil {
			return stdout, fmt.Errorf("the answer breaks off: %w", err)
		}
		switch op {
		case 0, 1, 2: // continued, text, binary
			message = append(message, payload...)
		case 8:
			return stdout, errors.New("the answer breaks off: closed")
		}
		if len(message)+len(stdout)+stderr.Len() > maxExec {
			return stdout, fmt.Errorf("the answer is longer than %d MiB", maxExec>>20)
		}
		if !final || op > 2 || len(message) == 0 {
			continue
		}
		stream, text := message[0], message[1:]
		message = nil
		switch stream {
		case stdoutStream:
			stdout = append(stdout, text...)
		case stderrStream:
			stderr.Write(text)
		case resultStream:
			var s metav1.Status
			if err := json.Unmarshal(text, &s); err != nil {
				return stdout, fmt.Errorf("the result of the command: %w", err)
			}
			if s.Status != metav1.StatusSuccess {
				return stdout, fmt.Errorf("%s: %s", s.Message, strings.TrimSpace(stderr.String()))
			}
			return stdout, nil
		}
	}
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
