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
