package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portcullis/chaos/lab"
)

// others are the proxies to compare with: Debian packages of those names.
var others = []string{"nginx", "haproxy"}

// install installs what is missing.
func install(ctx context.Context) error {
	for _, name := range others {
		if _, err := program(name); err == nil {
			continue
		}
		fmt.Fprintf(os.Stderr, "%s is missing: apt-get install %s\n", name, name)
		cmd := exec.CommandContext(ctx, "apt-get", "install", "-y", "--no-install-recommends", name)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1")
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("install %s: %w", name, err)
		}
	}
	return nil
}

func program(name string) (string, error) {
	if at, err := exec.LookPath(name); err == nil {
		return at, nil
	}
	return exec.LookPath("/usr/sbin/" + name)
}

// version says which one it is.
func version(name string) string {
	at, err := program(name)
	if err != nil {
		return err.Error()
	}
	b, err := exec.Command(at, "-v").CombinedOutput()
	if err != nil {
		return err.Error()
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

const nginxConfig = `
daemon off;
pid DIRECTORY/nginx.pid;
error_log stderr error;
worker_processes 2;
worker_rlimit_nofile 20000;
events { worker_connections 8192; }
http {
  access_log off;
  client_body_temp_path DIRECTORY/body; proxy_temp_path DIRECTORY/proxy; fastcgi_temp_path DIRECTORY/f; uwsgi_temp_path DIRECTORY/u; scgi_temp_path DIRECTORY/s;
  keepalive_requests 1000000000;
  keepalive_timeout 1h;
  upstream web { server SERVER:8080; keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h; }
  upstream calls { server SERVER:9080; keepalive 64; keepalive_requests 1000000000; keepalive_timeout 1h; }
  server { listen 8080 backlog=4096; location / { proxy_pass http://web; proxy_http_version 1.1; proxy_set_header Connection ""; } }
  server { listen 9080 http2 backlog=4096; location / { grpc_pass grpc://calls; } }
}
`

const haproxyConfig = `
global
  maxconn 8000
  nbthread 2
defaults
  mode http
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  http-reuse always
frontend web
  bind :8080
  default_backend web
backend web
  server s SERVER:8080
frontend calls
  bind :9080 proto h2
  default_backend calls
backend calls
  server s SERVER:9080 proto h2
`

// startOther starts one in the network namespace of a workload, towards a server.
func startOther(ctx context.Context, l *lab.Lab, name, workload string, at, server netip.Addr, dir string) (stop func() error, pid int, err error) {
	path, err := program(name)
	if err != nil {
		return nil, 0, err
	}
	file := filepath.Join(dir, name+".conf")
	config, args := nginxConfig, []string{"-c", file, "-p", dir}
	if name == "haproxy" {
		config, args = haproxyConfig, []string{"-f", file, "-db"}
	}
	config = strings.NewReplacer("DIRECTORY", dir, "SERVER", server.String()).Replace(config)
	if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
		return nil, 0, err
	}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = io.Discard, os.Stderr
	if err := l.InWorkload(workload, cmd.Start); err != nil {
		return nil, 0, err
	}
	stop = func() error {
		return errors.Join(cmd.Process.Signal(syscall.SIGTERM), ignoreExit(cmd.Wait()))
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		err := l.InWorkload(workload, func() error {
			c, err := net.Dial("tcp4", netip.AddrPortFrom(at, 8080).String())
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			return stop, cmd.Process.Pid, nil
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return nil, 0, errors.Join(fmt.Errorf("%s does not listen: %w", name, err), stop())
		}
	}
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // it was told to end
	}
	return err
}

// family returns a process and its children.
func family(pid int) []int {
	out := []int{pid}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return out // without that file in the kernel, its own time is all that is known
	}
	for _, f := range strings.Fields(string(b)) {
		if child, err := strconv.Atoi(f); err == nil {
			out = append(out, family(child)...)
		}
	}
	return out
}
