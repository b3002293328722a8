#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test that needs no GPU: first the release build
# (or another preset), then the suite again under clang's thread-safety analysis, AddressSanitizer
# with the fuzz targets and ThreadSanitizer, clang-tidy, and the compilation of all CUDA code.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'END'
Usage: tests/run.sh [--preset=NAME] [--quick] [--jobs=N]
  --preset=NAME  the first build: release (default), dev, asan, tsan, thread-safety
  --quick        only that one
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
  # The sanitizers' maps of memory do not fit all random layouts of newer kernels.
  case $1 in
    asan | tsan) if setarch -R true 2>/dev/null; then fixed=(setarch -R); fi ;;
  esac
  ${fixed[@]+"${fixed[@]}"} ctest --preset "$1" -j "$jobs" -LE gpu --output-junit ctest.xml
}

run_preset() {  # returns 1 where a step failed, having told so
  local name=$1
  # Named, because the quickstart may have configured this folder without tests.
  try_step "$name: configure" cmake --preset "$name" -DCLUSTERKV_TESTS=ON \
    "-DCLUSTERKV_BENCH=$([ "$name" = release ] && echo ON || echo OFF)" || return 1
  try_step "$name: build" cmake --build --preset "$name" -j "$jobs" || return 1
  local status=0
  try_step "$name: test" run_tests "$name" || status=1
  sed -n '/tests passed/,$p' "$STEPS_LOG"
  return $status
}

presets=("$preset")
if [ -z "$quick" ]; then
  for other in thread-safety asan tsan; do
    [ "$other" = "$preset" ] || presets+=("$other")
  done
fi
failed=()
# Compiles and links; what needs a GPU is run by tests/gpu/run.sh.
run_cuda() {
  local nvcc
  nvcc=$(tests/cuda_toolchain.sh) || return
  CUDACXX=$nvcc cmake --preset cuda -DCLUSTERKV_TESTS=ON && cmake --build --preset cuda -j "$jobs"
}

for name in "${presets[@]}"; do
  run_preset "$name" || failed+=("$name")
done
if [ -z "$quick" ]; then
  # With the compile commands of clang's own preset.
  try_step "clang-tidy" tests/style/tidy.py --build=build/thread-safety --jobs="$jobs" ||
    failed+=(clang-tidy)
  try_step "cuda: build" run_cuda || failed+=(cuda)
fi
steps_table
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (of ${presets[*]}), after $(steps_time $SECONDS)" >&2
  exit 1
fi
echo "All passed: ${presets[*]}, in $(steps_time $SECONDS)"
