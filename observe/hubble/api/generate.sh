#!/bin/sh
# Rebuilds the *.pb.go files from the protos, which are those of
# github.com/cilium/cilium v1.20.2, directory api/v1, unchanged. Needs protoc;
# the Go plugins are this module's own tools, so their versions are in go.mod.
set -eu
cd "$(dirname "$0")"
bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
go build -o "$bin" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
# The protos name Cilium's Go packages: each goes into the folder beside it.
set -- paths=source_relative
for p in flow relay peer observer; do
	set -- "$@" "M$p/$p.proto=portcullis/observe/hubble/api/$p"
done
opts=$(IFS=,; echo "$*")
PATH="$bin:$PATH" protoc --proto_path=. --go_out="$opts:." --go-grpc_out="$opts:." \
	flow/flow.proto relay/relay.proto peer/peer.proto observer/observer.proto
