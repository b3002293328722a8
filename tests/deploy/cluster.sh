#!/usr/bin/env bash
# A real Kubernetes of one node on this machine, in a network namespace without a way out, and the
# chart installed on it.
#
#   cluster.sh up            starts it, builds the image, and prints the kubeconfig's path last
#   cluster.sh test [--mutual …]
#                            installs the chart and tries everything (cluster_test.py); with
#                            KUBECONFIG set, on that cluster, with the image CKV_IMAGE, from a
#                            machine that resolves and reaches its pods and services
#   cluster.sh exec COMMAND  runs a command in its network, with its kubeconfig
#   cluster.sh down          ends it and removes what it left
#
# Needs root, and these programs in CKV_K8S_BIN or PATH: etcd, kube-apiserver,
# kube-controller-manager, kube-scheduler, kubelet, kube-proxy, coredns, kubectl, helm, containerd,
# ctr, runc, buildah, debootstrap, gcc; the CNI plugins in /usr/lib/cni. Where one is missing `up`
# and `test` say so and end with status 77.
# Kubernetes built by `go build` needs its version: -ldflags "-X k8s.io/component-base/version.
# gitVersion=v1.34.2 -X …gitMajor=1 -X …gitMinor=34", else helm takes it for v0.0.0.
# CKV_CLUSTER_STATE: where everything lies (default: clusterkv-cluster in the temporary folder).
# GHZ: ghz, where it is not in PATH; it goes into an image too, to be run from a pod.
# CKV_IMAGE_ARCHIVE: an oci-archive to take instead of building the image.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
state=${CKV_CLUSTER_STATE:-${TMPDIR:-/tmp}/clusterkv-cluster}
name=clusterkv
# Ranges for documentation: no one else's addresses.
node=198.51.100.1
services=192.0.2.0/24
pods=203.0.113.0/24
kubeconfig=$state/kubeconfig
socket=$state/containerd.sock
version=$(sed -n 's/^project(clusterkv VERSION \([0-9.]*\).*/\1/p' "$root/CMakeLists.txt")
image=localhost/clusterkv:$version
export PATH=${CKV_K8S_BIN:+$CKV_K8S_BIN:}$PATH:/usr/sbin:/sbin

say() { echo "cluster.sh: $*" >&2; }

require() {
  local program missing=
  for program in "$@"; do command -v "$program" >/dev/null || missing+=" $program"; done
  [ -x /usr/lib/cni/bridge ] || missing+=" /usr/lib/cni/bridge"
  [ "$(id -u)" -eq 0 ] || missing+=" root"
  [ -z "$missing" ] && return
  say "SKIPPED: missing$missing"
  exit 77
}

# Not `ip netns exec`: that mounts another /sys, without the cgroups that kubelet wants.
inside() { nsenter "--net=/var/run/netns/$name" "$@"; }
# With the cluster's names too.
inside_resolving() {
  inside unshare --mount sh -c 'mount --bind "$0" /etc/resolv.conf && exec "$@"' \
    "$state/resolv.conf" "$@"
}
kube() { inside kubectl --kubeconfig "$kubeconfig" "$@"; }

start() {  # name command…: in the background, its pid and its output in the state folder
  local program=$1
  shift
  # Not through `inside`: a function in the background would be the shell's pid.
  nsenter "--net=/var/run/netns/$name" setsid "$@" >"$state/log/$program" 2>&1 </dev/null &
  echo $! >"$state/pid/$program"
}

wait_for() {  # seconds what command…
  local limit=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ $SECONDS -ge $limit ]; then
      say "FAILED: $what; the logs are in $state/log"
      "$@" >&2 || return 1
    fi
    sleep 0.3
  done
}

make_network() {
  ip netns add $name
  inside ip link set lo up
  inside ip link add node0 type bridge
  inside ip address add $node/24 dev node0
  inside ip link set node0 up
  inside ip route add default dev node0
  inside sysctl -q -w net.ipv4.ip_forward=1
}

make_credentials() {
  openssl genrsa -out "$state/sa.key" 2048 2>/dev/null
  openssl rsa -in "$state/sa.key" -pubout -out "$state/sa.pub" 2>/dev/null
  local token
  token=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  echo "$token,admin,admin,system:masters" >"$state/tokens"
  cat >"$kubeconfig" <<END
apiVersion: v1
kind: Config
clusters:
  - {name: here, cluster: {server: "https://$node:6443", insecure-skip-tls-verify: true}}
users:
  - {name: admin, user: {token: $token}}
contexts:
  - {name: here, context: {cluster: here, user: admin}}
current-context: here
END
  chmod 600 "$kubeconfig" "$state/tokens" "$state/sa.key"
}

start_control_plane() {
  # The shards' too, where the chart is told so.
  start etcd etcd --data-dir "$state/etcd" \
    --listen-client-urls "http://127.0.0.1:2379,http://$node:2379" \
    --advertise-client-urls "http://$node:2379" --listen-peer-urls http://127.0.0.1:2380 \
    --unsafe-no-fsync
  start kube-apiserver kube-apiserver --etcd-servers http://127.0.0.1:2379 \
    --service-account-key-file "$state/sa.pub" --service-account-signing-key-file "$state/sa.key" \
    --service-account-issuer https://kubernetes.default.svc --token-auth-file "$state/tokens" \
    --service-cluster-ip-range $services --authorization-mode RBAC --allow-privileged=true \
    --kubelet-preferred-address-types InternalIP --advertise-address $node \
    --cert-dir "$state/apiserver"
  wait_for 60 "the API server" kube get --raw /readyz
  start kube-controller-manager kube-controller-manager --kubeconfig "$kubeconfig" \
    --service-account-private-key-file "$state/sa.key" --leader-elect=false \
    --root-ca-file "$state/apiserver/apiserver.crt" --cluster-signing-cert-file= \
    --cert-dir "$state/controller-manager"
  start kube-scheduler kube-scheduler --kubeconfig "$kubeconfig" --leader-elect=false \
    --cert-dir "$state/scheduler"
}

write_containerd_config() {
  mkdir -p "$state/cni"
  cat >"$state/cni/10-pods.conflist" <<END
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "pods0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$pods"}]], "dataDir": "$state/cni-ipam",
            "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
  cat >"$state/containerd.toml" <<END
version = 2
root = "$state/containerd"
state = "$state/containerd-run"
oom_score = 0
[grpc]
  address = "$socket"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".containerd]
  snapshotter = "${CKV_SNAPSHOTTER:-overlayfs}"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "$state/cni"
END
}

write_kubelet_config() {
  cat >"$state/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}  # nobody else is in this network
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
enforceNodeAllocatable: []
evictionHard: {}
imageGCHighThresholdPercent: 100
clusterDNS: [$node]
clusterDomain: cluster.local
resolvConf: $state/resolv.conf
podLogsDir: $state/pod-logs
containerRuntimeEndpoint: unix://$socket
END
}

start_node() {
  write_containerd_config
  start containerd containerd --config "$state/containerd.toml"
  wait_for 30 "containerd" ctr -a "$socket" version
  import_pause
  write_kubelet_config
  start kubelet kubelet --kubeconfig "$kubeconfig" --config "$state/kubelet.yaml" \
    --root-dir "$state/kubelet" --cert-dir "$state/kubelet-certs" --hostname-override $name-node \
    --node-ip $node
  start kube-proxy kube-proxy --kubeconfig "$kubeconfig" --hostname-override $name-node \
    --proxy-mode iptables --oom-score-adj=0 --conntrack-max-per-core=0 \
    --conntrack-tcp-timeout-established=0s --conntrack-tcp-timeout-close-wait=0s
  cat >"$state/Corefile" <<END
.:53 {
  bind $node
  errors
  kubernetes cluster.local {
    kubeconfig $kubeconfig here
    ttl 1
  }
}
END
  start coredns coredns -conf "$state/Corefile"
  wait_for 90 "the node" kube wait --for=condition=Ready "node/$name-node" --timeout=1s
  wait_for 60 "the default service account" kube get serviceaccount default
}

import_pause() {  # the process that holds a pod's namespaces
  mkdir -p "$state/pause"
  echo '#include <unistd.h>
int main() { for (;;) pause(); }' | gcc -static -Os -o "$state/pause/pause" -x c -
  local container
  container=$(buildah from scratch)
  buildah copy -q "$container" "$state/pause/pause" /pause >/dev/null
  buildah config --entrypoint '["/pause"]' "$container"
  import_image "$container" localhost/pause:1
}

import_image() {  # a buildah container or image, and its name here
  local archive=$state/import.tar
  rm -f "$archive"
  if [ "$1" = "$2" ]; then
    buildah push -q "$2" "oci-archive:$archive:$2"
  else
    buildah commit -q "$1" "oci-archive:$archive:$2" >/dev/null
    buildah rm "$1" >/dev/null
  fi
  ctr -a "$socket" -n k8s.io images import "$archive" >/dev/null
  rm -f "$archive"
}

import_ghz() {
  local ghz container library
  ghz=${GHZ:-$(command -v ghz || true)}
  [ -n "$ghz" ] || return 0
  container=$(buildah from scratch)
  buildah copy -q "$container" "$ghz" /ghz >/dev/null
  for library in $(ldd "$ghz" 2>/dev/null | grep -o '/[^ ]*'); do  # none where it is static
    buildah copy -q "$container" "$(readlink -f "$library")" "$library" >/dev/null
  done
  buildah config --entrypoint '["/ghz"]' "$container"
  import_image "$container" localhost/ghz:1
}

build_image() {
  if [ -n "${CKV_IMAGE_ARCHIVE:-}" ]; then
    ctr -a "$socket" -n k8s.io images import "$CKV_IMAGE_ARCHIVE" >/dev/null
    return
  fi
  if ! buildah images localhost/debian:bookworm >/dev/null 2>&1; then
    say "making the base image"
    local container
    debootstrap --variant=minbase bookworm "$state/debian" >"$state/log/debootstrap"
    container=$(buildah from scratch)
    buildah copy -q "$container" "$state/debian" / >/dev/null
    buildah commit -q --rm "$container" localhost/debian:bookworm >/dev/null
    rm -rf "$state/debian"
  fi
  say "building $image (log: $state/log/image)"
  buildah bud --layers --isolation chroot --pull-never --build-arg BASE=localhost/debian:bookworm \
    --build-arg "JOBS=$(nproc)" -f "$root/deploy/docker/Dockerfile" -t "$image" "$root" \
    >"$state/log/image" 2>&1 || { tail -n 30 "$state/log/image" >&2; return 1; }
  import_image "$image" "$image"
}

up() {
  require etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy coredns \
    kubectl helm containerd ctr runc buildah debootstrap gcc ip nsenter unshare iptables openssl
  if [ -e "$state/pid" ]; then
    say "it is up already; cluster.sh down ends it"
    return 1
  fi
  mkdir -p "$state"/{log,pid}
  echo "nameserver $node" >"$state/resolv.conf"
  make_network
  make_credentials
  start_control_plane
  start_node
  say "the node is ready after $SECONDS s"
  build_image
  import_ghz
  say "up after $SECONDS s; kubectl and helm: cluster.sh exec kubectl get pods -A"
  echo "$kubeconfig"
}

# The names of the namespaces that pods of this containerd live in; nobody else removes them.
pod_networks() {
  local pid network
  for pid in $(ctr -a "$socket" -n k8s.io tasks ls 2>/dev/null | awk 'NR > 1 {print $2}'); do
    for network in /var/run/netns/cni-*; do
      if [ "$network" -ef "/proc/$pid/ns/net" ]; then basename "$network"; fi
    done
  done | sort -u
}

down() {
  local file pid networks=
  if [ -S "$socket" ]; then  # pods first, while somebody can still end them
    networks=$(pod_networks)
    ctr -a "$socket" -n k8s.io tasks ls -q 2>/dev/null |
      xargs -r -n 1 ctr -a "$socket" -n k8s.io tasks kill -s KILL 2>/dev/null || true
  fi
  for file in "$state"/pid/kubelet "$state"/pid/*; do
    [ -e "$file" ] || continue
    pid=$(cat "$file")
    kill "$pid" 2>/dev/null || true
    timeout 10 tail --pid="$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
    rm -f "$file"
  done
  # The shims outlive containerd.
  for pid in $(grep -lFz -- "$socket" /proc/[0-9]*/cmdline 2>/dev/null | cut -d/ -f3); do
    if grep -qz containerd-shim "/proc/$pid/cmdline" 2>/dev/null; then
      kill -KILL "$pid" 2>/dev/null || true
    fi
  done
  sed -n 's/^[^ ]* \([^ ]*\) .*/\1/p' /proc/mounts | grep -F "$state/" | sort -r |
    xargs -r -n 1 umount -l || true
  for file in $networks $name; do ip netns del "$file" 2>/dev/null || true; done
  rm -rf "$state"
  find /sys/fs/cgroup -depth -type d -path '*/kubepods*' -exec rmdir {} + 2>/dev/null || true
}

run_test() {
  if [ -n "${KUBECONFIG:-}" ]; then
    exec python3 -B "$here/cluster_test.py" --image "${CKV_IMAGE:?names the image to install}" "$@"
  fi
  require kubectl helm
  [ -e "$kubeconfig" ] || { say "no cluster: cluster.sh up first"; exit 1; }
  KUBECONFIG=$kubeconfig inside_resolving python3 -B "$here/cluster_test.py" --image "$image" \
    --containerd "$socket" --ghz_image localhost/ghz:1 --etcd "$node:2379" "$@"
}

case ${1:-} in
  up) up ;;
  test) shift; run_test "$@" ;;
  exec) shift; KUBECONFIG=$kubeconfig inside_resolving "$@" ;;
  down) down ;;
  *) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
esac
