{{- /* Only functions that agent/install has too; its tests refuse others. */ -}}

{{- define "portcullis.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}{{ end }}
{{- end }}

{{- define "portcullis.labels" -}}
{app.kubernetes.io/part-of: portcullis}
{{- end }}

{{- /* Who gives agents their SVIDs: one issuer in the cluster, or SPIRE. */ -}}
{{- define "portcullis.issued" -}}
{{- if and .Values.issuer.enabled .Values.spire.socketPath }}
{{- fail "issuer.enabled and spire.socketPath: an agent takes its SVID from one of them: set issuer.enabled=false to use SPIRE" }}
{{- end }}
{{- if not (or .Values.issuer.enabled .Values.spire.socketPath) }}
{{- fail "issuer.enabled is false and spire.socketPath is empty: nobody would give agents their SVIDs: set one of them" }}
{{- end }}
{{- if and .Values.spire.adminSocketPath (eq (dir .Values.spire.adminSocketPath) (dir .Values.spire.socketPath)) }}
{{- fail "spire.adminSocketPath is in the directory of spire.socketPath: whoever may use the one could use the other: give it a directory of its own, as SPIRE asks for" }}
{{- end }}
{{- if .Values.issuer.enabled }}true{{ end }}
{{- end }}

{{- /* What an installation keeps for its life, as `portcullis install` says better.
lookup finds nothing where no cluster is asked. */ -}}
{{- define "portcullis.kept" -}}
{{- with lookup "v1" "ConfigMap" .Release.Namespace "portcullis-agent" }}
{{- $was := "" }}
{{- with index . "data" }}{{ with index . "agent.yaml" }}{{ with index (fromYaml .) "trust-domain" }}{{ $was = . }}{{ end }}{{ end }}{{ end }}
{{- if ne (print $was) $.Values.trustDomain }}
{{- fail (print "trustDomain: is " (quote $was) " by ConfigMap portcullis-agent, would become " (quote $.Values.trustDomain) ": agents of two trust domains do not believe each other, and an issuer does not start on the keys of another: give the former one, or portcullis uninstall first (docs/upgrade.md)") }}
{{- end }}
{{- end }}
{{- with lookup "apps/v1" "Deployment" .Release.Namespace "portcullis-issuer" }}
{{- range .spec.template.spec.containers }}
{{- $issuer := eq (print (index . "name")) "issuer" }}
{{- range index . "args" }}
{{- if and $issuer (hasPrefix "--trust-domain=" .) (ne . (print "--trust-domain=" $.Values.trustDomain)) }}
{{- fail (print "trustDomain: Deployment portcullis-issuer has " . ", whose keys it has; would become " (quote $.Values.trustDomain) ": give the former one, or portcullis uninstall first (docs/upgrade.md)") }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if not .Values.cni.move }}
{{- with lookup "apps/v1" "DaemonSet" .Release.Namespace "portcullis-agent" }}
{{- range .spec.template.spec.containers }}
{{- range index . "args" }}
{{- $bin := print "--cni-bin-dir=" $.Values.cni.binDir }}
{{- $conf := print "--cni-conf-dir=" $.Values.cni.confDir }}
{{- if or (and (hasPrefix "--cni-bin-dir=" .) (ne (clean .) (clean $bin))) (and (hasPrefix "--cni-conf-dir=" .) (ne (clean .) (clean $conf))) }}
{{- fail (print "cni.binDir and cni.confDir: DaemonSet portcullis-agent has " . ", where the plugin would stay on every node: give the former directory, or portcullis uninstall first; where the nodes' runtime has moved, --set cni.move=true goes on (docs/upgrade.md)") }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The settings of all agents. */ -}}
{{- define "portcullis.settings" -}}
{{- $metrics := print .Values.metrics.port }}
{{- $hubble := print .Values.hubble.listen.port }}
{{- if and .Values.metrics.enabled (or (eq $metrics "4260") (eq $metrics "4261")) }}
{{- fail "metrics.port: 4260 is that of agents among themselves, 4261 that of the issuer: choose another one" }}
{{- end }}
{{- if and .Values.hubble.listen.enabled (or (eq $hubble "4260") (eq $hubble "4261")) }}
{{- fail "hubble.listen.port: 4260 is that of agents among themselves, 4261 that of the issuer: choose another one" }}
{{- end }}
{{- if and .Values.metrics.enabled .Values.hubble.listen.enabled (eq $metrics $hubble) }}
{{- fail "metrics.port and hubble.listen.port are the same, and both are to be served: choose another one" }}
{{- end -}}
trust-domain: {{ .Values.trustDomain | quote }}
{{- if include "portcullis.issued" . }}
issuer: https://portcullis-issuer.{{ .Release.Namespace }}.svc.cluster.local:4261
issuer-token: /var/run/secrets/portcullis/token
issuer-bundle: /etc/portcullis-bundle/bundle.json
{{- end }}
{{- if .Values.spire.socketPath }}
workload-api: {{ print "unix://" .Values.spire.socketPath | quote }}
{{- end }}
{{- if .Values.spire.adminSocketPath }}
delegated-socket: {{ print "unix://" .Values.spire.adminSocketPath | quote }}
{{- end }}
{{- if .Values.metrics.enabled }}
metrics-address: {{ print ":" .Values.metrics.port | quote }}
{{- end }}
{{- if .Values.hubble.listen.enabled }}
hubble-listen: {{ print ":" .Values.hubble.listen.port | quote }}
{{- end }}
{{- if not .Values.events.enabled }}
events: false
{{- end }}
{{- if .Values.config }}
{{ toYaml .Values.config }}
{{- end }}
{{- end }}
