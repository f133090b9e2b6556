package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// Answer is what came back for one request.
type Answer struct {
	Request string              `json:"request"`
	Proto   string              `json:"proto,omitempty"`
	Status  string              `json:"status,omitempty"` // "403 Forbidden"
	Header  map[string][]string `json:"header,omitempty"`
	Body    string              `json:"body,omitempty"`
	Error   string              `json:"error,omitempty"`
}

// requests sends requests over one connection, each after the answer to the last:
// METHOD PATH, and fields of the header after that, with ": " in them. It says all
// that came back. The first that is not answered is the last.
func requests(ctx context.Context, out io.Writer, addr string, list []string, timeout time.Duration) error {
	enc := json.NewEncoder(out)
	c, err := dialer(timeout).DialContext(ctx, "tcp", addr)
	if err != nil {
		return enc.Encode(Answer{Request: list[0], Error: err.Error()})
	}
	defer c.Close()
	r := bufio.NewReader(c)
	for _, request := range list {
		a := one(c, r, addr, request, timeout)
		if err := enc.Encode(a); err != nil || a.Error != "" {
			return err
		}
	}
	return nil
}

func one(c net.Conn, r *bufio.Reader, addr, request string, timeout time.Duration) Answer {
	a := Answer{Request: request}
	err := func() error {
		method, rest, _ := strings.Cut(request, " ")
		path, field, _ := strings.Cut(rest, " ")
		if field != "" {
			field += "\r\n"
		}
		if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		if _, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\n%s\r\n", method, path, addr, field); err != nil {
			return err
		}
		res, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			return err
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		a.Proto, a.Status, a.Header, a.Body = res.Proto, res.Status, res.Header, string(body)
		return err
	}()
	if err != nil {
		a.Error = err.Error()
	}
	return a
}

// landing asks, by a connection of its own, to let a ship land.
func landing(ctx context.Context, addr string, timeout time.Duration) (string, error) {
	c, err := dialer(timeout).DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return "", err
	}
	if _, err := fmt.Fprintf(c, "POST /v1/request-landing HTTP/1.1\r\nHost: %s\r\nContent-Length: 0\r\n\r\n", addr); err != nil {
		return "", err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %q", res.Status, body)
	}
	return strings.TrimSuffix(string(body), "\n"), err
}

// query asks a server, PROTOCOL/HOST:PORT, for addresses of names as they are
// given, with no domain behind them.
func query(ctx context.Context, server string, names []string, timeout time.Duration) error {
	protocol, addr, ok := strings.Cut(server, "/")
	if !ok {
		return fmt.Errorf("query: want -server PROTOCOL/HOST:PORT, not %q", server)
	}
	client := dns.Client{Net: protocol, Timeout: timeout, Dialer: dialer(timeout)}
	enc := json.NewEncoder(os.Stdout)
	for _, name := range names {
		line := map[string]any{"name": name}
		m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
		a, _, err := client.ExchangeContext(ctx, m, addr)
		if err != nil {
			line["error"] = err.Error()
		} else {
			var addresses []string
			for _, r := range a.Answer {
				if r, ok := r.(*dns.A); ok {
					addresses = append(addresses, r.A.String())
				}
			}
			line["code"], line["addresses"], line["truncated"] = dns.RcodeToString[a.Rcode], addresses, a.Truncated
		}
		if err := enc.Encode(line); err != nil {
			return err
		}
	}
	return nil
}
