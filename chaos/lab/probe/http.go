package probe

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// HTTPOptions say how a request is made.
type HTTPOptions struct {
	Header  http.Header    // further fields
	Timeout time.Duration  // for all of it
	DNS     netip.AddrPort // the server that is asked for the host's addresses; zero: as the system says
}

// HTTPResult is what happened to one HTTP request.
type HTTPResult struct {
	Connect
	Code    string  `json:"code,omitempty"`   // of the answer of HTTPOptions.DNS: "NOERROR", "REFUSED"
	Remote  string  `json:"remote,omitempty"` // the server's address and port, if it was connected to
	Status  int     `json:"status,omitempty"` // 0: no answer
	Body    string  `json:"body,omitempty"`   // at most 64 KiB
	TotalUS float64 `json:"total_us"`         // from the first SYN to the body's end
}

// HTTP is Request with a header and a timeout only.
func HTTP(ctx context.Context, method, url string, header http.Header, timeout time.Duration) HTTPResult {
	return Request(ctx, method, url, HTTPOptions{Header: header, Timeout: timeout})
}

// Request sends one request on a fresh connection and reads the answer. OK means
// that an answer came, whatever its status. Retransmits are read after the
// answer, so that they count the whole exchange.
func Request(ctx context.Context, method, url string, o HTTPOptions) HTTPResult {
	ctx, cancel := context.WithTimeout(ctx, o.Timeout)
	defer cancel()
	var r HTTPResult
	start := time.Now()
	r.At = start
	r.Error = func() string {
		err := r.request(ctx, method, url, o)
		switch {
		case err == nil:
			return ""
		case errors.Is(err, context.DeadlineExceeded) || os.IsTimeout(err):
			return errTimeout.Error()
		}
		return err.Error()
	}()
	r.TotalUS = float64(time.Since(start)) / 1e3
	r.OK = r.Error == ""
	return r
}

func (r *HTTPResult) request(ctx context.Context, method, url string, o HTTPOptions) error {
	req, err := http.NewRequestWithContext(ctx, method, url, nil)
	if err != nil {
		return err
	}
	maps.Copy(req.Header, o.Header)
	var conn net.Conn
	t := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if addr, err = r.resolve(ctx, addr, o); err != nil {
				return nil, err
			}
			var d net.Dialer
			d.SetMultipathTCP(false)
			t0 := time.Now()
			c, err := d.DialContext(ctx, network, addr)
			r.ConnectUS = float64(time.Since(t0)) / 1e3
			if err == nil {
				// Read at the connect, and again at the end if the
				// connection is still open.
				r.TotalRetr, r.Retransmits = retransmits(c)
				r.Local, r.Remote = c.LocalAddr().String(), c.RemoteAddr().String()
				conn = c
			}
			return c, err
		},
	}
	defer t.CloseIdleConnections()
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if total, now := retransmits(conn); total > r.TotalRetr {
		r.TotalRetr, r.Retransmits = total, now
	}
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	r.Status, r.Body = resp.StatusCode, string(body)
	return err
}

// resolve asks the server of the options, if there is one.
func (r *HTTPResult) resolve(ctx context.Context, addr string, o HTTPOptions) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil || !o.DNS.IsValid() {
		return addr, err
	}
	ips, code, err := Lookup(ctx, o.DNS, host, false, o.Timeout)
	if r.Code = code; err != nil {
		return "", fmt.Errorf("ask %s for %s: %w", o.DNS, host, err)
	}
	if len(ips) == 0 {
		return "", fmt.Errorf("%s answers %s about %s", o.DNS, code, host)
	}
	return net.JoinHostPort(ips[0].String(), port), nil
}

func retransmits(c net.Conn) (total uint32, now uint8) {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0, 0
	}
	rc, err := sc.SyscallConn()
	if err != nil {
		return 0, 0
	}
	rc.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			total, now = info.Total_retrans, info.Retransmits
		}
	})
	return total, now
}
