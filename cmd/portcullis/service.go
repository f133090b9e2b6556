package main

import (
	"context"
	"errors"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// service has a command run until SIGTERM or SIGINT, with a log at --log-level. All
// its other flags are given already; each can be set from the environment, too. validate
// tells what of them nothing can run with.
func service(cmd *cobra.Command, env *Env, validate func() error, run func(context.Context, *zap.Logger) error) {
	f := cmd.Flags()
	level := f.String("log-level", "info", "debug, info, warn or error")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		set := newSettings(f, cmd.LocalNonPersistentFlags())
		if err := flagsFromEnv(f, env.Getenv, set.names...); err != nil {
			return usageError{err}
		}
		_, badLevel := zapcore.ParseLevel(*level)
		if err := errors.Join(badLevel, validate()); err != nil {
			return usageError{err}
		}
		log, err := newLogger(env, *level)
		if err != nil {
			return err
		}
		defer log.Sync() //nolint:errcheck // stderr cannot be synced on Linux
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
		defer stop()
		return run(ctx, log)
	}
}
