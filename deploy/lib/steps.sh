# Steps with progress, and the packages they need. Sourced by tests/run.sh and deploy/quickstart.sh,
# which set LOG_DIR first.
#
# On a terminal a running step shows a spinner, its time and the last line of its output; elsewhere
# it is a plain line when it starts, a sign of life every minute, and a plain line when it ends. All
# output goes to a file in LOG_DIR, of which a failing step shows the tail.

if [ -t 1 ]; then STEPS_TTY=1; else STEPS_TTY=; fi
STEPS_COUNT=0
STEPS_TIMES=()  # "m:ss title" of every step that ended
STEPS_PID=

steps_stop() {  # ends what the running step started
  [ -n "$STEPS_PID" ] && kill "$STEPS_PID" 2>/dev/null
  STEPS_PID=
  return 0
}
trap 'steps_stop; exit 130' INT
trap 'steps_stop; exit 143' TERM

steps_time() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }

# The last line of a log that says something, cut to the terminal.
steps_last_line() {
  local columns width
  columns=$(stty size 2>/dev/null | cut -d' ' -f2)
  width=$((${columns:-80} - ${#2} - 16))
  [ "$width" -gt 0 ] || return 0
  tail -c 2000 "$1" 2>/dev/null | tr '\r' '\n' | tr -d '\033' | grep -v '^[[:space:]]*$' |
    tail -n 1 | cut -c "1-$width"
}

steps_wait() {  # pid title log: shows progress until the process ends, returns its status
  local pid=$1 title=$2 log=$3 begin=$SECONDS next_sign=60 spin='|/-\' i=0 elapsed
  while kill -0 "$pid" 2>/dev/null; do
    elapsed=$((SECONDS - begin))
    if [ -n "$STEPS_TTY" ]; then
      printf '\r\033[K %s %s %s  %s' "${spin:i++%4:1}" "$title" "$(steps_time $elapsed)" \
        "$(steps_last_line "$log" "$title")"
    elif [ $elapsed -ge $next_sign ]; then
      printf '    %s: %s so far\n' "$title" "$(steps_time $elapsed)"
      next_sign=$((next_sign + 60))
    fi
    sleep 0.2
  done
  [ -n "$STEPS_TTY" ] && printf '\r\033[K'
  wait "$pid"
}

# try_step TITLE COMMAND…: runs the command; returns its status after saying how it went.
try_step() {
  local title=$1 begin=$SECONDS status=0 log
  shift
  STEPS_COUNT=$((STEPS_COUNT + 1))
  mkdir -p "$LOG_DIR"
  log=$(printf '%02d-%s' $STEPS_COUNT "$title" | tr -cs 'A-Za-z0-9\n' '-')
  log=$LOG_DIR/$log.log
  [ -n "$STEPS_TTY" ] || printf '==> %s\n' "$title"
  "$@" >"$log" 2>&1 </dev/null &
  STEPS_PID=$!
  steps_wait "$STEPS_PID" "$title" "$log" || status=$?
  STEPS_PID=
  STEPS_LOG=$log
  STEPS_TIMES+=("$(printf '%6s  %s' "$(steps_time $((SECONDS - begin)))" "$title")")
  if [ $status -eq 0 ]; then
    printf '%s %s (%s)\n' "$([ -n "$STEPS_TTY" ] && printf ' \342\234\223' || printf '    done:')" \
      "$title" "$(steps_time $((SECONDS - begin)))"
    return 0
  fi
  printf '\nFAILED: %s (exit %d). The end of %s:\n' "$title" $status "$log" >&2
  tail -n "${STEPS_TAIL:-40}" "$log" | sed 's/^/    /' >&2
  return $status
}

steps_table() {  # what each step so far took
  printf '%s\n' "${STEPS_TIMES[@]}"
}

# step TITLE COMMAND…: as try_step, and ends the script where the command fails.
step() { try_step "$@" || exit $?; }

BUILD_PACKAGES="g++ cmake ninja-build pkg-config ccache libgrpc++-dev libprotobuf-dev
  protobuf-compiler protobuf-compiler-grpc libabsl-dev libhwy-dev libxxhash-dev prometheus-cpp-dev
  nlohmann-json3-dev"
TEST_PACKAGES="libgtest-dev libgmock-dev libbenchmark-dev libopenblas-dev python3 clang-format-14
  etcd-server"
CHECK_PACKAGES="clang clang-tidy python3-venv"

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

as_root() {
  if [ "$(id -u)" -eq 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_get() {
  # Nothing asks, and another package manager at work is waited for.
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@"
}

install_now() {
  apt_get update || return
  local packages="$*" clang_major
  if [[ " $packages " == *" clang-runtime "* ]]; then
    # The sanitizers' and fuzzer's runtime of whatever version `clang` is here.
    clang_major=$(apt-cache depends clang | sed -n 's/.*Depends: clang-\([0-9]*\)$/\1/p')
    packages=${packages/clang-runtime/libclang-rt-$clang_major-dev}
  fi
  # shellcheck disable=SC2086
  apt_get install -y --no-install-recommends $packages || return
  # The tests start an etcd of their own each; the package starts one for the machine.
  case " $packages " in *" etcd-server "*) stop_etcd_service ;; esac
}

stop_etcd_service() {
  if [ -d /run/systemd/system ]; then
    as_root systemctl disable --now etcd.service
  elif [ -x /etc/init.d/etcd ]; then
    as_root /etc/init.d/etcd stop || true  # it may not have been started
  fi
}

has_clang_runtime() {
  local clang=
  command -v clang >/dev/null && clang=$(clang -print-resource-dir 2>/dev/null)
  [ -n "$clang" ] && find "$clang/lib" -name 'libclang_rt.fuzzer*' 2>/dev/null | grep -q .
}

# install_packages PACKAGE…: installs what is missing; `clang-runtime` is the runtime that fits
# `clang`.
install_packages() {
  local missing=() package
  for package in "$@"; do
    if [ "$package" = clang-runtime ]; then
      has_clang_runtime || missing+=("$package")
    else
      is_installed "$package" || missing+=("$package")
    fi
  done
  [ ${#missing[@]} -eq 0 ] && return 0
  if ! command -v apt-get >/dev/null; then
    echo "No apt-get here. Install what these Debian packages hold: ${missing[*]}" >&2
    exit 1
  fi
  if [ "$(id -u)" -ne 0 ] && ! sudo -n true 2>/dev/null; then
    if [ -n "$STEPS_TTY" ] && command -v sudo >/dev/null; then
      sudo -v || exit 1  # asks once, here, not behind a spinner
    else
      echo "Needs root to install: ${missing[*]}" >&2
      exit 1
    fi
  fi
  step "Install ${#missing[@]} packages" install_now "${missing[@]}"
}
