{{- define "rvllm.name" -}}
{{- .Release.Name | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "rvllm.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "rvllm.labels" -}}
{{ include "rvllm.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "rvllm.claim" -}}
{{- .Values.persistence.existingClaim | default (printf "%s-models" (include "rvllm.name" .)) -}}
{{- end -}}

{{- /* Whether pods of several nodes would have to mount a volume that only one node can. */ -}}
{{- define "rvllm.oneNode" -}}
{{- if and .Values.persistence.enabled (eq .Values.persistence.accessMode "ReadWriteOnce") -}}yes{{- end -}}
{{- end -}}

{{- define "rvllm.check" -}}
{{- if and (include "rvllm.oneNode" .) (or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled) -}}
{{- fail "several replicas share the models' volume: set persistence.accessMode to ReadWriteMany, or persistence.enabled to false" -}}
{{- end -}}
{{- if lt (int .Values.autoscaling.maxReplicas) (int .Values.autoscaling.minReplicas) -}}
{{- fail "autoscaling.maxReplicas is below autoscaling.minReplicas" -}}
{{- end -}}
{{- end -}}
