package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"

	"portcullis/datapath"
	"portcullis/ipcache/journal"
)

// cleanupWait bounds how long Cleanup waits for a running agent to end.
const cleanupWait = 2 * time.Second

// Cleanup removes what an agent left in the kernel: links, programs, maps.
// After it nobody judges the workloads' packets. It refuses while an agent
// runs. What outlives it: the journal, for leases that were granted may still
// run; the policies; the confirmation log.
func Cleanup(ctx context.Context, cfg Config, log *zap.Logger) error {
	boot, err := bootID()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, cleanupWait)
	defer cancel()
	j, _, _, err := journal.OpenContext(ctx, cfg.JournalDir, boot, log)
	if err != nil {
		return fmt.Errorf("is an agent running? Stop it first: %w", err)
	}
	defer j.Close()
	if err := datapath.Remove(cfg.PinDir); err != nil {
		return err
	}
	// Without the pins these tell of nothing.
	for _, name := range []string{"workloads", "identities", "ports"} {
		if err := os.RemoveAll(filepath.Join(cfg.JournalDir, name)); err != nil {
			return fmt.Errorf("cleanup: %w", err)
		}
	}
	log.Info("nothing of the agent is left in the kernel; workloads are not judged any more", zap.String("pins", cfg.PinDir))
	return nil
}
