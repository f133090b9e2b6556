package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Table is a part of a report for a terminal. The first row is its head.
type Table struct {
	Title string
	Rows  [][]string
}

// Tables returns the report as tables. Texts in them are as the log has them:
// print them with Plain.
func (r *Report) Tables() []Table {
	broken := 0
	for _, l := range r.Logs {
		if l.Broken != nil {
			broken++
		}
	}
	trust := "the chain is whole; signatures were not checked (--trust-bundle)"
	switch {
	case broken > 0:
		trust = fmt.Sprintf("%d of %d LOGS ARE BROKEN: see audit verify; what follows a break is left out", broken, len(r.Logs))
	case r.Checked:
		trust = "the logs are whole and signed by their agents"
	}
	head := fmt.Sprintf("%d records of %d nodes, %s to %s: %s", r.Records, len(r.Logs), at(r.Since), at(r.Until), trust)
	num := func(n int) string { return fmt.Sprint(n) }
	add := func(title string, header []string, n int, row func(i int) []string) Table {
		if n == 0 {
			return Table{Title: title + ": none"}
		}
		t := Table{title, [][]string{header}}
		for i := range n {
			t.Rows = append(t.Rows, row(i))
		}
		return t
	}
	var evidence Table
	evidence.Title = "EVIDENCE: none"
	if len(r.Evidence) > 0 {
		evidence = Table{"EVIDENCE (share of believed time)", [][]string{{"EVIDENCE", "CONFIRMATIONS", "BELIEVED", "SHARE"}}}
		for _, e := range sortedKeys(r.Evidence) {
			s := r.Evidence[e]
			evidence.Rows = append(evidence.Rows, []string{e, num(s.Confirmations), span(s.Seconds), fmt.Sprintf("%.1f%%", s.Percent)})
		}
	}
	out := []Table{{Title: head},
		add("CONFIRMED", []string{"IDENTITY", "EVIDENCE", "BY", "BELIEVED BY", "IPS", "TIMES", "BELIEVED", "LONGEST"}, len(r.Identities), func(i int) []string {
			s := r.Identities[i]
			return []string{s.Identity, strings.Join(s.Evidence, ","), strings.Join(s.Owners, ","), strings.Join(s.Verifiers, ","), num(s.IPs), num(s.Confirmations), span(s.Seconds), span(s.Longest)}
		}),
		evidence,
		r.coverageTable(),
		add("PROVED BY SVID", []string{"IDENTITY", "SPIFFE ID", "CERTIFICATE", "ISSUER", "TOLD BY", "PEER", "TIMES", "FIRST", "LAST"}, len(r.Proofs), func(i int) []string {
			x := r.Proofs[i]
			return []string{x.Identity, x.SPIFFEID, x.Serial, x.Issuer, string(x.Node), string(x.Peer), num(x.Count), at(x.First), at(x.Last)}
		}),
		add("WEAKENED", []string{"IDENTITY", "TOLD BY", "PEER", "AT", "EVIDENCE LEFT", "REASON"}, len(r.Weakenings), func(i int) []string {
			x := r.Weakenings[i]
			return []string{x.Identity, string(x.Node), string(x.Peer), at(x.At), x.Evidence, x.Reason}
		}),
		add("REFUSED", []string{"REASON", "TOLD BY", "PEER", "TIMES", "FIRST", "LAST"}, len(r.Refusals), func(i int) []string {
			x := r.Refusals[i]
			return []string{x.Reason, string(x.Node), string(x.Peer), num(x.Count), at(x.First), at(x.Last)}
		}),
		add("REUSED", []string{"IP", "NODE", "BEFORE", "AFTER", "ACTIVE", "GAP", "WAITED", "OVERLAP"}, len(r.Reuse), func(i int) []string {
			x := r.Reuse[i]
			return []string{x.IP.String(), string(x.Node), x.Before, x.After, at(x.Activated), span(x.Gap), span(x.Quarantine), span(x.Overlap)}
		}),
		add("RENEWAL GAPS", []string{"NODE", "PEER", "FROM", "FOR", "REASON"}, len(r.Gaps), func(i int) []string {
			x := r.Gaps[i]
			return []string{string(x.Node), string(x.Peer), at(x.At), span(x.For), x.Reason}
		}),
	}
	for _, what := range sortedKeys(r.Omitted) {
		out = append(out, Table{Title: fmt.Sprintf("%d more rows of %s are left out: choose a shorter time, a namespace or a node", r.Omitted[what], what)})
	}
	return out
}

// coverageTable is the share of admitted flows by evidence.
func (r *Report) coverageTable() Table {
	const title = "COVERAGE"
	if len(r.Coverage) == 0 {
		return Table{Title: title + ": no flows were counted"}
	}
	what := title + " (share of admitted flows"
	if r.Filter.Namespace != "" || r.Filter.Identity != "" {
		what += ", of all namespaces and identities"
	}
	if r.FlowsLost > 0 {
		what += fmt.Sprintf("; %d events of packets were lost and are not counted", r.FlowsLost)
	}
	t := Table{what + ")", [][]string{{"EVIDENCE", "FLOWS", "SHARE"}}}
	for _, e := range sortedKeys(r.Coverage) {
		s := r.Coverage[e]
		t.Rows = append(t.Rows, []string{e, fmt.Sprint(s.Flows), fmt.Sprintf("%.1f%%", s.Percent)})
	}
	return t
}

func at(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02T15:04:05Z")
}

// Line returns a line of the log for a person. It is fit for a terminal.
func Line(text []byte) string {
	r, err := parse(text)
	if r == nil {
		return "(not a record) " + clip(string(text))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %6d %-12s", r.Time.UTC().Format("2006-01-02T15:04:05.000Z"), r.Sequence, r.Kind)
	add := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, " %s=%s", key, value)
		}
	}
	add("peer", string(r.Peer))
	if r.IP.IsValid() {
		add("ip", r.IP.String())
	}
	if r.Generation != 0 {
		add("generation", fmt.Sprint(r.Generation))
	}
	add("identity", textOf(r.Identity))
	add("evidence", r.Evidence)
	if r.Reason != "" {
		add("reason", fmt.Sprintf("%q", r.Reason))
	}
	if r.Duration > 0 {
		add("for", span(r.Duration))
	}
	if r.Session != nil {
		add("certificate", r.Session.Serial)
	}
	if r.Certificate != nil {
		add("workload", r.Certificate.SPIFFEID)
		add("workload-certificate", r.Certificate.Serial)
	}
	if r.Coverage != nil {
		add("flows", fmt.Sprint(r.Coverage.Flows))
	}
	if r.Gap != nil {
		add("lost", fmt.Sprint(r.Gap.Lost))
	}
	if err != nil {
		b.WriteString(" (ALTERED: see audit verify)")
	}
	return Plain(b.String())
}

// Tail reads a log from near its end, and what is appended, also when it goes on
// in a new file. It is used by one goroutine.
type Tail struct {
	path string
	file *os.File
	r    *bufio.Reader
	part []byte
}

// OpenTail opens a log before its last n lines.
func OpenTail(path string, n int) (*Tail, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	from := info.Size()
	buf := make([]byte, 64<<10)
	for newlines := 0; from > 0 && n >= 0; {
		size := min(int64(len(buf)), from)
		if _, err := f.ReadAt(buf[:size], from-size); err != nil && !errors.Is(err, io.EOF) {
			f.Close()
			return nil, err
		}
		end := int(size)
		for end > 0 && newlines <= n {
			if end = bytes.LastIndexByte(buf[:end], '\n'); end >= 0 {
				newlines++
			}
		}
		if newlines > n {
			from += int64(max(end, 0)) + 1 - size
			break
		}
		from -= size
	}
	if _, err := f.Seek(from, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return &Tail{path: path, file: f, r: bufio.NewReader(f)}, nil
}

// Next returns a line without its newline, valid until the next call, and nil
// if there is none yet.
func (t *Tail) Next() ([]byte, error) {
	for {
		more, err := t.r.ReadSlice('\n')
		if len(t.part) < maxLine {
			t.part = append(t.part, more...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			moved, err := t.moved()
			if !moved || err != nil {
				return nil, err
			}
		case err != nil:
			return nil, err
		default:
			line := bytes.TrimSuffix(t.part, []byte{'\n'})
			t.part = nil
			return line, nil
		}
	}
}

// moved goes on in the file that is at the path now, if it is another.
func (t *Tail) moved() (bool, error) {
	here, err := t.file.Stat()
	if err != nil {
		return false, err
	}
	there, err := os.Stat(t.path)
	if err != nil || os.SameFile(here, there) {
		return false, nil
	}
	// What was written between the last read and the move is read first.
	if more, err := t.r.Peek(1); err == nil && len(more) > 0 {
		return true, nil
	}
	f, err := os.Open(t.path)
	if err != nil {
		return false, nil // it is being made
	}
	t.file.Close()
	t.file, t.part = f, nil
	t.r.Reset(f)
	return true, nil
}

// Close closes the file.
func (t *Tail) Close() error { return t.file.Close() }
