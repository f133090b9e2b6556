package audit

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"portcullis/identity"
)

// Options say what a log is held against.
type Options struct {
	// Roots are the trust bundle: the authorities that agents' certificates
	// lead to, old ones too. Empty: signatures are not checked.
	Roots []*x509.Certificate
	// TrustDomain that agents must be of; zero: any, but one for each log.
	TrustDomain spiffeid.TrustDomain
	// Expect are places in the chain that were noted before, by node; ""
	// stands for the only node.
	Expect map[identity.NodeName][]Head
	// Sealed: the last record must be the checkpoint of an agent that has stopped
	// in order. Any other may be where the end was cut off.
	Sealed bool
}

// Result is what became of one node's log.
type Result struct {
	Node        identity.NodeName `json:"node"`
	Files       []string          `json:"files"`
	First       uint64            `json:"first"`
	Head        Head              `json:"head"` // the last good record
	Begin       time.Time         `json:"begin,omitzero"`
	End         time.Time         `json:"end,omitzero"`
	Records     uint64            `json:"records"`
	Checkpoints uint64            `json:"checkpoints"`        // good ones
	Signed      uint64            `json:"signed"`             // up to which record; 0: none, or not checked
	TrustDomain string            `json:"trustDomain"`        // of the signatures
	Starts      uint64            `json:"starts"`             // of the agent
	Unclean     uint64            `json:"unclean"`            // of these, after it had died
	Lost        uint64            `json:"lost"`               // records that gaps tell of
	Unsigned    uint64            `json:"unsigned"`           // checkpoints that could not be signed
	ClockBack   time.Duration     `json:"clockBack,omitzero"` // furthest that the clock went back
	Adopted     uint64            `json:"adopted"`            // records that no agent signed before the next was started: it signed what it found
	Broken      *Broken           `json:"broken,omitempty"`   // nil: the log is whole

	doubt uint64 // from this record on nothing is sure to be as it was written; 0: all is
}

// Broken is the first record that is not as it was written.
type Broken struct {
	Sequence uint64 `json:"seq"`
	File     string `json:"file"`
	Line     int    `json:"line"` // where that is seen; 0: after the last line
	What     string `json:"what"`
}

// Verify judges every log of the set. The error tells of what could not be
// read; what is wrong with a log is in its Result.
func Verify(s *Set, o Options) ([]*Result, error) {
	var out []*Result
	for node := range o.Expect {
		if node != "" && s.Files[node] == nil {
			return nil, fmt.Errorf("there is no log of node %s, of which a record is expected", node)
		}
	}
	for _, node := range s.Nodes {
		r, err := verifyNode(node, s.Files[node], o)
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, nil
}

// verifier walks along one chain.
type verifier struct {
	o      Options
	res    *Result
	expect map[uint64]string

	td       spiffeid.TrustDomain
	origin   *Head     // what the first record follows, if that was removed
	junk     hash.Hash // bytes since the last record that are none
	junkSize int64
	junkAt   line
	seen     *Begin    // the rules, as far as they are signed
	begin    *Begin    // the last
	loose    uint64    // records since the last good checkpoint
	looseAt  time.Time // the first of them that this run of the agent wrote
	adopted  uint64    // how many of them are in res.Adopted
	excused  bool      // one of them says that there was no SVID to sign with
	last     *Record
	lastAt   line
	suspect  *item // does not follow last
}

// slack is what an unsigned end may be longer than the checkpoints' rules say.
const slack = 2

func verifyNode(node identity.NodeName, files []string, o Options) (*Result, error) {
	v := &verifier{o: o, res: &Result{Node: node, Files: files}, expect: map[uint64]string{}, td: o.TrustDomain, junk: sha256.New()}
	for _, h := range append(slices.Clone(o.Expect[node]), o.Expect[""]...) {
		v.expect[h.Sequence] = h.Hash
	}
	for it, err := range v.items(files) {
		if err != nil {
			return nil, err
		}
		if v.step(it); v.res.Broken != nil {
			break
		}
	}
	v.decide(nil)
	if v.res.Broken == nil {
		v.end()
	} else if v.res.Broken.Line > 0 {
		v.explain(files)
	}
	return v.res, nil
}

// item is a line and the record in it, if there is one.
type item struct {
	line   line
	record *Record
	err    error
}

// items reads all lines of a log. Bytes of overlong lines go to v.junk at once.
func (v *verifier) items(files []string) iter.Seq2[item, error] {
	return func(yield func(item, error) bool) {
		for _, f := range files {
			for l, err := range lines(f, v.junk) {
				it := item{line: l}
				if err == nil {
					it.record, it.err = parse(l.text)
				}
				if !yield(it, err) || err != nil {
					return
				}
			}
		}
	}
}

func (v *verifier) broken(seq uint64, at line, format string, args ...any) {
	if v.res.Broken == nil {
		v.res.doubt = seq
		v.res.Broken = &Broken{Sequence: seq, File: at.file, Line: at.number, What: fmt.Sprintf(format, args...)}
	}
}

// due is the number that comes next.
func (v *verifier) due() uint64 {
	if v.last == nil {
		return 1
	}
	return v.last.Sequence + 1
}

// step judges one line.
func (v *verifier) step(it item) {
	r := it.record
	if v.decide(r); v.res.Broken != nil {
		return
	}
	switch {
	case errors.Is(it.err, errAltered):
		v.broken(v.dueOr(r), it.line, "it was altered: it does not have the hash that it states")
		return
	case r == nil:
		if v.junkSize == 0 {
			v.junkAt = it.line
		}
		v.junkSize++ // counted in lines; the hash knows the bytes
		v.junk.Write(it.line.text)
		if !it.line.cut && !it.line.long {
			v.junk.Write([]byte{'\n'})
		}
		return
	}
	if !v.torn(it) || !v.place(it) {
		return
	}
	if v.last == nil {
		v.res.First, v.res.Begin = r.Sequence, r.Time
	} else if back := v.last.Time.Sub(r.Time); back > v.res.ClockBack {
		v.res.ClockBack = back
	}
	if want, ok := v.expect[r.Sequence]; ok {
		if want != r.Hash {
			v.broken(r.Sequence, it.line, "it is not the record that is expected here: the log was written anew")
			return
		}
		delete(v.expect, r.Sequence)
	}
	if v.loose == 0 {
		v.looseAt = r.Time
	}
	v.loose++
	if !v.own(it) {
		return
	}
	v.last, v.lastAt = r, it.line
	v.res.Records++
	v.res.Head, v.res.End = Head{r.Sequence, r.Hash}, r.Time
}

func (v *verifier) dueOr(r *Record) uint64 {
	if v.last == nil {
		return r.Sequence
	}
	return v.due()
}

// torn compares what lies between two records with what the latter says of it.
func (v *verifier) torn(it item) bool {
	var said *Torn
	if it.record.Begin != nil {
		said = it.record.Begin.Torn
	}
	switch sum := hex.EncodeToString(v.junk.Sum(nil)); {
	case v.junkSize > 0 && (said == nil || said.SHA256 != sum):
		v.broken(v.first(it.record), v.junkAt, "it cannot be read, and the record after it does not tell of it")
		return false
	case v.junkSize == 0 && said != nil:
		v.broken(it.record.Sequence, it.line, "it tells of %d torn bytes before it, which are not there", said.Bytes)
		return false
	}
	if v.junkSize > 0 {
		v.junk.Reset()
		v.junkSize = 0
	}
	return true
}

// place checks the record's place in the chain.
func (v *verifier) place(it item) bool {
	r := it.record
	if r.Node != v.res.Node {
		v.broken(v.dueOr(r), it.line, "it is of another log, that of node %s", clip(string(r.Node)))
		return false
	}
	if v.last == nil {
		if r.Sequence == 1 && r.Previous != zeroHash {
			v.broken(1, it.line, "the first record follows another")
			return false
		}
		if r.Sequence > 1 {
			v.origin = &Head{r.Sequence - 1, r.Previous}
		}
		if r.Begin == nil {
			v.broken(v.first(r), it.line, "the log does not begin here: the records before it are missing")
			return false
		}
		return true
	}
	switch due := v.due(); {
	case r.Sequence < due:
		v.broken(r.Sequence, it.line, "there are two records of this number: one was inserted, or a file is here twice, or the log was begun anew")
		v.res.doubt = due // the former one has its place in the chain
		return false
	case r.Sequence > due:
		v.broken(due, it.line, "it is missing: record %d follows", r.Sequence)
		return false
	}
	if r.Previous == v.last.Hash {
		return true
	}
	v.suspect = &it
	return false
}

// decide tells which of two records is wrong of which the latter does not
// follow the former: next is the one after both, nil if there is none.
func (v *verifier) decide(next *Record) {
	s := v.suspect
	switch {
	case s == nil:
	case next != nil && next.Previous != s.record.Hash:
		v.broken(s.record.Sequence, s.line, "it was altered: neither does it follow the record before it, nor the next one it")
	default:
		v.broken(v.last.Sequence, v.lastAt, "it was altered, and its hash made to fit: the next record follows another one")
	}
}

// first is the number of the record that is missing before r.
func (v *verifier) first(r *Record) uint64 {
	if v.last == nil {
		return max(1, r.Sequence-1)
	}
	return v.due()
}

// own judges what the log says of itself.
func (v *verifier) own(it item) bool {
	r := it.record
	if b := r.Begin; b != nil {
		if b.Version != Version {
			v.broken(r.Sequence, it.line, "it is of version %d of the format: use a newer portcullis", b.Version)
			return false
		}
		v.begin = b
	}
	switch r.Kind {
	case KindStart:
		v.res.Starts++
		if r.Begin == nil {
			v.broken(r.Sequence, it.line, "it says that it begins something, and not what")
			return false
		}
		if !r.Begin.Clean {
			v.res.Unclean++
		}
		return v.adopt(it)
	case KindGap:
		if r.Gap != nil {
			for _, n := range r.Gap.Lost {
				v.res.Lost += n
			}
		}
	case KindUnsigned:
		v.res.Unsigned++
		v.excused = true
	case KindRemoved:
		if m := r.Removed; m != nil && v.origin != nil && m.Last == v.origin.Sequence && m.Hash == v.origin.Hash {
			v.origin = nil
		}
	case KindCheckpoint:
		return v.checkpoint(it)
	}
	return true
}

func (v *verifier) checkpoint(it item) bool {
	r := it.record
	if len(v.o.Roots) == 0 {
		v.signed()
		return true
	}
	td, err := judge(r, v.o.Roots)
	if err == nil && !v.td.IsZero() && td != v.td {
		err = fmt.Errorf("it was signed in trust domain %s, not %s", td, v.td)
	}
	if err != nil {
		first := r.Sequence - v.loose + 1
		v.broken(r.Sequence, it.line, "the checkpoint over records %d to %d is not genuine: %s", first, r.Sequence, clip(err.Error()))
		v.res.doubt = first
		return false
	}
	v.td = td
	v.res.TrustDomain, v.res.Signed = td.Name(), r.Sequence
	v.signed()
	return true
}

// signed: a checkpoint vouches for all records up to here.
func (v *verifier) signed() {
	v.res.Checkpoints++
	v.loose, v.adopted, v.excused, v.seen = 0, 0, false, v.begin
}

// adopt judges the records that a starting agent found unsigned. It cannot know
// who wrote them, and the next checkpoint signs them with its own: so they may
// not be more than the agent before can have left.
func (v *verifier) adopt(it item) bool {
	v.looseAt = it.record.Time // nothing is signed while no agent runs
	found := v.loose - 1
	if len(v.o.Roots) > 0 && v.seen != nil && !v.excused && found > v.seen.mostLoose() {
		v.broken(it.record.Sequence-found, it.line, "from it on %d records were not signed before the agent was started anew: more than it leaves without a checkpoint", found)
		return false
	}
	v.res.Adopted += found - v.adopted
	v.adopted = found
	return true
}

// mostLoose is how many records can follow the last checkpoint.
func (b *Begin) mostLoose() uint64 { return uint64(max(0, b.Records))*slack + batch }

// end judges what can only be judged when all is read.
func (v *verifier) end() {
	after := line{file: v.res.Files[len(v.res.Files)-1]}
	if v.junkSize == 0 && v.last != nil {
		v.met(after)
	}
	switch {
	case v.junkSize > 0:
		v.broken(v.due(), v.junkAt, "the log ends within it: the agent died there and has not started since, or it is being written just now, or the log was cut")
	case v.last == nil:
		v.broken(1, after, "there is no record")
	case v.origin != nil:
		v.broken(v.origin.Sequence, line{file: v.res.Files[0], number: 1}, "it and all before it are missing, and no record tells of their removal")
		v.res.doubt = 0 // what is there is in its place
	case len(v.o.Roots) > 0 && v.res.Checkpoints == 0:
		v.broken(v.res.First, line{file: v.res.Files[0], number: 1}, "nothing of the log is signed yet")
	case v.o.Sealed && (v.loose > 0 || v.last.Checkpoint == nil || v.last.Checkpoint.Why != whyStop):
		v.broken(v.due(), after, "the log does not end with the checkpoint of an agent that stops: its end is cut off, or the agent runs, or died, or could not sign")
	case v.tooLoose():
		v.broken(v.last.Sequence-v.loose+1, v.lastAt, "from it on %d records are not signed: more than the agent leaves without a checkpoint", v.loose)
	}
}

// met tells of records that are expected and were not seen.
func (v *verifier) met(after line) {
	missing := Head{}
	for seq, hash := range v.expect {
		if seq > v.last.Sequence && (missing.Sequence == 0 || seq > missing.Sequence) {
			missing = Head{seq, hash}
		}
		if seq < v.res.First {
			v.broken(seq, line{file: v.res.Files[0], number: 1}, "it was removed, and cannot be compared with what is expected")
			v.res.doubt = 0 // what is there is in its place
		}
	}
	if missing.Sequence > 0 {
		v.broken(v.due(), after, "it is missing: the log ends before record %d, which is expected in it", missing.Sequence)
	}
}

// tooLoose tells whether more is unsigned at the end than can be.
func (v *verifier) tooLoose() bool {
	if len(v.o.Roots) == 0 || v.seen == nil || v.loose == 0 {
		return false
	}
	span := v.last.Time.Sub(v.looseAt).Seconds()
	return v.loose > v.seen.mostLoose() || span > v.seen.Interval*slack+60
}

// explain tells a record that is out of its place from one that is gone.
func (v *verifier) explain(files []string) {
	b := v.res.Broken
	if !strings.HasPrefix(b.What, "it is missing: record") {
		return
	}
	for it, err := range (&verifier{junk: sha256.New()}).items(files) {
		if err != nil {
			return
		}
		if it.record != nil && it.err == nil && it.record.Sequence == b.Sequence && it.record.Node == v.res.Node {
			b.What = fmt.Sprintf("it is out of its place: it stands in line %d of %s", it.line.number, it.line.file)
			return
		}
	}
}
