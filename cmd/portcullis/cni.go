package main

import (
	"github.com/spf13/cobra"

	"portcullis/agent/cni"
)

func newCNICmd(*Env) *cobra.Command {
	return &cobra.Command{
		Use:   "cni",
		Short: "The chained CNI plugin; a container runtime calls it",
		Long: `The chained CNI plugin: a container runtime calls it, by the CNI protocol (0.3.1 to
1.1.0), with the command in CNI_COMMAND and the network configuration on the standard
input. The program is also the plugin when it is called ` + cni.BinaryName + `: copy it
under that name to the runtime's directory of plugins, and put it last in the list.

It registers each workload with the agent of this node before the workload starts, and
deregisters it at its end; while no agent runs it closes the workload's gate itself.`,
		Example: `  cp portcullis /opt/cni/bin/` + cni.BinaryName + `
  echo '{"cniVersion":"1.1.0","name":"pods","type":"` + cni.BinaryName + `"}' | CNI_COMMAND=STATUS CNI_PATH=/opt/cni/bin portcullis cni`,
		Args: usageArgs(noArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if code := cni.Main(cmd.Context()); code != exitOK {
				return exitError{code}
			}
			return nil
		},
	}
}
