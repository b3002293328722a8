#!/usr/bin/env bash
# The Python package and quality: builds worker/python for an interpreter, runs its tests against a
# build's server, then tests/quality over a model at 8k tokens, and what is demanded of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: tests/python.sh [--python=FILE] [--build=DIR] [--context=N] [--sequences=N]
  --python=FILE   an interpreter with the package's dependencies (default: CLUSTERKV_PYTHON, else a
                  virtual environment in build/python, made here; PyTorch takes gigabytes)
  --build=DIR     where bin/clusterkv-server is (default: build/release)
  --context=N     of the quality run, in tokens (default: 8192)
  --sequences=N   of each kind there (default: 1)
The model and the texts are ../shared/models/books-30m-32k and ../shared/texts (CLUSTERKV_SHARED is
another place for ../shared). Without them, or without PyTorch, what needs them is skipped, and a
line says so.
END
}

python=${CLUSTERKV_PYTHON:-}
build=build/release
context=8192
sequences=1
for argument in "$@"; do
  case $argument in
    --python=*) python=${argument#*=} ;;
    --build=*) build=${argument#*=} ;;
    --context=*) context=${argument#*=} ;;
    --sequences=*) sequences=${argument#*=} ;;
    --help | -h) usage; exit 0 ;;
    *) echo "Unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done

LOG_DIR=build/logs/python
STEPS_TAIL=60
. deploy/lib/steps.sh

site=$PWD/build/python/site
shared=${CLUSTERKV_SHARED:-$PWD/../shared}
export CLUSTERKV_SHARED=$shared
export CLUSTERKV_SERVER=$PWD/$build/bin/clusterkv-server

make_venv() {
  [ -x build/python/venv/bin/python ] || python3 -m venv build/python/venv || return
  build/python/venv/bin/python -m pip install -q torch 'transformers>=5.0' 'safetensors>=0.4' \
    'grpcio>=1.60' 'grpcio-tools>=1.60' 'protobuf>=5' 'googleapis-common-protos>=1.63' \
    'numpy>=1.24' 'xxhash>=3' 'pytest>=8' 'nanobind>=2.0' 'scikit-build-core>=0.10'
}

# Beside the interpreter's packages, so that one which is shared stays as it is.
install_package() {
  "$python" -m pip install -q --upgrade --no-deps --no-build-isolation --target "$site" \
    ./worker/python
}

package_tests() {
  (cd worker/python && PYTHONPATH=$site "$python" -m pytest -ra -p no:cacheprovider tests)
}

quality() {
  local out=build/python/quality-$context.json texts log=build/python/server.log server
  texts=$(printf '%s,' "$shared"/texts/*.txt)
  "$CLUSTERKV_SERVER" --listen=127.0.0.1:0 --admin_listen=127.0.0.1:0 --arena_bytes=2GiB \
    --log_level=warning >"$log" &
  server=$!
  trap 'kill "$server" 2>/dev/null || true' EXIT
  for _ in $(seq 100); do
    grep -q '^listening on' "$log" && break
    sleep 0.1
  done
  PYTHONPATH=$site "$python" tests/quality/run.py \
    --model="$shared/models/books-30m-32k" --text="${texts%,}" \
    --server="$(sed -n 's/^listening on \([^,]*\),.*/\1/p' "$log")" --context="$context" \
    --sequences="$sequences" --check_oracle --json="$out" --methods="$(printf %s \
      full,clusterkv@1024,recall@128,default@64,default@64:k8v4, \
      oracle-clusterkv@1024,oracle-recall@128,oracle-default@64)" || return
  "$python" tests/quality/demands.py "$out" $([ "$sequences" -lt 6 ] && echo --few)
}

# shellcheck disable=SC2086
install_packages $BUILD_PACKAGES python3 python3-dev python3-venv openssl
if [ ! -x "$CLUSTERKV_SERVER" ]; then
  echo "No server at $CLUSTERKV_SERVER: build it (cmake --build --preset release)" >&2
  exit 1
fi
if [ -z "$python" ]; then
  if ! try_step "Virtual environment with PyTorch" make_venv; then
    echo "SKIPPED: the Python package's tests and quality: its packages could not be installed"
    exit 0
  fi
  python=$PWD/build/python/venv/bin/python
fi
step "Build worker/python" install_package
step "Tests of worker/python" package_tests
tail -n 1 "$STEPS_LOG"
sed -n 's/^SKIPPED/SKIPPED:/p' "$STEPS_LOG"
if ! "$python" -c 'import torch, transformers' 2>/dev/null; then
  echo "SKIPPED: quality at $context tokens: $python has no PyTorch or no Transformers"
elif [ ! -d "$shared/models/books-30m-32k" ] || [ ! -d "$shared/texts" ]; then
  echo "SKIPPED: quality at $context tokens: no model and texts in $shared"
else
  step "Quality at $context tokens" quality
  sed -n '/^1\. /,$p' "$STEPS_LOG"
fi
steps_table
