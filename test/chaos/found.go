package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"portcullis/chaos/check"
)

// found is a run that once showed something, and what it has to come to.
type found struct {
	args []string // of portcullis
	want string
}

// readFound reads the commands of docs/chaos-found.md: the lines of its fenced
// blocks, each with what the run has to come to behind a #.
func readFound(text string) (out []found, err error) {
	fenced := false
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
			continue
		}
		if !fenced || strings.TrimSpace(line) == "" {
			continue
		}
		command, want, _ := strings.Cut(line, "#")
		args := strings.Fields(command)
		f := found{want: strings.TrimSpace(want)}
		if len(args) < 4 || strings.Join(args[:3], " ") != "portcullis chaos run" || f.want != check.Held && f.want != check.Violated {
			return nil, fmt.Errorf("line %d: want \"portcullis chaos run ...  # held\" or \"... # violated\", got %q", i+1, line)
		}
		f.args = args[1:]
		out = append(out, f)
	}
	if len(out) == 0 {
		return nil, errors.New("there is no command in it")
	}
	return out, nil
}

// tryFound runs every command of the file again, one after the other.
func tryFound(ctx context.Context, binary, file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	all, err := readFound(string(text))
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	var errs []error
	for i, f := range all {
		fmt.Fprintf(os.Stderr, "chaos: %d/%d  portcullis %s\n", i+1, len(all), strings.Join(f.args, " "))
		r, _, err := settle(ctx, binary, append(f.args, "--lab", fmt.Sprintf("found%d", os.Getpid()), "-o", "json"))
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			errs = append(errs, err)
		case r.Verdict != f.want:
			errs = append(errs, fmt.Errorf("portcullis %s: %s, and %s is expected", strings.Join(f.args, " "), verdict([]*check.Result{r}), f.want))
		default:
			fmt.Fprintf(os.Stderr, "chaos: as expected: %s\n", verdict([]*check.Result{r}))
		}
	}
	fmt.Printf("%d passed, %d failed, 0 skipped\n", len(all)-len(errs), len(errs))
	return errors.Join(errs...)
}
