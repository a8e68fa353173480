{{- /* Names, labels, and what every pod of ours has. */ -}}

{{- define "preceptor.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* (dict "root" $ "component" "teacher") */ -}}
{{- define "preceptor.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "preceptor.labels" -}}
{{ include "preceptor.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "preceptor.image" -}}
{{ printf "%spreceptor-%s:%s" .root.Values.image.prefix .target (default .root.Chart.AppVersion .root.Values.image.tag) | quote }}
{{- end }}

{{- /* What values cannot be together. Called once, by services.yaml. */ -}}
{{- define "preceptor.check" -}}
{{- $v := .Values }}
{{- if not $v.redis.url }}{{ fail "redis.url is needed: redis://host:6379/0, its password as redis.passwordSecret" }}{{ end }}
{{- if not $v.postgres.url }}{{ fail "postgres.url is needed: postgresql://user@host:5432/database, its password as postgres.passwordSecret" }}{{ end }}
{{- range $name, $url := dict "redis.url" $v.redis.url "postgres.url" $v.postgres.url }}
{{- if contains ":" (regexFind "//[^@/]*@" $url | trimPrefix "//") }}{{ fail (printf "%s holds a password; put it into a Secret and name that" $name) }}{{ end }}
{{- end }}
{{- if eq (empty $v.artifacts.url) (empty $v.artifacts.claim) }}{{ fail "give one of artifacts.url (s3://bucket/prefix) and artifacts.claim" }}{{ end }}
{{- if not $v.workers }}{{ fail "workers needs one group at least" }}{{ end }}
{{- $names := list }}
{{- range include "preceptor.workers" . | fromYamlArray }}
{{- if has .name $names }}{{ fail (printf "two groups of workers are called %s" .name) }}{{ end }}
{{- $names = append $names .name }}
{{- if and .autoscaling.enabled (gt (int .autoscaling.minReplicas) (int .autoscaling.maxReplicas)) }}{{ fail (printf "workers %s: minReplicas is above maxReplicas" .name) }}{{ end }}
{{- if and .autoscaling.enabled (not $v.metrics.enabled) }}{{ fail (printf "workers %s: autoscaling reads the evaluator's metrics; set metrics.enabled" .name) }}{{ end }}
{{- end }}
{{- if $v.vllm.enabled }}
{{- if not $v.vllm.model }}{{ fail "vllm.model is needed with vllm.enabled" }}{{ end }}
{{- if and $v.artifacts.url (not $v.vllm.policiesClaim) }}{{ fail "vllm.policiesClaim is needed with artifacts.url: policies reach the server as folders on a claim that it shares with the teacher" }}{{ end }}
{{- end }}
{{- end }}

{{- /* The groups of workers with their defaults, as a list in YAML. */ -}}
{{- define "preceptor.workers" -}}
{{- range .Values.workers }}
- {{ mergeOverwrite (deepCopy $.Values.workerDefaults) . | toJson }}
{{- end }}
{{- end }}

{{- /* Students with queues of their own, of all groups. */ -}}
{{- define "preceptor.dedicated" -}}
{{- $students := list }}
{{- range include "preceptor.workers" . | fromYamlArray }}{{ $students = concat $students .students }}{{ end }}
{{- $students | uniq | sortAlpha | join "," }}
{{- end }}

{{- define "preceptor.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "preceptor.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* Of every pod of ours: (dict "root" $ "placed" VALUES-WITH-nodeSelector...) */ -}}
{{- define "preceptor.pod" -}}
serviceAccountName: {{ include "preceptor.fullname" .root }}
automountServiceAccountToken: false
# Kubernetes would set PRECEPTOR_TEACHER_PORT=tcp://... for a Service of that name, and VLLM_PORT, which vLLM reads.
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
securityContext: {{ include "preceptor.podSecurity" . | nindent 2 }}
{{- with .placed.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .placed.nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .placed.tolerations }}
tolerations: {{ toYaml . | nindent 2 }}
{{- end }}
{{- with .placed.affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "preceptor.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if .gpus }}
{{- $_ := set $resources "limits" (merge (dict "nvidia.com/gpu" (int .gpus)) (default dict $resources.limits)) }}
{{- end }}
{{- toYaml $resources }}
{{- end }}

{{- /* As env entries from a map; numbers and booleans become text. */ -}}
{{- define "preceptor.map" -}}
{{- range $name, $value := . }}
- {name: {{ $name }}, value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}}
{{- end }}
{{- end }}

{{- /* Settings of all processes; (dict "root" $ "env" MAP): MAP wins over values.env, and that over what stands here. */ -}}
{{- define "preceptor.env" -}}
{{- $v := .root.Values }}{{ $name := include "preceptor.fullname" .root }}
{{- $env := dict "PRECEPTOR_HOME" "/var/lib/preceptor" "PRECEPTOR_BROKER_URL" $v.redis.url "HF_HOME" "/var/lib/preceptor/hub" }}
{{- range $service, $of := $v.services }}
{{- $_ := set $env (printf "PRECEPTOR_%s_ADDRESS" (upper $service)) (printf "%s-%s:%d" $name $service (int $of.port)) }}
{{- end }}
{{- $_ := set $env "PRECEPTOR_ARTIFACTS_URL" (default "/var/lib/preceptor/artifacts" $v.artifacts.url) }}
{{- if $v.artifacts.endpoint }}{{ $_ := set $env "AWS_ENDPOINT_URL" $v.artifacts.endpoint }}{{ end }}
{{- if $v.artifacts.credentialsSecret.name }}{{ $_ := set $env "AWS_SHARED_CREDENTIALS_FILE" "/run/secrets/preceptor/aws-credentials" }}{{ end }}
{{- if $v.redis.passwordSecret.name }}{{ $_ := set $env "PRECEPTOR_BROKER_PASSWORD_FILE" "/run/secrets/preceptor/redis-password" }}{{ end }}
{{- if $v.security.tokenSecret.name }}{{ $_ := set $env "PRECEPTOR_TOKEN_FILE" "/run/secrets/preceptor/token" }}{{ end }}
{{- if $v.security.tlsSecret }}{{ $_ := set $env "PRECEPTOR_TLS" "/run/secrets/preceptor-tls" }}{{ end }}
{{- if $v.hub.tokenSecret.name }}{{ $_ := set $env "HF_TOKEN_PATH" "/run/secrets/preceptor/hub-token" }}{{ end }}
{{- if $v.hub.offline }}{{ $_ := set $env "HF_HUB_OFFLINE" "1" }}{{ end }}
{{- if $v.metrics.enabled }}{{ $_ := set $env "PRECEPTOR_METRICS_PORT" "9464" }}{{ $_ := set $env "PRECEPTOR_METRICS_HOST" "0.0.0.0" }}{{ end }}
{{- include "preceptor.map" (mergeOverwrite $env .own $v.env .env) }}
{{- end }}

{{- /* Secrets, models, caches and writable folders of every process; (dict "root" $ "database" BOOL "policies" BOOL) */ -}}
{{- define "preceptor.mounts" -}}
{{- $v := .root.Values }}
- {name: home, mountPath: /var/lib/preceptor}
- {name: tmp, mountPath: /tmp}
{{- if include "preceptor.secretSources" . }}
- {name: secrets, mountPath: /run/secrets/preceptor, readOnly: true}
{{- end }}
{{- if $v.security.tlsSecret }}
- {name: tls, mountPath: /run/secrets/preceptor-tls, readOnly: true}
{{- end }}
{{- range $v.extraSecrets }}
- {name: extra-{{ .name }}, mountPath: {{ .mountPath }}, readOnly: true}
{{- end }}
{{- if $v.artifacts.claim }}
- {name: artifacts, mountPath: /var/lib/preceptor/artifacts}
{{- end }}
{{- if $v.hub.cacheClaim }}
- {name: hub, mountPath: /var/lib/preceptor/hub}
{{- end }}
{{- if $v.models.claim }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if and .policies $v.artifacts.url }}
- {name: policies, mountPath: {{ (include "preceptor.policies" . | fromYaml).path }}}
{{- end }}
{{- end }}

{{- define "preceptor.volumes" -}}
{{- $v := .root.Values }}
- {name: home, emptyDir: {}}
- {name: tmp, emptyDir: {}}
{{- with include "preceptor.secretSources" . }}
- name: secrets
  projected:
    defaultMode: 0440
    sources: {{ . | nindent 6 }}
{{- end }}
{{- if $v.security.tlsSecret }}
- {name: tls, secret: {secretName: {{ $v.security.tlsSecret }}, defaultMode: 0440}}
{{- end }}
{{- range $v.extraSecrets }}
- {name: extra-{{ .name }}, secret: {secretName: {{ .name }}, defaultMode: 0440}}
{{- end }}
{{- if $v.artifacts.claim }}
- {name: artifacts, persistentVolumeClaim: {claimName: {{ $v.artifacts.claim }}}}
{{- end }}
{{- if $v.hub.cacheClaim }}
- {name: hub, persistentVolumeClaim: {claimName: {{ $v.hub.cacheClaim }}}}
{{- end }}
{{- if $v.models.claim }}
- {name: models, persistentVolumeClaim: {claimName: {{ $v.models.claim }}, readOnly: true}}
{{- end }}
{{- if and .policies $v.artifacts.url }}
- {name: policies, persistentVolumeClaim: {claimName: {{ $v.vllm.policiesClaim }}}}
{{- end }}
{{- end }}

{{- define "preceptor.secretSources" -}}
{{- $v := .root.Values }}
{{- $all := list (dict "of" $v.redis.passwordSecret "path" "redis-password") (dict "of" $v.security.tokenSecret "path" "token") (dict "of" $v.artifacts.credentialsSecret "path" "aws-credentials") (dict "of" $v.hub.tokenSecret "path" "hub-token") }}
{{- if .database }}{{ $all = append $all (dict "of" $v.postgres.passwordSecret "path" "postgres-password") }}{{ end }}
{{- if .policies }}{{ $all = append $all (dict "of" $v.vllm.apiKeySecret "path" "vllm-key") }}{{ end }}
{{- range $all }}
{{- if .of.name }}
- secret: {name: {{ .of.name }}, items: [{key: {{ .of.key }}, path: {{ .path }}}]}
{{- end }}
{{- end }}
{{- end }}

{{- /* How the teacher finds its server, as a map in YAML. */ -}}
{{- define "preceptor.vllmTeacher" -}}
PRECEPTOR_TEACHER_BACKEND: vllm
PRECEPTOR_TEACHER_SOURCE: {{ .Values.vllm.model | quote }}
PRECEPTOR_TEACHER_REVISION: {{ .Values.vllm.revision | quote }}
PRECEPTOR_TEACHER_SERVER_URL: http://{{ include "preceptor.fullname" . }}-vllm:8000
PRECEPTOR_TEACHER_SERVER_MODEL: teacher
PRECEPTOR_TEACHER_SERVER_ADAPTERS: {{ .Values.vllm.maxLoras | quote }}
{{- if .Values.vllm.apiKeySecret.name }}
PRECEPTOR_TEACHER_SERVER_API_KEY_FILE: /run/secrets/preceptor/vllm-key
{{- end }}
{{- end }}

{{- /* Where policies lie that the teacher's server loads: the claim of all artifacts, or that of the copies of a bucket's. */ -}}
{{- define "preceptor.policies" -}}
{{- $v := .root.Values }}
claim: {{ ternary $v.artifacts.claim $v.vllm.policiesClaim (empty $v.artifacts.url) }}
path: /var/lib/preceptor/{{ ternary "artifacts" "artifact-cache" (empty $v.artifacts.url) }}
{{- end }}
