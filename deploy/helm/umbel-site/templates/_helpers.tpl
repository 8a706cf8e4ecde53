{{- define "umbel-site.name" -}}
{{- if hasPrefix "umbel-site" .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "umbel-site-%s" .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "umbel-site.selector" -}}
app.kubernetes.io/name: umbel-site
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "umbel-site.labels" -}}
{{ include "umbel-site.selector" . }}
app.kubernetes.io/part-of: umbel
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{/* Refuses a wrong value in one line. Takes a list: field, found, accepted, what to do. */}}
{{- define "umbel-site.refuse" -}}
{{- fail (printf "umbel-site: %s: found %s, accepted: %s; what to do: %s" (index . 0) (index . 1) (index . 2) (index . 3)) -}}
{{- end -}}

{{/* The name of an image. Takes a list: the value's name, the value. */}}
{{- define "umbel-site.image" -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else if $image.tag -}}
{{ $image.repository }}:{{ $image.tag }}
{{- else -}}
{{- include "umbel-site.refuse" (list (index . 0) "neither digest nor tag" "a digest, sha256:..., or a tag" "give the digest that docker push printed") -}}
{{- end -}}
{{- end -}}

{{/* Refuses wrong values that a schema cannot detect. */}}
{{- define "umbel-site.check" }}
{{- $config := fromToml .Values.clientToml }}
{{- if hasKey $config "Error" }}
{{- include "umbel-site.refuse" (list "clientToml" $config.Error "the text of a client.toml" "--set-file clientToml=client.toml") }}
{{- end }}
{{- range $table := list "data" "model" "relay" }}
{{- if not (kindIs "map" (get $config $table)) }}
{{- include "umbel-site.refuse" (list (printf "clientToml: %s" $table) "no such table" (printf "a table [%s]" $table) "see docs/site.md") }}
{{- end }}
{{- end }}
{{- $file := dig "data" "path" "" $config | toString }}
{{- if not $file }}
{{- include "umbel-site.refuse" (list "clientToml: data.path" "nothing" "the data set's file" "see docs/site.md") }}
{{- end }}
{{- $named := kindIs "string" $config.policy }}
{{- if ne $named (not (empty .Values.policyToml)) }}
{{- include "umbel-site.refuse" (list "policyToml" (ternary "nothing" "a policy" $named) (ternary "the text of the file that client.toml names" "nothing where client.toml has a table [policy]" $named) "--set-file policyToml=policy.toml, or policy = \"policy.toml\" above client.toml's first table") }}
{{- end }}
{{- $server := dig "relay" "server" "" $config | toString }}
{{- if not (regexMatch "^.+:[0-9]{1,5}$" $server) }}
{{- include "umbel-site.refuse" (list "clientToml: relay.server" ($server | default "nothing") "host:port" "give umbel-client join KIT, with what the operator sent") }}
{{- end }}
{{- if not (or .Values.operator.cidrs .Values.operator.namespace .Values.proxy.cidrs) }}
{{- include "umbel-site.refuse" (list "operator" "neither cidrs nor namespace" "where the operator is" "operator.cidrs={203.0.113.7/32}, or its namespace in this cluster") }}
{{- end }}
{{- if ne (empty .Values.proxy.existingSecret) (empty .Values.proxy.cidrs) }}
{{- include "umbel-site.refuse" (list "proxy" "one of existingSecret and cidrs" "both or neither" "say which Secret has HTTPS_PROXY, and at which addresses the proxy is") }}
{{- end }}
{{- end }}

{{/* What Pod Security restricted requires of a container, and more. Takes the user's number. */}}
{{- define "umbel-site.container-security" -}}
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
{{- define "umbel-site.probes" -}}
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
