#!/usr/bin/env bash
# Load on a server by stock ghz: warm, a ladder of steps, a spike, a soak; then gate.py judges.
#
#   run.sh [--server=HOST:PORT] [--out=DIR] [--loads=select_json,…] [--steps=N,N,…] [--seconds=N]
#          [--soak_seconds=N] [--sequences=N] [--tokens=N] [--p99_ms=N]
#          [--tls_ca=FILE [--tls_cert=FILE --tls_key=FILE]]
#
# Loads: select_json, select_binary, select_and_recall, put_kv. Steps are calls per second, sent
# when due whether or not earlier ones were answered (open loop), so that waiting shows. ghz and
# ckv are taken from PATH or from the environment's GHZ and CKV.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

server=127.0.0.1:7400
out=build/loadtest
loads=select_json,select_binary,select_and_recall,put_kv
steps=50,100,200,400,800,1600
seconds=5
soak_seconds=30
sequences=16
tokens=8192
p99_ms=20
tls_ca= tls_cert= tls_key=
for argument in "$@"; do
  case $argument in
    --server=* | --out=* | --loads=* | --steps=* | --seconds=* | --soak_seconds=* | \
      --sequences=* | --tokens=* | --p99_ms=* | --tls_ca=* | --tls_cert=* | --tls_key=*)
      name=${argument%%=*}
      printf -v "${name#--}" %s "${argument#*=}" ;;
    *) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//' >&2; exit 2 ;;
  esac
done
ghz=${GHZ:-ghz}
ckv=${CKV:-ckv}
for program in "$ghz" "$ckv" python3; do
  command -v "$program" >/dev/null || { echo "run.sh: no $program here" >&2; exit 1; }
done
ghz=$(realpath "$(command -v "$ghz")")
ckv=$(realpath "$(command -v "$ckv")")

ghz_tls=(--insecure)
ckv_tls=()
if [ -n "$tls_ca" ]; then
  tls_ca=$(realpath "$tls_ca")
  ghz_tls=(--cacert="$tls_ca")
  ckv_tls=(--tls_ca="$tls_ca")
fi
if [ -n "$tls_cert" ]; then
  tls_cert=$(realpath "$tls_cert") tls_key=$(realpath "$tls_key")
  ghz_tls+=(--cert="$tls_cert" --key="$tls_key")
  ckv_tls+=(--tls_cert="$tls_cert" --tls_key="$tls_key")
fi

mkdir -p "$out"
cd "$out"
rm -f ./*.run.json
PUT_TOKENS=256 PUT_KV_HEADS=2 PUT_HEAD_DIM=64

call() {  # load phase ghz's-arguments…: one run, its result in LOAD.PHASE.run.json
  local load=$1 phase=$2
  shift 2
  "$ghz" --config="$here/ghz/$load.json" "${ghz_tls[@]}" "$@" --name="$load $phase" -O json \
    -o "$load.$phase.run.json" "$server"
}

steady() {  # load phase rps seconds
  call "$1" "$2" --async --rps="$3" --total=$(($3 * $4)) --skipFirst=0
}

# PutKv wants sequences that are open: as many as there will be calls, released afterwards.
put_steady() {  # load phase rps seconds
  local total=$(($3 * $4))
  [ $total -le 2000 ] || total=2000  # of 128 KiB each
  python3 "$here/messages.py" put . "put-$$-$2" $PUT_TOKENS $PUT_KV_HEADS $PUT_HEAD_DIM \
    "${other_shards[@]}"
  "$ghz" "${ghz_tls[@]}" \
    --call=clusterkv.v1.CacheService/OpenSequence -D open.json -c 8 \
    --total=$total -O json -o open.json.result "$server"
  call "$1" "$2" --async --rps="$3" --total=$total
  "$ghz" "${ghz_tls[@]}" \
    --call=clusterkv.v1.CacheService/ReleaseSequence -D release.json -c 8 \
    --total=$total -O json -o release.json.result "$server"
}

ladder() {  # load
  local load=$1 run=steady step last=0
  [ "$load" = put_kv ] && run=put_steady
  $run "$load" warm 20 2
  for step in ${steps//,/ }; do
    $run "$load" "step-$step" "$step" "$seconds"
    python3 "$here/gate.py" --quiet --p99_ms="$p99_ms" --min_rps="$step" \
      "$load.step-$step.run.json" || break
    last=$step
  done
  if [ "$last" -eq 0 ]; then
    echo "$load: not even the first step is within $p99_ms ms at p99" >&2
    return
  fi
  $run "$load" spike $((last * 2)) 2
  $run "$load" soak $((last * 7 / 10 + 1)) "$soak_seconds"
}

# Sequences are opened on this server, whoever owns their names.
mapfile -t other_shards < <("$ckv" status --server="$server" "${ckv_tls[@]}" --json=- |
  python3 -c 'import json, sys
info = json.load(sys.stdin)
for shard in info["shards"]:
    if shard["name"] != info["shard"]: print(shard["name"])')
"$ckv" seed --server="$server" "${ckv_tls[@]}" \
  --prefix=load --sequences="$sequences" --tokens="$tokens" \
  --replace --print_query >query.json
python3 "$here/messages.py" select . "$sequences" <query.json
for load in ${loads//,/ }; do
  [ -e "$here/ghz/$load.json" ] || { echo "run.sh: no load named $load" >&2; exit 2; }
  if [ "$load" = select_and_recall ]; then
    # Attachments live for minutes after their last use: made when they are wanted.
    "$ckv" seed --server="$server" "${ckv_tls[@]}" \
      --prefix=load --sequences="$sequences" --tokens="$tokens" \
      --replace --print_recall="$sequences" >recall.json
  fi
  ladder "$load"
done
python3 "$here/gate.py" --p99_ms="$p99_ms" --svg=curves.svg ./*.run.json
