#!/usr/bin/env bash
# Writes what comes from the chart and its values: values.yaml, the schema,
# docs/values.md, the manifests in deploy/.
set -eu
cd "$(dirname "$0")"
go test -count=1 -run '^TestGenerated$' . -update
