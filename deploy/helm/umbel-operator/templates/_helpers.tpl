{{- define "umbel-operator.name" -}}
{{- if hasPrefix "umbel-operator" .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "umbel-operator-%s" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "umbel-operator.selector" -}}
app.kubernetes.io/name: umbel-operator
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "umbel-operator.labels" -}}
{{ include "umbel-operator.selector" . }}
app.kubernetes.io/part-of: umbel
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Refuses a wrong value in one line. Takes a list: field, found, accepted, what to do. */}}
{{- define "umbel-operator.refuse" -}}
{{- fail (printf "umbel-operator: %s: found %s, accepted: %s; what to do: %s" (index . 0) (index . 1) (index . 2) (index . 3)) -}}
{{- end -}}

{{- define "umbel-operator.image" -}}
{{- $image := .Values.image -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else if $image.tag -}}
{{ $image.repository }}:{{ $image.tag }}
{{- else -}}
{{- include "umbel-operator.refuse" (list "image" "neither digest nor tag" "a digest, sha256:..., or a tag" "give the digest that docker push printed") -}}
{{- end -}}
{{- end -}}

{{/* Refuses wrong values that a schema cannot detect. */}}
{{- define "umbel-operator.check" }}
{{- $config := fromToml .Values.serverToml }}
{{- if hasKey $config "Error" }}
{{- include "umbel-operator.refuse" (list "serverToml" $config.Error "the text of a server.toml" "--set-file serverToml=server.toml") }}
{{- end }}
{{- if hasKey $config "evaluation" }}
{{- include "umbel-operator.refuse" (list "serverToml: evaluation" "a table" "none: the server's image has no PyTorch" "remove it, and score exported adapters elsewhere") }}
{{- end }}
{{- end }}

{{/* What Pod Security restricted requires of a container, and more. Takes the user's number. */}}
{{- define "umbel-operator.container-security" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: 10000
privileged: false
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{/* The probes of the process behind a socket. Takes the socket's path. A process that waits for
     another one answers that it is not healthy: it is not ready, but need not be ended. */}}
{{- define "umbel-operator.probes" -}}
startupProbe:
  exec: {command: [sh, -c, "python -P -m umbel_host.probe unix:{{ . }}; test $? -le 1"]}
  periodSeconds: 10
  timeoutSeconds: 15
  failureThreshold: 60
readinessProbe:
  exec: {command: [python, -P, -m, umbel_host.probe, "unix:{{ . }}"]}
  periodSeconds: 30
  timeoutSeconds: 15
livenessProbe:
  exec: {command: [sh, -c, "python -P -m umbel_host.probe unix:{{ . }}; test $? -le 1"]}
  periodSeconds: 60
  timeoutSeconds: 30
  failureThreshold: 5
{{- end -}}
