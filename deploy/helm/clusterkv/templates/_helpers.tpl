{{- define "clusterkv.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 50: room for "-headless", "-N" and the hash of a revision. */}}
{{- define "clusterkv.fullname" -}}
{{- $name := include "clusterkv.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "clusterkv.selectorLabels" -}}
app.kubernetes.io/name: {{ include "clusterkv.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: shard
{{- end -}}

{{- define "clusterkv.labels" -}}
{{ include "clusterkv.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: clusterkv
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "clusterkv.serviceAccountName" -}}
{{- $own := ternary (include "clusterkv.fullname" .) "default" .Values.serviceAccount.create -}}
{{- default $own .Values.serviceAccount.name -}}
{{- end -}}

{{- define "clusterkv.image" -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{/* The domain in which shards are NAME-0, NAME-1 …, ready or not. */}}
{{- define "clusterkv.peersDomain" -}}
{{- $name := include "clusterkv.fullname" . -}}
{{- printf "%s-peers.%s.svc.%s" $name .Release.Namespace .Values.clusterDomain -}}
{{- end -}}

{{/* "64MiB", "2Gi", "1500M", 4096: bytes. */}}
{{- define "clusterkv.bytes" -}}
{{- $text := . | toString -}}
{{- if kindIs "float64" . -}}{{- $text = . | int64 | toString -}}{{- end -}}
{{- $number := regexFind "^[0-9]+" $text | int64 -}}
{{- $suffix := regexReplaceAll "^[0-9]+(\\.[0-9]+)?" $text "" | trimSuffix "B" -}}
{{- $scales := dict "" 1 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $scales = merge $scales (dict "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000) -}}
{{- if not (hasKey $scales $suffix) -}}
{{- fail (printf "expected a size such as 64MiB or 2Gi, got %q" $text) -}}
{{- end -}}
{{- mul $number (get $scales $suffix) -}}
{{- end -}}

{{/* Threads for 0: the CPU limit rounded up, or 0 (the node's cores) without one. */}}
{{- define "clusterkv.threads" -}}
{{- $limit := dig "limits" "cpu" "" .Values.resources | toString -}}
{{- if hasSuffix "m" $limit -}}
{{- div (add (trimSuffix "m" $limit | int64) 999) 1000 -}}
{{- else if $limit -}}
{{- ceil (float64 $limit) | int64 -}}
{{- else -}}
0
{{- end -}}
{{- end -}}

{{/* Selects this release's series. */}}
{{- define "clusterkv.series" -}}
{{- printf `namespace="%s", pod=~"%s-[0-9]+"` .Release.Namespace (include "clusterkv.fullname" .) -}}
{{- end -}}

{{/* Where health is asked. */}}
{{- define "clusterkv.healthPort" -}}
{{- ternary .Values.ports.admin .Values.ports.health (eq .Values.tls.mode "disabled") | int -}}
{{- end -}}

{{/* The shards' certificate: tls.crt, tls.key, ca.crt. */}}
{{- define "clusterkv.tlsSecret" -}}
{{- $own := printf "%s-tls" (include "clusterkv.fullname" .) -}}
{{- ternary $own .Values.tls.existingSecret .Values.tls.certManager.enabled -}}
{{- end -}}

{{/* What `helm test` and operators show: ca.crt, and with mutual TLS tls.crt, tls.key. */}}
{{- define "clusterkv.clientSecret" -}}
{{- if .Values.tls.certManager.enabled -}}
{{- printf "%s-operator-tls" (include "clusterkv.fullname" .) -}}
{{- else -}}
{{- default .Values.tls.existingSecret .Values.tls.clientSecret -}}
{{- end -}}
{{- end -}}

{{- define "clusterkv.operatorIdentity" -}}
{{- $own := printf "%s-operator" (include "clusterkv.fullname" .) -}}
{{- ternary $own .Values.tls.operatorIdentity .Values.tls.certManager.enabled -}}
{{- end -}}

{{/* Of the pod that `helm test` runs. */}}
{{- define "clusterkv.testLabels" -}}
app.kubernetes.io/name: {{ include "clusterkv.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end -}}

{{/* Under which the shards' keys are. */}}
{{- define "clusterkv.etcdPrefix" -}}
{{- default (printf "clusterkv/%s/%s" .Release.Namespace (include "clusterkv.fullname" .)) .Values.etcd.prefix -}}
{{- end -}}

{{/* The fewest shards that there should be. */}}
{{- define "clusterkv.leastShards" -}}
{{- ternary .Values.shards .Values.autoscaling.minShards (eq .Values.autoscaling.mode "disabled") | int -}}
{{- end -}}
