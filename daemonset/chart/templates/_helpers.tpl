{{- define "culvert.name" -}}{{ .Values.resourceName | default "ztunnel" }}{{- end }}

{{- define "culvert.image" -}}
{{- if contains "/" .Values.image }}{{ .Values.image }}{{ else }}{{ .Values.hub }}/{{ .Values.image }}:{{ .Values.tag }}{{ with .Values.variant }}-{{ . }}{{ end }}{{ end }}
{{- end }}

{{- define "culvert.labels" -}}
app.kubernetes.io/name: {{ include "culvert.name" . | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: culvert
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "culvert.annotations" -}}
{{- if or .Values.annotations .Values.revision }}
annotations:
  {{- with .Values.revision }}
  istio.io/rev: {{ . | quote }}
  {{- end }}
  {{- with .Values.annotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}

{{- define "culvert.control" -}}culvert-control{{- end }}

{{- define "culvert.controlLabels" -}}
app.kubernetes.io/name: {{ include "culvert.control" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: culvert
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "culvert.controlPlane" -}}
{{- if .Values.control.enabled }}{{ include "culvert.control" . }}.{{ .Release.Namespace }}.svc:15012
{{- else }}istiod{{ with .Values.revision }}-{{ . }}{{ end }}.{{ .Values.istioNamespace }}.svc:15012{{ end }}
{{- end }}

{{- define "culvert.cniBinDir" -}}
{{- if .Values.cni.binDir }}{{ .Values.cni.binDir }}
{{- else if eq .Values.platform "openshift" }}/var/lib/cni/bin
{{- else if eq .Values.platform "gke" }}/home/kubernetes/bin
{{- else if eq .Values.platform "k3s" }}/var/lib/rancher/k3s/data/cni
{{- else if eq .Values.platform "k3d" }}/bin
{{- else if eq .Values.platform "microk8s" }}/var/snap/microk8s/current/opt/cni/bin
{{- else }}/opt/cni/bin{{ end }}
{{- end }}

{{- define "culvert.cniConfDir" -}}
{{- if .Values.cni.confDir }}{{ .Values.cni.confDir }}
{{- else if eq .Values.platform "openshift" }}/etc/cni/multus/net.d
{{- else if has .Values.platform (list "k3s" "k3d") }}/var/lib/rancher/k3s/agent/etc/cni/net.d
{{- else if eq .Values.platform "microk8s" }}/var/snap/microk8s/current/args/cni-network
{{- else }}/etc/cni/net.d{{ end }}
{{- end }}

{{- define "culvert.scope" -}}
{{- $scope := .Values.resourceScope | default "all" }}
{{- if not (has $scope (list "all" "namespace" "cluster")) }}{{ fail (printf "resourceScope: %q is not all, namespace or cluster" $scope) }}{{ end }}
{{- if not (has .Values.pods (list "kubernetes" "agent")) }}{{ fail (printf "pods: %q is not kubernetes or agent" .Values.pods) }}{{ end }}
{{- if not (has .Values.facts (list "istiod" "file")) }}{{ fail (printf "facts: %q is not istiod or file" .Values.facts) }}{{ end }}
{{- if not (has .Values.certificates (list "istiod" "builtin")) }}{{ fail (printf "certificates: %q is not istiod or builtin" .Values.certificates) }}{{ end }}
{{- if eq .Values.facts "file" }}
{{- if .Values.xdsAddress }}{{ fail "xdsAddress: is set, and facts: file asks no control plane" }}{{ end }}
{{- if .Values.egress.configMap }}{{ fail "egress.configMap: is set, and with facts: file egress policies are in mesh.yaml" }}{{ end }}
{{- if not .Values.standalone.configMap }}{{ fail "standalone.configMap: is empty, and facts: file needs it" }}{{ end }}
{{- end }}
{{- if eq .Values.certificates "builtin" }}
{{- if .Values.caAddress }}{{ fail "caAddress: is set, and certificates: builtin asks no CA" }}{{ end }}
{{- if not .Values.standalone.secret }}{{ fail "standalone.secret: is empty, and certificates: builtin needs it" }}{{ end }}
{{- end }}
{{- if .Values.control.enabled }}
{{- if or (ne .Values.facts "istiod") (ne .Values.certificates "istiod") }}{{ fail "control.enabled: serves mesh facts and certificates as istiod does; leave facts and certificates at istiod" }}{{ end }}
{{- if or .Values.xdsAddress .Values.caAddress }}{{ fail "control.enabled: the daemons use it; leave xdsAddress and caAddress empty" }}{{ end }}
{{- if .Values.revision }}{{ fail "control.enabled: has no revisions; leave revision empty" }}{{ end }}
{{- if lt (int .Values.control.replicas) 1 }}{{ fail "control.replicas: there must be one at least" }}{{ end }}
{{- end }}
{{- if and .Values.cleanup.enabled (eq .Values.pods "agent") }}{{ fail "cleanup.enabled: with pods: agent a daemon cannot be seen from the node; where none runs: culvert cleanup --all" }}{{ end }}
{{- if not (has .Values.platform (list "" "openshift" "gke" "eks" "k3s" "k3d" "kind" "minikube" "microk8s")) }}{{ fail (printf "platform: %q is not known; leave it empty" .Values.platform) }}{{ end }}
{{- $scope }}
{{- end }}

{{- define "culvert.quota" -}}
apiVersion: v1
kind: ResourceQuota
metadata:
  name: {{ .name }}-resource-quota
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "culvert.labels" .root | nindent 4 }}
spec:
  hard:
    pods: {{ .root.Values.resourceQuotas.pods | quote }}
  scopeSelector:
    matchExpressions:
    - operator: In
      scopeName: PriorityClass
      values: [system-node-critical]
{{- end }}

{{- define "culvert.scc" -}}
# On OpenShift, host paths and capabilities need this security context constraint.
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  name: {{ .name }}-scc
  namespace: {{ .root.Release.Namespace }}
  labels:
    {{- include "culvert.labels" .root | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: system:openshift:scc:privileged
subjects:
- kind: ServiceAccount
  name: {{ .name | quote }}
  namespace: {{ .root.Release.Namespace }}
{{- end }}

{{- define "culvert.cleaner" -}}
image: {{ include "culvert.image" . | quote }}
{{- with .Values.imagePullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
securityContext:
  privileged: false
  allowPrivilegeEscalation: true
  capabilities:
    drop: [ALL]
    add: [NET_ADMIN, SYS_ADMIN, NET_RAW, SYS_PTRACE, DAC_OVERRIDE]
  readOnlyRootFilesystem: true
  runAsUser: 0
  runAsNonRoot: false
  {{- with .Values.seccompProfile }}
  seccompProfile:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.appArmorProfile }}
  appArmorProfile:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $selinux := .Values.seLinuxOptions | default (ternary (dict "type" "spc_t") (dict) (eq .Values.platform "openshift")) }}
  {{- with $selinux }}
  seLinuxOptions:
    {{- toYaml . | nindent 4 }}
  {{- end }}
env:
- name: CULVERT_PODS
  value: {{ .Values.pods }}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- name: CULVERT_PROC
  value: /host/proc
- name: CULVERT_CNI_BIN_DIR
  value: /host/opt/cni/bin
- name: CULVERT_CNI_CONF_DIR
  value: /host/etc/cni/net.d
- name: CULVERT_STATE_FILE
  value: /var/lib/culvert/mesh.state
{{- range $key, $value := .Values.env }}
- name: {{ $key }}
  value: {{ $value | quote }}
{{- end }}
volumeMounts:
- name: host-proc
  mountPath: /host/proc
  readOnly: true
- name: culvert-run
  mountPath: /var/run/culvert
- name: cni-bin
  mountPath: /host/opt/cni/bin
- name: cni-conf
  mountPath: /host/etc/cni/net.d
- name: state
  mountPath: /var/lib/culvert
{{- end }}
