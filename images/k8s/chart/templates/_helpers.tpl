{{/*
Labels of everything. Called with (dict "component" "master"), or "" for what belongs to no component. Helm adds
managed-by itself, and would overwrite ours.
*/}}
{{- define "nomad.labels" -}}
app.kubernetes.io/name: nomad
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end }}

{{/* What selects the pods of a component. */}}
{{- define "nomad.selector" -}}
app.kubernetes.io/name: nomad
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* A pod's half of Pod Security "restricted". */}}
{{- define "nomad.podSecurity" -}}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile:
    type: RuntimeDefault
{{- end }}

{{/* A container's half. */}}
{{- define "nomad.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end }}

{{/* The image of agents and of the relay. */}}
{{- define "nomad.agentImage" -}}
{{- if .Values.images.agent -}}
{{ .Values.images.agent }}
{{- else -}}
{{- $newest := "" -}}
{{- range $version, $image := .Values.images.operators -}}
{{- if or (not $newest) (semverCompare (printf ">%s" $newest) $version) -}}
{{- $newest = $version -}}
{{- end -}}
{{- end -}}
{{ get .Values.images.operators $newest }}
{{- end -}}
{{- end }}
