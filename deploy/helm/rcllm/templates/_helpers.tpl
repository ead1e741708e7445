{{- define "rcllm.labels" -}}
app.kubernetes.io/name: rcllm
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "rcllm.selector" -}}
app.kubernetes.io/name: rcllm
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "rcllm.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{/* The environment of every process: the keys, and where things lie. */}}
{{- define "rcllm.environment" -}}
envFrom:
  - secretRef:
      name: {{ .Values.keys.existingSecret }}
env:
  - name: RCLLM_HOME
    value: /var/lib/rcllm
  - name: RCLLM_SERVER_HOST
    value: 0.0.0.0
  - name: RCLLM_SERVER_PORT
    value: "8000"
{{- end }}

{{- define "rcllm.resources" -}}
requests: {{ toJson .Values.resources.requests }}
limits:
  {{- range $name, $quantity := .Values.resources.limits }}
  {{ $name }}: {{ $quantity | quote }}
  {{- end }}
  {{- if .Values.gpus }}
  nvidia.com/gpu: {{ .Values.gpus | quote }}
  {{- end }}
{{- end }}

{{- define "rcllm.security" -}}
allowPrivilegeEscalation: false
capabilities: { drop: [ALL] }
{{- end }}

{{- define "rcllm.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
fsGroup: 10001
seccompProfile: { type: RuntimeDefault }
{{- end }}

{{- define "rcllm.mounts" -}}
- name: config
  mountPath: /etc/rcllm
  readOnly: true
- name: home
  mountPath: /var/lib/rcllm
- name: tmp
  mountPath: /tmp
{{- if .Values.data.existingClaim }}
- name: data
  mountPath: /data
  readOnly: true
{{- end }}
{{- end }}

{{/* Volumes but for `home`, which differs. */}}
{{- define "rcllm.volumes" -}}
- name: config
  configMap:
    name: {{ .Release.Name }}
- name: tmp
  emptyDir: {}
{{- if .Values.data.existingClaim }}
- name: data
  persistentVolumeClaim:
    claimName: {{ .Values.data.existingClaim }}
    readOnly: true
{{- end }}
{{- end }}

{{- define "rcllm.placing" -}}
{{- if .Values.nodeSelector }}
nodeSelector: {{ toJson .Values.nodeSelector }}
{{- end }}
{{- if .Values.tolerations }}
tolerations: {{ toJson .Values.tolerations }}
{{- end }}
{{- if .Values.affinity }}
affinity: {{ toJson .Values.affinity }}
{{- end }}
{{- end }}

{{/* Ray tells nobody about its use, and waits for proxies on busy machines. */}}
{{- define "rcllm.rayEnvironment" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S
  value: "60"
- name: RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S
  value: "30"
- name: RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S
  value: "1"
- name: RAY_worker_niceness
  value: "0"
{{- end }}
