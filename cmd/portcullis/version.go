package main

import (
	"encoding/json"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"portcullis/agent"
	"portcullis/bpf/abi"
)

type versionInfo struct {
	Version  string `json:"version"`
	Revision string `json:"revision"`
	Modified bool   `json:"modified"` // built from a tree with changes
	Go       string `json:"go"`
	Platform string `json:"platform"`
	ABI      uint32 `json:"abi"` // of the kernel programs
}

func buildVersion() versionInfo {
	v := versionInfo{Version: agent.Version(), Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, ABI: uint32(abi.ABIVersion)}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			switch s.Key {
			case "vcs.revision":
				v.Revision = s.Value
			case "vcs.modified":
				v.Modified = s.Value == "true"
			}
		}
	}
	return v
}

func newVersionCmd(env *Env) *cobra.Command {
	cmd := &cobra.Command{Use: "version", Short: "Tell this binary's version", Args: usageArgs(noArgs)}
	o := addOutput(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		v := buildVersion()
		if *o != outTable {
			b, err := json.Marshal(v)
			if err != nil {
				return err
			}
			return structured(env.Stdout, *o, b)
		}
		revision := v.Revision
		if v.Modified {
			revision += " with changes"
		}
		if revision != "" {
			revision = " (" + revision + ")"
		}
		_, err := fmt.Fprintf(env.Stdout, "portcullis %s%s, %s, %s, kernel ABI %d\n", v.Version, revision, v.Go, v.Platform, v.ABI)
		return err
	}
	return cmd
}
