#!/usr/bin/env bash
# Tests and times the CUDA kernels on a machine with a GPU: builds what it needs with nvcc alone (no
# CMake, Abseil or gRPC), runs the kernels' tests over cases that make_cases wrote, then
# compute-sanitizer over small ones, then the benchmarks against their peers (these need PyTorch).
# Writes DIR/gpu.json.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

usage() {
  cat <<'END'
Usage: tests/gpu/run.sh --out=DIR [--only=unit|links|faults|bench] [--cases=DIR] [--build=DIR]
                        [--prebuilt] [--sanitize=0] [--programs=DIR] [--kills=N]
  --out=DIR     where gpu.json and logs.txt go
  --only=WHAT   unit: kernels against their references, and under compute-sanitizer; bench:
                benchmarks; links, faults: two processes over every link
  --cases=DIR   what make_cases wrote (default: build/gpu/cases; made there by a make_cases that is
                built under build/)
  --build=DIR   where binaries go (default: build/gpu)
  --prebuilt    they are there already
  --sanitize=0  not under compute-sanitizer
  --programs=DIR  clusterkv-server, ckv and (for links) engine_cuda_gpu_test, resident_loop,
                  ingest_window_gpu_test and ingest_bench of a build with CUDA, their shared
                  libraries in DIR/lib where the machine lacks them (default: build/*/bin). For
                  links the package clusterkv on PYTHONPATH, built with CUDA, lets a Transformers
                  model take part
  --kills=N     of the worker per link (default: 20)
END
}

only='' out='' cases=build/gpu/cases build=build/gpu prebuilt='' sanitize=1 programs='' kills=20
for argument in "$@"; do
  case $argument in
    --only=*) only=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    --cases=*) cases=${argument#*=} ;;
    --build=*) build=${argument#*=} ;;
    --prebuilt) prebuilt=1 ;;
    --sanitize=*) sanitize=${argument#*=} ;;
    --programs=*) programs=${argument#*=} ;;
    --kills=*) kills=${argument#*=} ;;
    --help | -h) usage; exit 0 ;;
    *) echo "Unknown argument $argument" >&2; usage >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { usage >&2; exit 2; }
case $only in '' | unit | links | faults | bench) ;; *) usage >&2; exit 2 ;; esac
logs=$build/logs
mkdir -p "$out" "$build/objects" "$logs"
status=0
wants() { [ -z "$only" ] || [ "$only" = "$1" ]; }
started=$SECONDS
say() { echo "[$((SECONDS - started)) s] $*"; }

flags=(-std=c++20 -O3 -lineinfo -I. -gencode=arch=compute_90a,code=sm_90a --threads=2)
if command -v nvidia-smi > /dev/null; then
  nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
  [ "$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)" = 9.0 ] ||
    flags=(-std=c++20 -O3 -lineinfo -I. -arch=native)
fi
tests=(base codec gather ingest attention select kmeans index resident)
kernels=(base/finite codec/record_codec gather/gather ingest/ingest attention/attention
  select/select select/answer kmeans/kmeans index/index resident/serve resident/step)

compile() {  # compile SOURCE: unless an object is newer than every header and it
  local object=$build/objects/${1//\//_}.o
  if [ ! -f "$object" ] || [ -n "$(find kernels tests/gpu -newer "$object" \
    \( -name '*.h' -o -name '*.cuh' -o -path "$1" \) -print -quit)" ]; then
    nvcc "${flags[@]}" -Xcompiler=-fPIC -c "$1" -o "$object" || return 1
  fi
}

build_all() {
  local sources=() objects=() name jobs=()
  for name in "${kernels[@]}"; do
    sources+=("kernels/${name}_cuda.cu")
    objects+=("$build/objects/kernels_${name//\//_}_cuda.cu.o")
  done
  for name in "${tests[@]}"; do sources+=("tests/gpu/${name}_test.cc"); done
  if wants bench; then sources+=(tests/gpu/bench/gpu_bench.cu tests/gpu/bench/decode_loop.cu); fi
  for name in "${sources[@]}"; do compile "$name" & jobs+=($!); done
  for name in "${jobs[@]}"; do wait "$name" || return 1; done
  for name in "${tests[@]}"; do
    nvcc "${flags[@]}" "$build/objects/tests_gpu_${name}_test.cc.o" \
      "${objects[@]}" -o "$build/${name}_test" || return 1
  done
  if wants bench; then
    for name in gpu_bench decode_loop; do
      nvcc "${flags[@]}" -shared "$build/objects/tests_gpu_bench_$name.cu.o" "${objects[@]}" \
        -o "$build/libckv_$name.so" || return 1
    done
  fi
}

if [ -z "$prebuilt" ] && { wants unit || wants bench; }; then
  say "building"
  build_all > "$logs/build" 2>&1 || { tail -n 40 "$logs/build"; exit 1; }
  say "built"
fi

sanitizes() { [ "$sanitize" = 1 ] && command -v compute-sanitizer > /dev/null; }
memcheck() {  # memcheck TEST: of the programs
  sanitizes || return 0
  say "memcheck $1"
  LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 120 \
    compute-sanitizer --tool memcheck --error-exitcode 9 "$programs/$1" \
    --gtest_filter=-*DeathTest* > "$logs/memcheck.$1" 2>&1 || {
    status=1
    tail -n 25 "$logs/memcheck.$1"
  }
}

with_package() {  # with_package SCRIPT ARGUMENT…: takes the Python package; 77: it is not there
  local name=$1 code=0
  shift
  say "$name"
  LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 120 python3 -B \
    "tests/gpu/$name.py" "--server=$programs/clusterkv-server" "$@" 2>&1 | tee "$logs/$name" ||
    code=${PIPESTATUS[0]}
  [ "$code" = 0 ] || [ "$code" = 77 ] || status=1
}

check() {  # check TOOL TEST:FILTER: a test of the kernels
  local log=$logs/$1.${2/:/.}
  timeout 150 compute-sanitizer --tool "$1" --error-exitcode 9 "$build/${2%%:*}_test" \
    "--cases=$cases" "--filter=${2#*:}" > "$log" 2>&1 && return
  echo "$1 $2: FAILED, or more than 150 s"
  grep -v '^========= *$' "$log" | head -n 25
  return 1
}

# The checkers slow kernels down a hundredfold and keep a processor each busy: small cases, as many
# at once as there are processors.
check_kernels() {
  local small=(gather:Gather attention:AttentionK8V4BesideFloat32 attention:AttentionBFloat16
    select:SelectScoresEverything select:SelectFourBit select:SelectSmall kmeans:KMeansOfFewRows
    index:IndexFewTokens codec:CodecK8V4Float32 base:FiniteFloat32 resident:ResidentRoundsInTurn)
  # A block's threads have unequal work: those of a warp may stand apart at a barrier. Racecheck
  # takes minutes for them.
  local unequal=(select:SelectEqualTokens select:SelectAmongClusters select:SelectPeaked
    select:SelectScoresTokens select:SelectEightHeads)
  say "compute-sanitizer"
  {
    printf 'racecheck %s\n' "${small[@]}"
    printf 'memcheck %s\n' "${unequal[@]}" "${small[@]}" resident:ResidentBFloat16
    printf 'synccheck %s\n' "${unequal[@]}" resident:ResidentRoundsInTurn resident:ResidentBFloat16
  } | xargs -P "$(nproc)" -L 1 bash -c 'check "$0" "$1"'
}
export -f check
export logs build cases

if wants unit; then
  if [ ! -d "$cases" ]; then
    for maker in build/*/bin/make_cases; do
      if [ -x "$maker" ]; then mkdir -p "$cases" && "$maker" "$cases"; break; fi
    done
  fi
  for name in "${tests[@]}"; do
    timeout 120 "$build/${name}_test" "--cases=$cases" 2>&1 | tee "$logs/${name}_test" ||
      status=1
  done
  if sanitizes; then check_kernels || status=1; fi
fi

# Server and ckv are built elsewhere (they need gRPC): --programs, or a build of this tree.
for what in links faults; do
  wants "$what" || continue
  if [ -z "$programs" ]; then
    for maker in build/*/bin/clusterkv-server; do
      if [ -x "$maker" ] && [ -x "$(dirname "$maker")/ckv" ]; then programs=$(dirname "$maker"); fi
    done
  fi
  if [ -z "$programs" ]; then
    echo "$what: no clusterkv-server and ckv: build them with CUDA, or name them by --programs" >&2
    [ "$only" != "$what" ] || status=1
    continue
  fi
  # An engine's pointers and stream on this GPU, against a server on this machine's CPU, and one
  # with a GPU, the second one if there is one.
  if [ "$what" = links ] && [ -x "$programs/engine_cuda_gpu_test" ]; then
    say "engine"
    LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 120 \
      "$programs/engine_cuda_gpu_test" 2>&1 | tee "$logs/engine_cuda_gpu_test" || status=1
    memcheck engine_cuda_gpu_test
  fi
  # A prompt from this GPU, or the second one, into a server on the first: by window, by PutKv.
  if [ "$what" = links ] && [ -x "$programs/ingest_bench" ]; then
    say "ingest"
    LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 120 \
      "$programs/ingest_window_gpu_test" 2>&1 | tee "$logs/ingest_window_gpu_test" || status=1
    memcheck ingest_window_gpu_test
    LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 120 \
      "$programs/ingest_bench" --kills=5 "--json=$out/ingest.json" 2>&1 |
      tee "$logs/ingest_bench" || status=1
  fi
  if [ "$what" = links ]; then
    with_package transformers_window
    with_package torch_engine "--json=$out/torch_engine.json"
  fi
  # Decoding without the host, and a worker that is killed in the middle of it.
  if [ -x "$programs/resident_loop" ]; then
    say "$what: resident"
    more=()
    if sanitizes; then more=(--memcheck); fi
    if [ "$what" = faults ]; then more=(--only=kills); fi
    LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" timeout 300 python3 -B \
      tests/gpu/resident.py "--bin=$programs" "--out=$logs/resident_$what" "--kills=$kills" \
      "${more[@]}" 2>&1 |
      tee "$logs/resident_$what.log" || status=1
    cp "$logs/resident_$what/resident.json" "$out/resident_$what.json" || status=1
  fi
  say "$what"
  if [ "$what" = faults ]; then more=(--faults "--kills=$kills"); else more=(); fi
  LD_LIBRARY_PATH="$programs/lib:${LD_LIBRARY_PATH:-}" python3 -B tests/gpu/links.py \
    "--bin=$programs" "--out=$logs/$what" "${more[@]}" 2>&1 | tee "$logs/$what.log" || status=1
  cp "$logs/$what/$what.json" "$out/" || status=1
done

if wants bench; then
  say "benchmarks"
  python3 tests/gpu/bench/bench.py "--lib=$build/libckv_gpu_bench.so" "--out=$out" 2>&1 |
    tee "$logs/bench" || status=1
  say "groups together"
  timeout 200 python3 -B tests/gpu/bench/together.py "--lib=$build/libckv_decode_loop.so" \
    "--out=$out/together.json" 2>&1 | tee "$logs/together" || status=1
  if [ "$(nvidia-smi -L | wc -l)" -gt 1 ]; then
    say "decode loop"
    timeout 300 python3 -B tests/gpu/bench/decode_loop.py "--lib=$build/libckv_decode_loop.so" \
      "--out=$out/decode_loop.json" 2>&1 | tee "$logs/decode_loop" || status=1
  fi
fi
python3 - "$out" <<'END'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
names = ("gpu", "together", "links", "faults", "ingest", "torch_engine", "resident_links",
         "resident_faults")
reports = [out / f"{name}.json" for name in names]
reports = [json.loads(path.read_text()) for path in reports if path.exists()]
if reports:
    rows = [row for report in reports for row in report["rows"]]
    (out / "gpu.json").write_text(json.dumps(reports[0] | {"rows": rows}, indent=1) + "\n")
END
find "$logs" -maxdepth 1 -type f -print0 | sort -z | xargs -0 tail -n +1 > "$out/logs.txt"
say "done, status $status"
exit $status
