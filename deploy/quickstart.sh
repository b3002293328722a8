#!/usr/bin/env bash
# From a fresh clone on a bare Debian 12 or Ubuntu 24.04 to a served decode: installs what is
# missing, builds, starts a server, streams the KV of a real model in, decodes 384 tokens through it
# under each preset, shows how near the answers come to full attention and what they cost, and stops
# the server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: deploy/quickstart.sh [--jobs=N]
  --jobs=N  compilers at a time (default: one per processor)
Writes build/quickstart/replay.json and build/quickstart/replay.svg.
END
}

jobs=$(nproc)
for argument in "$@"; do
  case $argument in
    --jobs=*) jobs=${argument#*=} ;;
    --help | -h) usage; exit 0 ;;
    *) echo "Unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done

LOG_DIR=build/logs/quickstart
. deploy/lib/steps.sh

bin=build/release/bin
out=build/quickstart
server_log=$out/server.log
server_pid=
trap '[ -z "$server_pid" ] || kill -KILL "$server_pid" 2>/dev/null || true' EXIT

# The suite's build folder is taken as it is; a new one is made without tests.
configure() {
  local options=()
  [ -f build/release/CMakeCache.txt ] || options=(-DCLUSTERKV_TESTS=OFF -DCLUSTERKV_BENCH=OFF)
  cmake --preset release ${options[@]+"${options[@]}"}
}

build() { cmake --build --preset release -j "$jobs" --target clusterkv-server ckv; }

is_listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

free_port() {  # a port of the loopback interface that nobody listens on now
  local port
  while :; do
    port=$((20000 + RANDOM % 12000))
    is_listening "$port" || { echo "$port"; return; }
  done
}

# Runs in the script itself: the server must be its child, so that its exit status can be told.
start_server() {
  local attempt
  mkdir -p "$out"
  for attempt in 1 2 3; do
    port=$(free_port)
    admin_port=$(free_port)
    metrics_port=$(free_port)
    "$bin/clusterkv-server" --listen="127.0.0.1:$port" --admin_listen="127.0.0.1:$admin_port" \
      --metrics_listen="127.0.0.1:$metrics_port" --arena_bytes=256MiB \
      >"$server_log" 2>&1 </dev/null &
    server_pid=$!
    for _ in $(seq 100); do
      kill -0 "$server_pid" 2>/dev/null || break  # the port was taken meanwhile, or worse
      if is_listening "$port"; then return 0; fi
      sleep 0.1
    done
  done
  server_pid=
  echo "FAILED: start the server. The end of $server_log:" >&2
  tail -n 40 "$server_log" | sed 's/^/    /' >&2
  return 1
}

stop_server() {
  local status=0
  kill -TERM "$server_pid"
  wait "$server_pid" || status=$?
  server_pid=
  [ $status -eq 0 ] && return 0
  echo "FAILED: stop the server: it exited $status. The end of $server_log:" >&2
  tail -n 40 "$server_log" | sed 's/^/    /' >&2
  return 1
}

replay() {
  "$bin/ckv" replay --server="127.0.0.1:$port" --compare --json="$out/replay.json" \
    --svg="$out/replay.svg" tests/data/moby_dick_8k.layer3.safetensors \
    tests/data/moby_dick_8k.layer6.safetensors
}

# shellcheck disable=SC2086
install_packages $BUILD_PACKAGES
step "Configure" configure
step "Build the server and ckv" build
start_server
echo "    clusterkv-server on 127.0.0.1:$port, metrics on http://127.0.0.1:$metrics_port/metrics"
step "Check the server" "$bin/ckv" status --server="127.0.0.1:$port"
step "Prefill and decode 8,192 tokens of Moby-Dick through it" replay
echo
cat "$STEPS_LOG"
echo
stop_server
echo "Server stopped cleanly. Figures: $out/replay.json, picture: $out/replay.svg."
echo "All of it took $(steps_time $SECONDS)."
