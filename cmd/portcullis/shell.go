package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// newCompletionCmd takes the place of cobra's own command, which does not tell
// a shell that it does not know.
func newCompletionCmd(env *Env) *cobra.Command {
	cmd := group("completion", "Write a completion script for a shell")
	for _, shell := range []struct {
		name, how string
		write     func(root *cobra.Command, w io.Writer) error
	}{
		{"bash", "  source <(portcullis completion bash)\n  portcullis completion bash > /etc/bash_completion.d/portcullis   # for every session; needs bash-completion",
			func(root *cobra.Command, w io.Writer) error { return root.GenBashCompletionV2(w, true) }},
		{"fish", "  portcullis completion fish | source\n  portcullis completion fish > ~/.config/fish/completions/portcullis.fish   # for every session",
			func(root *cobra.Command, w io.Writer) error { return root.GenFishCompletion(w, true) }},
		{"zsh", "  source <(portcullis completion zsh)\n  portcullis completion zsh > \"${fpath[1]}/_portcullis\"   # for every session",
			func(root *cobra.Command, w io.Writer) error { return root.GenZshCompletion(w) }},
	} {
		cmd.AddCommand(&cobra.Command{
			Use: shell.name, Short: "For " + shell.name, Long: "Write the completion script for " + shell.name + ":\n\n" + shell.how,
			Args: usageArgs(noArgs),
			RunE: func(cmd *cobra.Command, _ []string) error { return shell.write(cmd.Root(), env.Stdout) },
		})
	}
	return cmd
}

// newHelpCmd takes the place of cobra's own command, which explains the root
// when asked for a command that does not exist.
func newHelpCmd(env *Env) *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND]",
		Short: "Explain a command",
		ValidArgsFunction: func(cmd *cobra.Command, args []string, prefix string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
			of, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			for _, sub := range of.Commands() {
				if sub.IsAvailableCommand() && strings.HasPrefix(sub.Name(), prefix) {
					names = append(names, cobra.CompletionWithDesc(sub.Name(), sub.Short))
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			of, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				hint := ""
				if of != nil && len(rest) > 0 {
					if s := of.SuggestionsFor(rest[0]); len(s) > 0 {
						hint = fmt.Sprintf(" (did you mean %s?)", strings.Join(s, " or "))
					}
				}
				return usagef("there is no command %q%s: see `portcullis --help`", "portcullis "+strings.Join(args, " "), hint)
			}
			of.InitDefaultHelpFlag()
			of.SetOut(env.Stdout)
			return of.Help()
		},
	}
}
