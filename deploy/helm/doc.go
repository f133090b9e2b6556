// Package helm is the Helm chart, embedded: the one source of the manifests.
// Helm renders it as it is, and so does agent/install, which has the few
// functions that its templates use. It imports nothing of this module, and
// nothing runs in it.
package helm

import "embed"

// Chart is the directory of the chart, with its name: portcullis/Chart.yaml.
//
//go:embed all:portcullis
var Chart embed.FS
