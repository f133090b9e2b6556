package archive

import (
	"fmt"
	"strings"
	"testing"
	"testing/iotest"
)

// The end of a text is whole lines, no more bytes than asked for, however it
// comes; and no more than twice as many are held.
func TestTail(t *testing.T) {
	var all strings.Builder
	for i := range 50 {
		fmt.Fprintf(&all, "line %d\n", i)
	}
	text := all.String()
	for most := range int64(len(text) + 10) {
		got, err := End(strings.NewReader(text), most)
		if err != nil || int64(len(got)) > most || !strings.HasSuffix(text, string(got)) || len(got) > 0 && !strings.HasPrefix(string(got), "line ") {
			t.Fatalf("of %d bytes: %q, %v", most, got, err)
		}
		if room := int64(len("line 49\n")); int64(len(got))+room < min(most, int64(len(text))) {
			t.Errorf("of %d bytes only %d are kept", most, len(got))
		}
		pieces, err := End(iotest.OneByteReader(strings.NewReader(text)), most)
		if err != nil || string(pieces) != string(got) {
			t.Fatalf("of %d bytes: in pieces %q, whole %q, %v", most, pieces, got, err)
		}
	}
	// A log without a newline: nothing of it is a whole line.
	endless := Tail{Most: 100}
	for range 1000 {
		if n, err := endless.Write([]byte("0123456789")); n != 10 || err != nil || cap(endless.b) > 1000 {
			t.Fatal(n, err, cap(endless.b))
		}
	}
	if got := endless.Bytes(); len(got) != 0 {
		t.Errorf("of a line without an end %q is kept", got)
	}
}
