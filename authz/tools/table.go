package tools

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Text returns the matrix for a terminal: for each port a table in which the
// columns have numbers, those that stand before the rows, and what it comes to.
func (m *Matrix) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "Rows call columns: %c allowed   %c blocked   %c allowed through L7   %c not judged\n", Allowed, Blocked, ThroughL7, NotJudged)
	for _, port := range m.order {
		m.text(&b, port)
	}
	return b.String()
}

// spaced is the most columns between which there is a blank.
const spaced = 60

func (m *Matrix) text(b *strings.Builder, port string) {
	t := m.Ports[port]
	names := slices.Concat(m.Workloads, m.Externals)
	digits := len(strconv.Itoa(max(1, len(names))))
	width := 0
	for i, n := range names {
		names[i] = visible(n)
		width = max(width, utf8.RuneCountInString(names[i]))
	}
	gap := " "
	if len(names) > spaced {
		gap = ""
	}
	columns := func(row string) string { return strings.Join(strings.Split(row, ""), gap) }

	fmt.Fprintf(b, "\n%s\n", port)
	// The numbers of the columns, one digit below the other; a blank column
	// stands before the externals.
	for d := digits - 1; d >= 0; d-- {
		b.WriteString(strings.Repeat(" ", digits+width+4))
		digit := func(from, n int) string {
			row := make([]byte, n)
			for i := range row {
				if row[i] = ' '; d == 0 || from+i+1 >= power(d) {
					row[i] = byte('0' + (from+i+1)/power(d)%10)
				}
			}
			return columns(string(row))
		}
		line := digit(0, len(m.Workloads))
		if len(m.Externals) > 0 {
			line += "   " + digit(len(m.Workloads), len(m.Externals))
		}
		b.WriteString(strings.TrimRight(line, " ") + "\n")
	}
	head := func(i int) {
		fmt.Fprintf(b, "%*d  %s%s  ", digits, i+1, names[i], strings.Repeat(" ", width-utf8.RuneCountInString(names[i])))
	}
	for i := range m.Workloads {
		head(i)
		b.WriteString(columns(t.Combined[i]))
		if len(m.Externals) > 0 {
			b.WriteString("   " + columns(t.ToExternal[i]))
		}
		b.WriteByte('\n')
	}
	for i := range m.Externals {
		head(len(m.Workloads) + i)
		b.WriteString(columns(t.FromExternal[i]) + "\n")
	}
	b.WriteString(m.sum(t) + "\n")
}

func power(d int) int {
	n := 1
	for range d {
		n *= 10
	}
	return n
}

// sum says how many pairs there are of each verdict.
func (m *Matrix) sum(t *Table) string {
	count := map[rune]int{}
	pairs := 0
	for _, rows := range [][]string{t.Combined, t.FromExternal, t.ToExternal} {
		for _, row := range rows {
			pairs += len(row)
			for _, c := range row {
				count[c]++
			}
		}
	}
	out := fmt.Sprintf("%d pairs: %d allowed, %d blocked", pairs, count[Allowed], count[Blocked])
	if count[ThroughL7] > 0 {
		out += fmt.Sprintf(", %d allowed through L7", count[ThroughL7])
	}
	if count[NotJudged] > 0 {
		out += fmt.Sprintf(", %d not judged", count[NotJudged])
	}
	return out
}

// Width is how many characters the longest line of Text has.
func (m *Matrix) Width() int {
	n := 0
	for line := range strings.Lines(m.Text()) {
		n = max(n, utf8.RuneCountInString(line)-1)
	}
	return n
}

// visible shows a name that comes from outside: what would move the cursor of a
// terminal is written out.
func visible(s string) string {
	for _, r := range s {
		if !strconv.IsPrint(r) {
			q := strconv.Quote(s)
			return q[1 : len(q)-1]
		}
	}
	return s
}
