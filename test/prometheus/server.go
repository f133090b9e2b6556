package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const listen = "127.0.0.1:9090" // in the network namespace of a node

// prometheus is one that runs, and how to ask it.
type prometheus struct {
	cmd     *exec.Cmd
	dir     string
	client  http.Client
	version string
}

// startPrometheus runs one in the network namespace of the first node.
func (w *world) startPrometheus(ctx context.Context, rules string) (*prometheus, error) {
	dir, err := os.MkdirTemp("", "portcullis-prometheus")
	if err != nil {
		return nil, err
	}
	p := &prometheus{dir: dir}
	rules, err = filepath.Abs(rules)
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	config := fmt.Sprintf("global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [%q]\nscrape_configs:\n- job_name: portcullis\n  static_configs:\n  - targets: [%s]\n",
		rules, strings.Join(w.targets, ", "))
	path := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		return nil, errors.Join(err, p.stop())
	}
	p.cmd = exec.Command("prometheus", "--config.file="+path, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+listen, "--log.level=warn")
	p.cmd.Stderr, p.cmd.Stdout = os.Stderr, os.Stderr
	// A child has the namespaces of the thread that made it.
	if err := w.InNode(w.first, p.cmd.Start); err != nil {
		p.cmd = nil
		return nil, errors.Join(err, p.stop())
	}
	p.client = http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DialContext: func(ctx context.Context, network, address string) (c net.Conn, err error) {
		err = w.InNode(w.first, func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, address)
			return err
		})
		return c, err
	}}}
	err = p.until(ctx, "Prometheus answers", func() error {
		var info struct{ Version string }
		err := p.ask(ctx, "/api/v1/status/buildinfo", &info)
		p.version = info.Version
		return err
	})
	if err != nil {
		return nil, errors.Join(err, p.stop())
	}
	return p, nil
}

// stop ends it and removes its data.
func (p *prometheus) stop() error {
	var err error
	if p.cmd != nil {
		_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
		ended := make(chan error, 1)
		go func() { ended <- p.cmd.Wait() }()
		select {
		case <-ended: // of a signal, mostly
		case <-time.After(20 * time.Second):
			_ = p.cmd.Process.Kill()
			<-ended
		}
	}
	return errors.Join(err, os.RemoveAll(p.dir))
}

// ask reads the data of an answer.
func (p *prometheus) ask(ctx context.Context, path string, data any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+listen+path, nil)
	if err != nil {
		return err
	}
	answer, err := p.client.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(io.LimitReader(answer.Body, 8<<20))
	if err != nil {
		return err
	}
	var in struct {
		Status, Error string
		Warnings      []string
		Data          json.RawMessage
	}
	if err := json.Unmarshal(b, &in); err != nil {
		return fmt.Errorf("%s: %w", answer.Status, err)
	}
	if in.Status != "success" || len(in.Warnings) > 0 {
		return fmt.Errorf("%s: %s %v", in.Status, in.Error, in.Warnings)
	}
	return json.Unmarshal(in.Data, data)
}

// instant evaluates a query now, and returns its values.
func (p *prometheus) instant(ctx context.Context, expr string) (values []float64, err error) {
	var data struct {
		ResultType string
		Result     []struct{ Value [2]any }
	}
	if err := p.ask(ctx, "/api/v1/query?query="+url.QueryEscape(expr), &data); err != nil {
		return nil, err
	}
	for _, r := range data.Result {
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, err
		}
		values = append(values, v)
	}
	return values, nil
}

func (p *prometheus) count(ctx context.Context, expr string) (int, error) {
	values, err := p.instant(ctx, expr)
	return len(values), err
}

func (p *prometheus) value(ctx context.Context, expr string) (float64, error) {
	values, err := p.instant(ctx, expr)
	if err == nil && len(values) != 1 {
		err = fmt.Errorf("%s has %d values", expr, len(values))
	}
	if err != nil {
		return 0, err
	}
	return values[0], nil
}

func (p *prometheus) has(ctx context.Context, expr string, want float64) error {
	v, err := p.value(ctx, expr)
	if err == nil && v != want {
		err = fmt.Errorf("%s is %v, want %v", expr, v, want)
	}
	return err
}

func (p *prometheus) atLeast(ctx context.Context, expr string, want float64) error {
	v, err := p.value(ctx, expr)
	if err == nil && v < want {
		err = fmt.Errorf("%s is %v, want %v or more", expr, v, want)
	}
	return err
}

// rules returns how many rules there are, all of them evaluated and well.
func (p *prometheus) rules(ctx context.Context) (n int, err error) {
	err = p.until(ctx, "every rule is evaluated", func() error {
		var data struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
		if err := p.ask(ctx, "/api/v1/rules", &data); err != nil {
			return err
		}
		n = 0
		for _, g := range data.Groups {
			for _, r := range g.Rules {
				if n++; r.Health != "ok" {
					return fmt.Errorf("%s: %s %s", r.Name, r.Health, r.LastError)
				}
			}
		}
		if n == 0 {
			return errors.New("there are no rules")
		}
		return nil
	})
	return n, err
}

// until polls until f returns nil.
func (p *prometheus) until(ctx context.Context, what string, f func() error) error {
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline) && ctx.Err() == nil; time.Sleep(200 * time.Millisecond) {
		if err = f(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("not in time: %s: %w", what, errors.Join(err, ctx.Err()))
}
