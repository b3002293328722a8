#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test that needs no GPU: first the release build
# (or another preset) with all CUDA code compiled and linked, then the suite again under
# AddressSanitizer with the fuzz targets and with engines and servers on an emulated GPU (its
# compiler, clang, checks the lock annotations too: what the preset thread-safety does alone) and
# under ThreadSanitizer, and clang-tidy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: tests/run.sh [--preset=NAME] [--quick] [--jobs=N]
  --preset=NAME  the first build: release (default), dev, asan, tsan, thread-safety
  --quick        only that one, with CUDA code where there is a CUDA compiler
  --jobs=N       compilers and tests at a time (default: one per processor)
END
}

preset=release
quick=
jobs=$(nproc)
for argument in "$@"; do
  case $argument in
    --preset=*) preset=${argument#*=} ;;
    --jobs=*) jobs=${argument#*=} ;;
    --quick) quick=1 ;;
    --help | -h) usage; exit 0 ;;
    *) echo "Unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
case $preset in
  release | dev | asan | tsan | thread-safety) ;;
  *) echo "Unknown preset $preset" >&2; usage >&2; exit 2 ;;
esac

LOG_DIR=build/logs/tests
STEPS_TAIL=100  # of a failing test's output
. deploy/lib/steps.sh

packages="$BUILD_PACKAGES $TEST_PACKAGES"
if [ -z "$quick" ] || [ "$preset" = asan ] || [ "$preset" = thread-safety ]; then
  packages+=" $CHECK_PACKAGES clang-runtime"
fi
# shellcheck disable=SC2086
install_packages $packages

run_tests() {
  local fixed=()
  rm -f "build/$1/ctest.xml"
  # The sanitizers' maps of memory do not fit all random layouts of newer kernels.
  case $1 in
    asan | tsan) if setarch -R true 2>/dev/null; then fixed=(setarch -R); fi ;;
  esac
  ${fixed[@]+"${fixed[@]}"} ctest --preset "$1" -j "$jobs" -LE gpu --output-junit ctest.xml
}

run_preset() {  # NAME CUDA: returns 1 where a step failed, having told so
  local name=$1 cuda=$2
  # Named, because the quickstart may have configured this folder without tests.
  try_step "$name: configure" cmake --preset "$name" -DCLUSTERKV_TESTS=ON "-DCLUSTERKV_CUDA=$cuda" \
    "-DCLUSTERKV_BENCH=$([ "$name" = release ] && echo ON || echo OFF)" || return 1
  try_step "$name: build" cmake --build --preset "$name" -j "$jobs" || return 1
  local status=0
  try_step "$name: test" run_tests "$name" || status=1
  sed -n '/tests passed/,$p' "$STEPS_LOG"
  return $status
}

presets=("$preset")
failed=()
cuda=AUTO
if [ -z "$quick" ]; then
  for other in asan tsan; do
    [ "$other" = "$preset" ] || presets+=("$other")
  done
  # It compiles and links; what needs a GPU is run by tests/gpu/run.sh.
  if try_step "cuda: compiler" tests/cuda_toolchain.sh; then
    CUDACXX=$(tests/cuda_toolchain.sh)
    export CUDACXX
    cuda=ON
  else
    failed+=(cuda)
  fi
fi
for name in "${presets[@]}"; do
  run_preset "$name" "$cuda" || failed+=("$name")
  cuda=OFF
done
if [ -z "$quick" ]; then
  # With the compile commands of a build by clang.
  try_step "clang-tidy" tests/style/tidy.py --build=build/asan --jobs="$jobs" ||
    failed+=(clang-tidy)
fi
steps_table
if [ ${#failed[@]} -gt 0 ]; then
  for name in "${presets[@]}"; do
    [ ! -e "build/$name/ctest.xml" ] || tests/failures.py "build/$name/ctest.xml" >&2
  done
  echo "FAILED: ${failed[*]} (of ${presets[*]}), after $(steps_time $SECONDS)" >&2
  exit 1
fi
echo "All passed: ${presets[*]}, in $(steps_time $SECONDS)"
