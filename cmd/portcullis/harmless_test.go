package main

import (
	"bytes"
	"strings"
	"testing"

	"portcullis/agent/install"
)

// What a node or its agent says does not command the operator's terminal.
func TestStatusIsHarmless(t *testing.T) {
	const attack = "\x1b]0;owned\x07\x1b[2J\u009b31m\u202etxt\rok"
	var out bytes.Buffer
	env := &Env{Stdout: &out, Stderr: &out}
	err := printClusterStatus(env, install.Status{Problems: []string{"p " + attack}, Nodes: []install.Node{
		{Name: "n1", State: install.StateOK, Version: "v1" + attack, Evidence: "a\tb", Alarms: []install.Alarm{{Name: "a" + attack, Text: "t\n" + attack}}, Problems: []string{attack}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	progress(env)("node %s is clean", attack)
	if text := out.String(); strings.ContainsAny(text, "\x1b\x07\r\u009b\u202e") || !strings.Contains(text, "owned") {
		t.Errorf("%q", text)
	}
}
