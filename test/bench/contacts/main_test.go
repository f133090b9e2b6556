package main

import (
	"flag"
	"io"
	"strings"
	"testing"
)

// A flag that the measurement does not know is refused, and said whose it is.
func TestCheckUse(t *testing.T) {
	for line, want := range map[string]string{
		"-json -count 7 reuse": "", "-contacts 50 flood": "", "-warm 1 -cold 1 first": "", "flood": "",
		"-count 7 flood":     "-count is a flag of `reuse`",
		"-contacts 50 reuse": "-contacts is a flag of `flood`",
		"-add-first first":   "-add-first is a flag of `reuse`",
		"flood -contacts 50": "flags come before it",
		"":                   "say `first`",
		"storm":              "say `first`",
	} {
		f := flag.NewFlagSet("contacts", flag.ContinueOnError)
		f.SetOutput(io.Discard)
		f.Bool("json", false, "print JSON")
		f.Int("warm", 1, "first: contacts on a warm session")
		f.Int("cold", 1, "first: contacts on a cold session")
		f.Int("count", 1, "reuse: how many")
		f.Bool("add-first", false, "reuse: the other way round")
		f.Int("contacts", 1, "flood: how many")
		if err := f.Parse(strings.Fields(line)); err != nil {
			t.Fatal(err)
		}
		err := checkUse(f)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", line, err, want)
		}
	}
}
