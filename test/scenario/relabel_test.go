package scenario

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"portcullis/agent/api"
	"portcullis/chaos/lab"
)

// A client that gets other labels on its node loses on the server's node what
// its old ones were allowed there: the flows that it has open, and new ones.
// With `strict` it is so from the answer on, with `prompt` as soon as the
// revocation has arrived.
func TestRelabelAcrossNodes(t *testing.T) {
	for _, mode := range []string{"prompt", "strict"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) { c.AgentFlags = []string{"--relabel=" + mode} })
			traffic := w.live()
			traffic.lossless()
			before := w.binding(w.client)
			drop := w.watchDrops(w.client)
			r := w.relabel(w.client, "other", 10*time.Second)
			if r.GetState() != "active" || r.GetGeneration() <= before.GetGeneration() || r.GetLeases() != 1 {
				t.Errorf("%v, the binding was %v", r, before)
			}
			if mode == "prompt" {
				w.eventually("the revocation arrives", func() error {
					if b := w.binding(w.client); b.GetStamp() == before.GetStamp() {
						return errors.New("it is believed in still")
					}
					return nil
				})
			}
			traffic.isShut()
			if e := drop("policy-denied"); e.GetGeneration() != r.GetGeneration() || !strings.Contains(e.GetSource().GetText(), "app=other") {
				t.Errorf("told as %v, the generation is %d", e, r.GetGeneration())
			}

			// And back: a stranger's ends, a client's begin.
			r = w.relabel(w.client, "client", 10*time.Second)
			w.eventually("the client gets in again", func() error { return w.reach(w.client) })
			if b := w.binding(w.client); b.GetGeneration() != r.GetGeneration() {
				t.Errorf("believed under %v, its generation is %d", b, r.GetGeneration())
			}
			w.relabel(w.stranger, "client", 10*time.Second)
			w.eventually("the stranger is a client", func() error { return w.reach(w.stranger) })
		})
	}
}

// The same when the two agents cannot talk: `strict` keeps the workload shut
// until the lease on its former identity has ended; with `prompt` it goes on,
// and is taken for what it was until then, and not for longer.
func TestRelabelAcrossACut(t *testing.T) {
	for _, mode := range []string{"prompt", "strict"} {
		t.Run(mode, func(t *testing.T) {
			w := newWorld(t, func(c *lab.Config) {
				c.AgentFlags, c.TTL, c.Heartbeat = []string{"--relabel=" + mode}, 3*time.Second, 300*time.Millisecond
			})
			traffic := w.live()
			traffic.lossless()
			before := w.binding(w.client)
			w.must(w.Cut(t.Context(), owner, verifier))
			r := w.relabel(w.client, "other", 0)
			switch {
			case mode == "prompt" && r.GetState() != "active", mode == "strict" && r.GetState() != "quarantined":
				t.Errorf("%v", r)
			case mode == "strict":
				traffic.isShut()
			}
			w.eventually("the lease on its former identity ends", func() error {
				if b := w.binding(w.client); b.GetStamp() == before.GetStamp() && b.GetState() == "live" {
					return errors.New(b.String())
				}
				return nil
			})
			traffic.isShut()
			generation := w.active(w.client).GetGeneration()
			traffic.isShut()
			drop := w.watchDrops(w.client)
			w.must(w.Heal(t.Context(), owner, verifier))
			w.eventually("it is known as what it is", func() error {
				traffic.isShut()
				if b := w.binding(w.client); b.GetGeneration() != generation || b.GetState() != "live" {
					return errors.New(b.String())
				}
				return nil
			})
			traffic.isShut()
			drop("policy-denied")
		})
	}
}

// relabel gives a workload of the owner's another app.
func (w *world) relabel(r lab.Running, app string, wait time.Duration) *api.RelabelWorkloadResponse {
	w.t.Helper()
	res, err := w.api(owner).RelabelWorkload(w.t.Context(), &api.RelabelWorkloadRequest{Uid: r.UID.String(),
		Labels: map[string]string{"app": app}, Wait: durationpb.New(wait)})
	w.must(err)
	return res
}

// isShut tries the flows that are open, and a new one: nothing gets in. The
// traffic was ended before.
func (l *live) isShut() {
	l.w.t.Helper()
	heard, received := l.w.echo.from(l.w.client), l.received.Load()
	for range 3 {
		l.udp.Write(make([]byte, 8))
		l.udp.Write(make([]byte, 8))
		l.tcp.SetDeadline(time.Now().Add(100 * time.Millisecond))
		l.tcp.Write(make([]byte, 8))
		if n, err := io.ReadFull(l.tcp, make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			l.w.t.Errorf("the open connection: %d bytes, %v", n, err)
		}
		if c, err := l.w.dial(l.w.client, 100*time.Millisecond); err == nil {
			c.Close()
			l.w.t.Error("a new connection is open")
		} else if n := net.Error(nil); !errors.As(err, &n) || !n.Timeout() {
			l.w.t.Errorf("a new connection: %v", err)
		}
	}
	if h, r := l.w.echo.from(l.w.client), l.received.Load(); h != heard || r != received {
		l.w.t.Errorf("the server heard %d times, the client was answered %d times", h-heard, r-received)
	}
}
