package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portcullis/agent/api"
	"portcullis/agent/privilege"
)

// Env is the world as a command sees it.
type Env struct {
	Args           []string // without the program's name
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Now            func() time.Time
	Limit          func(privilege.Set) error // gives up capabilities but these; nil: keeps them

	socket string // of the agent, by the global flag
}

// Exit statuses.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	// exitInconclusive: of `chaos run`, that nothing was put to the test.
	exitInconclusive = 3
)

// usageError is an error of the one who typed the command.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// exitError ends the program with a status of its own, after the command has
// said everything itself: nothing more is printed.
type exitError struct{ code int }

func (e exitError) Error() string { return fmt.Sprintf("exit status %d", e.code) }

// commands lists everything below the root.
var commands = []func(*Env) *cobra.Command{
	newAgentCmd,
	newInstallCmd,
	newUninstallCmd,
	newDemoCmd,
	newChaosCmd,
	newLabCmd,
	newProbeCmd,
	newStatusCmd,
	newEndpointCmd,
	newIdentityCmd,
	newIPCacheCmd,
	newSessionCmd,
	newFQDNCmd,
	newPolicyCmd,
	newMonitorCmd,
	newObserveCmd,
	newRelayCmd,
	newAuditCmd,
	newDoctorCmd,
	newSysdumpCmd,
	newCNICmd,
	newIssuerCmd,
	newProxyCmd,
	newVersionCmd,
	newCompletionCmd,
}

// run executes one command line and returns its exit status.
func run(ctx context.Context, env *Env) int {
	root := newRoot(env)
	err := root.ExecuteContext(ctx)
	var usage usageError
	var exit exitError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &usage):
		fmt.Fprintf(env.Stderr, "portcullis: %s\n", harmless(err.Error()))
		return exitUsage
	}
	fmt.Fprintf(env.Stderr, "portcullis: %s\n", harmless(explain(err).Error()))
	return exitFailed
}

func newRoot(env *Env) *cobra.Command {
	root := group("portcullis", "Network policy that knows who holds an IP, and falls shut when it does not")
	root.SilenceErrors, root.SilenceUsage = true, true
	root.SetArgs(env.Args)
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usagef("%v: see `%s --help`", err, cmd.CommandPath())
	})
	root.PersistentFlags().StringVar(&env.socket, "socket", api.DefaultSocket, "unix socket of the agent (PORTCULLIS_SOCKET)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		return flagsFromEnv(cmd.Flags(), env.Getenv, "socket", "output")
	}
	for _, newCmd := range commands {
		root.AddCommand(newCmd(env))
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetHelpCommand(newHelpCmd(env))
	return root
}

// group returns a command that only holds others: alone, or with a word that
// is none of them, it is a usage error.
func group(use, short string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, DisableFlagsInUseLine: true}
	cmd.Args = func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		hint := ""
		if s := cmd.SuggestionsFor(args[0]); len(s) > 0 {
			hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(s, " or "))
		}
		return usagef("there is no command %q%s: see `%s --help`", cmd.CommandPath()+" "+args[0], hint, cmd.CommandPath())
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cmd.SetOut(cmd.ErrOrStderr())
		if err := cmd.Help(); err != nil {
			return err
		}
		return exitError{exitUsage}
	}
	cmd.SuggestionsMinimumDistance = 2
	cmd.AddCommand(sub...)
	return cmd
}

// noArgs is cobra.NoArgs in plain words.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return fmt.Errorf("%s takes no arguments, but was given %q", cmd.CommandPath(), args)
	}
	return nil
}

// usageArgs makes what a positional-arguments check finds a usage error.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usagef("%v: usage: %s", err, cmd.UseLine())
		}
		return nil
	}
}

// flagsFromEnv sets each named flag that the command has and the command line
// did not set from PORTCULLIS_<NAME> (dashes become underscores). A flag that
// takes a list gets one value per word of the variable. It reports everything
// that is wrong.
func flagsFromEnv(flags *pflag.FlagSet, getenv func(string) string, names ...string) error {
	var errs []error
	for _, name := range names {
		f := flags.Lookup(name)
		if f == nil || f.Changed {
			continue
		}
		value := getenv(envName(name))
		if value == "" {
			continue
		}
		values := []string{value}
		if _, list := f.Value.(pflag.SliceValue); list {
			values = strings.Fields(value)
		}
		for _, v := range values {
			if err := flags.Set(name, v); err != nil {
				errs = append(errs, usagef("%s=%q: %v", envName(name), value, err))
			}
		}
	}
	return errors.Join(errs...)
}

// envName is the variable of a flag.
func envName(flag string) string {
	return "PORTCULLIS_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}
