package audit

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"portcullis/identity"
	"portcullis/ipcache/lease"
)

// written is a log as it lies on the disk: lines by file, in order.
type written struct {
	files [][][]byte // of lines with their newline
}

// generate writes a log of some records with checkpoints and several files.
func generate(t testing.TB, rng *rand.Rand, a *authority, node string) written {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit.log")
	cfg := Config{Path: path, Node: identity.NodeName(node), Signer: a.agent(node), Records: 5 + rng.IntN(10), MaxBytes: int64(4000 + rng.IntN(8000)), Sync: SyncNone}
	kinds := []lease.LogKind{lease.LogGrant, lease.LogConfirmed, lease.LogRefusal, lease.LogRevocation, lease.LogRenewalGap}
	for range 1 + rng.IntN(3) {
		l, err := Open(cfg)
		must(t, err)
		must(t, l.ask(func(w *writer) { w.tried = time.Time{} }))
		for range 5 + rng.IntN(40) {
			e := full
			e.Kind, e.Reason = kinds[rng.IntN(len(kinds))], fmt.Sprint(rng.Uint64())
			must(t, l.Append(e, peer))
			if rng.IntN(4) == 0 { // so that writes, checkpoints and files fall anywhere
				must(t, l.ask(func(w *writer) { w.drain(); w.flush(); w.tried = time.Time{} }))
			}
		}
		must(t, l.Close())
	}
	s, err := Find(path)
	must(t, err)
	var out written
	for _, f := range s.Files[cfg.Node] {
		data, err := os.ReadFile(f)
		must(t, err)
		out.files = append(out.files, slices.Collect(linesOf(data)))
	}
	return out
}

func linesOf(data []byte) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for l := range bytes.Lines(data) {
			if !yield(bytes.Clone(l)) {
				return
			}
		}
	}
}

func (w written) clone() (out written) {
	for _, f := range w.files {
		out.files = append(out.files, slices.Clone(f))
	}
	return out
}

func (w written) save(t testing.TB) string {
	dir := t.TempDir()
	for i, f := range w.files {
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("f%03d", i)), bytes.Join(f, nil), 0o600))
	}
	return dir
}

func (w written) total() (n int) {
	for _, f := range w.files {
		n += len(f)
	}
	return n
}

// at returns where record i (from 0) lies.
func (w written) at(i int) (file, row int) {
	for file < len(w.files) && i >= len(w.files[file]) {
		i -= len(w.files[file])
		file++
	}
	return file, i
}

func (w written) record(t testing.TB, i int) *Record {
	f, row := w.at(i)
	r, err := parse(bytes.TrimSuffix(w.files[f][row], []byte{'\n'}))
	must(t, err)
	return r
}

// resealed returns the record's line with its own hash made to fit.
func resealed(t testing.TB, r *Record) []byte {
	c := *r
	text, err := c.seal()
	must(t, err)
	return text
}

// tamperings return the number of the record that must be named.
var tamperings = map[string]func(t testing.TB, rng *rand.Rand, w, other *written, i int) uint64{
	"edit a byte": func(t testing.TB, rng *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		text := bytes.Clone(w.files[f][row])
		k := rng.IntN(len(text) - 1)
		text[k] ^= byte(1 + rng.IntN(127))
		if text[k] == '\n' { // one line more
			text[k] ^= 64
		}
		w.files[f][row] = text
		return uint64(i + 1)
	},
	"edit and make the hash fit": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		r := w.record(t, i)
		r.Reason = "it was not me"
		w.files[f][row] = resealed(t, r)
		return uint64(i + 1)
	},
	"edit, and all hashes after it": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		named := uint64(0)
		prev := ""
		for k := i; k < w.total(); k++ {
			f, row := w.at(k)
			r := w.record(t, k)
			if r.Kind == KindCheckpoint && named == 0 {
				named = r.Sequence // no nearer: its signature is the first that does not fit
			}
			if k == i {
				r.Reason = "it was not me"
			} else {
				r.Previous = prev
			}
			w.files[f][row] = resealed(t, r)
			prev = w.record(t, k).Hash
		}
		return named
	},
	"delete": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		w.files[f] = slices.Delete(w.files[f], row, row+1)
		return uint64(i + 1)
	},
	"insert a copy": func(t testing.TB, rng *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		from := rng.IntN(i + 1)
		cf, crow := w.at(from)
		w.files[f] = slices.Insert(w.files[f], row+1, w.files[cf][crow])
		return uint64(from + 1)
	},
	"insert a forgery that fits": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		r := w.record(t, i)
		forged := &Record{Sequence: r.Sequence + 1, Previous: r.Hash, Time: r.Time, Node: r.Node, Kind: lease.LogConfirmed}
		w.files[f] = slices.Insert(w.files[f], row+1, resealed(t, forged))
		return r.Sequence + 1
	},
	"swap": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		g, other := w.at(i + 1)
		w.files[f][row], w.files[g][other] = w.files[g][other], w.files[f][row]
		return uint64(i + 1)
	},
	"cut within a record": func(t testing.TB, rng *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		text := w.files[f][row]
		w.files[f] = append(w.files[f][:row:row], text[:1+rng.IntN(len(text)-2)])
		w.files = w.files[:f+1]
		return uint64(i + 1)
	},
	"cut": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		w.files[f] = w.files[f][:row]
		w.files = w.files[:f+1]
		return uint64(i + 1)
	},
	"a file is gone": func(t testing.TB, _ *rand.Rand, w, _ *written, i int) uint64 {
		f, row := w.at(i)
		w.files = slices.Delete(w.files, f, f+1)
		if f == 0 {
			return 0 // the last of the first file
		}
		return uint64(i - row + 1)
	},
	"splice": func(t testing.TB, rng *rand.Rand, w, other *written, i int) uint64 {
		f, row := w.at(i)
		g, from := other.at(min(i, other.total()-1))
		w.files[f] = append(w.files[f][:row:row], other.files[g][from:]...)
		return uint64(i + 1)
	},
	"splice under this node's name": func(t testing.TB, rng *rand.Rand, w, other *written, i int) uint64 {
		f, row := w.at(i)
		r := other.record(t, min(i, other.total()-1))
		mine := w.record(t, i)
		r.Node, r.Sequence, r.Previous = mine.Node, mine.Sequence, mine.Previous
		w.files[f][row] = resealed(t, r)
		return uint64(i + 1)
	},
}

// Whatever is done to a log is found, at the record to which it was done.
func TestTampering(t *testing.T) {
	a := newAuthority(t)
	logs := 12
	if testing.Short() {
		logs = 2
	}
	for seed := range uint64(logs) {
		rng := rand.New(rand.NewPCG(seed, 6))
		log, other := generate(t, rng, a, "n1"), generate(t, rng, a, "n2")
		total, o := log.total(), a.options()
		if r := whole(t, o, log.save(t)); r.Records != uint64(total) || r.Signed != uint64(total) {
			t.Fatalf("seed %d: %+v", seed, r)
		}
		end := log.record(t, total-1)
		o.Expect = map[identity.NodeName][]Head{"n1": {{end.Sequence, end.Hash}}}
		for what, tamper := range tamperings {
			for range 12 {
				i := rng.IntN(total - 1)
				w := log.clone()
				if what == "a file is gone" && len(w.files) < 2 || (what == "swap" || what == "delete" || what == "splice") && i == 0 {
					continue
				}
				want := tamper(t, rng, &w, &other, i)
				if want == 0 { // the first file is gone
					want = uint64(len(log.files[0]))
				}
				if what == "cut" && i == 0 {
					continue // nothing is left
				}
				dir := w.save(t)
				s, err := Find(dir)
				must(t, err)
				if what == "cut within a record" && i == 0 {
					if len(s.Nodes) > 0 {
						t.Errorf("half a record is a log: %v", s)
					}
					continue
				}
				res, err := Verify(s, o)
				must(t, err)
				if len(res) == 0 || res[0].Broken == nil || res[0].Broken.Sequence != want {
					t.Errorf("seed %d, %s at record %d: want %d, got %s", seed, what, i+1, want, show(res))
				}
			}
		}
	}
}

func show(v any) string {
	b, _ := json.Marshal(v)
	return string(b)
}

// Where nothing is expected, an end that was cut off shows in a sealed log, and
// is otherwise said to be unsigned.
func TestCutEnd(t *testing.T) {
	a := newAuthority(t)
	log := generate(t, rand.New(rand.NewPCG(1, 1)), a, "n1")
	f := len(log.files) - 1
	n := log.total()
	log.files[f] = log.files[f][:len(log.files[f])-1]
	o := a.options()
	dir := log.save(t)
	if r := whole(t, o, dir); r.Signed == 0 || r.Signed >= r.Head.Sequence {
		t.Errorf("%+v", r)
	}
	o.Sealed = true
	if b := judged(t, o, dir).Broken; b == nil || b.Sequence != uint64(n) {
		t.Errorf("%+v", b)
	}
}

// More than an agent leaves unsigned was not written by it.
func TestLongUnsignedEnd(t *testing.T) {
	a := newAuthority(t)
	log := generate(t, rand.New(rand.NewPCG(2, 1)), a, "n1")
	last := log.record(t, log.total()-1)
	f := len(log.files) - 1
	for range 2000 {
		r := &Record{Sequence: last.Sequence + 1, Previous: last.Hash, Time: last.Time.Add(time.Millisecond), Node: "n1", Kind: lease.LogConfirmed}
		log.files[f] = append(log.files[f], resealed(t, r))
		c := *r
		_, err := c.seal()
		must(t, err)
		last = &c
	}
	if b := judged(t, a.options(), log.save(t)).Broken; b == nil || b.Sequence != uint64(log.total()-1999) {
		t.Errorf("%+v", b)
	}
}

// An agent that dies at any byte leaves a log that the next one continues: what
// was whole stays, what was not is named, and a second death changes nothing.
func TestCrashAtAnyByte(t *testing.T) {
	a := newAuthority(t)
	cfg := Config{Node: "n1", Signer: a.agent("n1"), Sync: SyncNone}
	dir := t.TempDir()
	cfg.Path = filepath.Join(dir, "audit.log")
	l, err := Open(cfg)
	must(t, err)
	for range 3 {
		must(t, l.Append(full, peer))
	}
	must(t, l.Close())
	data, err := os.ReadFile(cfg.Path)
	must(t, err)
	rng := rand.New(rand.NewPCG(3, 3))
	first := bytes.IndexByte(data, '\n')
	for n := 0; n <= len(data); n++ {
		// Every byte around the ends of lines, and some of the others.
		if near := bytes.IndexByte(data[max(0, n-3):min(n+3, len(data))], '\n') >= 0; !near && n > first && n%11 != 0 || !near && n < first && n%29 != 0 {
			continue
		}
		cut := bytes.Clone(data[:n])
		complete := bytes.Count(cut, []byte{'\n'})
		if n < len(data) && data[n] == '\n' {
			complete++ // only its newline is missing
		}
		sub := filepath.Join(dir, "x")
		must(t, os.RemoveAll(sub))
		must(t, os.Mkdir(sub, 0o700))
		cfg.Path = filepath.Join(sub, "audit.log")
		must(t, os.WriteFile(cfg.Path, cut, 0o600))
		starts := 1
		for range 2 {
			l, err := Open(cfg)
			must(t, err)
			must(t, l.Append(full, peer))
			must(t, l.Close())
			starts++
			// Die again, within what was just written.
			now, err := os.ReadFile(cfg.Path)
			must(t, err)
			if complete == 0 {
				break // it was set aside: another log
			}
			if !bytes.HasPrefix(now, cut) {
				t.Fatalf("cut at %d: something was taken away", n)
			}
			must(t, os.Truncate(cfg.Path, int64(n+rng.IntN(len(now)-n+1))))
		}
		l, err := Open(cfg)
		must(t, err)
		must(t, l.Close())
		s, err := Find(sub)
		must(t, err)
		res, err := Verify(s, a.options())
		must(t, err)
		if len(res) != 1 || res[0].Broken != nil || res[0].Records < uint64(complete) {
			t.Fatalf("cut at %d: %s", n, show(res))
		}
	}
}

// A death between two files leaves none at the path, or an empty one.
func TestCrashBetweenFiles(t *testing.T) {
	a := newAuthority(t)
	for _, half := range []string{"", "{\"seq\":7"} {
		dir := t.TempDir()
		cfg := Config{Path: filepath.Join(dir, "audit.log"), Node: "n1", Signer: a.agent("n1")}
		l, err := Open(cfg)
		must(t, err)
		must(t, l.Close())
		must(t, os.Rename(cfg.Path, rotatedName(cfg.Path, 1)))
		if half != "" {
			must(t, os.WriteFile(cfg.Path, []byte(half), 0o600))
		}
		l, err = Open(cfg)
		must(t, err)
		must(t, l.Close())
		if r := whole(t, a.options(), dir); len(r.Files) != 2 || r.Records != 4 {
			t.Errorf("%+v", r)
		}
	}
}

// A log of before the chain is set aside, not spoilt.
func TestUnchainedLog(t *testing.T) {
	a := newAuthority(t)
	dir := t.TempDir()
	cfg := Config{Path: filepath.Join(dir, "audit.log"), Node: "n1", Signer: a.agent("n1")}
	old := []byte("{\"time\":\"2026-01-01T00:00:00Z\",\"node\":\"n1\",\"kind\":\"grant\"}\n")
	must(t, os.WriteFile(cfg.Path, old, 0o600))
	l, err := Open(cfg)
	must(t, err)
	must(t, l.Close())
	s, err := Find(dir)
	must(t, err)
	if len(s.Ignored) != 1 {
		t.Fatalf("%+v", s)
	}
	if data, err := os.ReadFile(s.Ignored[0]); err != nil || !bytes.Equal(data, old) {
		t.Errorf("%q %v", data, err)
	}
	whole(t, a.options(), dir)
}

// Logs of many nodes in one directory are judged apart.
func TestTwoNodes(t *testing.T) {
	a := newAuthority(t)
	rng := rand.New(rand.NewPCG(4, 4))
	one, two := generate(t, rng, a, "n1"), generate(t, rng, a, "n2")
	two.files[0][1] = bytes.Replace(two.files[0][1], []byte("n2"), []byte("n3"), 1)
	dir := t.TempDir()
	must(t, os.CopyFS(filepath.Join(dir, "a"), os.DirFS(one.save(t))))
	must(t, os.CopyFS(filepath.Join(dir, "b"), os.DirFS(two.save(t))))
	s, err := Find(dir)
	must(t, err)
	res, err := Verify(s, a.options())
	must(t, err)
	if len(res) != 2 || res[0].Broken != nil || res[1].Broken == nil || res[1].Broken.Sequence != 2 {
		t.Errorf("%s", show(res))
	}
}

// What is not a log, or a hostile one, is read to its end without harm.
func FuzzRead(f *testing.F) {
	a := newAuthority(f)
	r := &Record{Sequence: 1, Node: "n1", Kind: KindStart, Begin: &Begin{Version: 1}, Previous: zeroHash}
	text, err := r.seal()
	must(f, err)
	f.Add(text)
	f.Add(append(bytes.Clone(text), text...))
	f.Add([]byte("{\"seq\":1}\n\x00\n"))
	c := &Record{Sequence: 2, Node: "n1", Kind: KindCheckpoint, Previous: r.Hash, Time: time.Now().UTC()}
	must(f, sign(a.agent("n1"), c, "stop"))
	more, err := c.seal()
	must(f, err)
	f.Add(append(bytes.Clone(text), more...))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		n := 0
		for l, err := range readLines(bytes.NewReader(data), "x", io.Discard) {
			must(t, err)
			if n += len(l.text); !l.cut {
				n++
			}
		}
		if n != len(data) && len(data) < maxLine {
			t.Errorf("%d of %d bytes were read", n, len(data))
		}
		path := filepath.Join(dir, "f")
		must(t, os.WriteFile(path, data, 0o600))
		s, err := Find(path)
		must(t, err)
		for _, sealed := range []bool{false, true} {
			o := a.options()
			o.Sealed = sealed
			_, err = Verify(s, o)
			must(t, err)
		}
		if _, err := lastRecord(bytes.NewReader(data), int64(len(data))); err != nil {
			t.Error(err)
		}
	})
}
