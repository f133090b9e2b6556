package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

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
	return withJournal(ctx, cfg, log, func() error { return cleanup(cfg, log) })
}

// Purge is Cleanup, and removes what that leaves but the confirmation log: the
// journal, the directory of state, the agent's socket, and the directories that
// these were in if nothing else is in them. An agent that comes later finds no
// journal, and binds no IP until every lease that could be out has ended.
func Purge(ctx context.Context, cfg Config, log *zap.Logger) error {
	return withJournal(ctx, cfg, log, func() error {
		if err := cleanup(cfg, log); err != nil {
			return err
		}
		// The journal, and with it the lock, goes last of what an agent uses.
		if err := os.Remove(cfg.APISocket); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("purge: %w", err)
		}
		if path := cfg.HubblePath(); path != "" {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("purge: %w", err)
			}
		}
		for _, dir := range []string{cfg.StateDir, cfg.JournalDir} {
			if err := removeTree(dir); err != nil {
				return fmt.Errorf("purge: %w", err)
			}
		}
		for _, dir := range []string{filepath.Dir(cfg.JournalDir), filepath.Dir(cfg.APISocket)} {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				log.Info("the directory stays", zap.Error(err)) // somebody else's
			}
		}
		return nil
	})
}

// removeTree removes a directory and all in it. Where something is mounted on
// it, as in a container, it stays, empty.
func removeTree(dir string) error {
	err := os.RemoveAll(dir)
	if errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}

// withJournal runs f while it is sure that no agent runs.
func withJournal(ctx context.Context, cfg Config, log *zap.Logger, f func() error) error {
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
	return f()
}

func cleanup(cfg Config, log *zap.Logger) error {
	if err := datapath.Remove(cfg.PinDir); err != nil {
		return err
	}
	if err := removeProxy(cfg); err != nil {
		return err
	}
	// Without the pins these tell of nothing.
	for _, name := range []string{"workloads", "identities", "ports", "names"} {
		if err := os.RemoveAll(filepath.Join(cfg.JournalDir, name)); err != nil {
			return fmt.Errorf("cleanup: %w", err)
		}
	}
	log.Info("nothing of the agent is left in the kernel; workloads are not judged any more", zap.String("pins", cfg.PinDir))
	return nil
}
