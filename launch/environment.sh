# shellcheck shell=bash
# Makes .venv in the repository and installs the tested versions into it; sourced by launch/quickstart.sh and tests/run.sh.
# usage: harness_environment REPOSITORY PINS_FILE [PINS_FILE ...]      leaves the environment activated

harness_is_suitable() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1
}

harness_find_python() { # prints the path of a Python 3.11 or 3.12
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null 2>&1 && harness_is_suitable "$candidate"; then
      command -v "$candidate"
      return 0
    fi
    if [ "$candidate" = "${PYTHON:-}" ]; then
      echo "harness: PYTHON=$PYTHON is not a Python 3.11 or 3.12." >&2
      return 2
    fi
  done
  echo "harness: Python 3.11 or 3.12 is needed and was not found; install one, or set PYTHON to its path." >&2
  return 2
}

harness_apt() { # installs Debian packages where that can be done; says so
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then return 1; fi
  echo "Installing from the system's packages: $* ..."
  local install=(apt-get install -y -q --no-install-recommends "$@")
  (
    export DEBIAN_FRONTEND=noninteractive
    "${install[@]}" </dev/null || { apt-get update -q && "${install[@]}" </dev/null; }
  ) >/dev/null 2>&1
}

harness_compiler() { # what DeepSpeed's operators are compiled with: a C++ compiler and Python's headers
  local python=$1 version missing=()
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  command -v c++ >/dev/null 2>&1 || missing+=(g++)
  "$python" -c 'import os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || missing+=("python$version-dev")
  "$python" -c 'import ensurepip' 2>/dev/null || missing+=("python$version-venv")
  if [ ${#missing[@]} -gt 0 ] && ! harness_apt "${missing[@]}"; then
    echo "harness: this machine lacks what these packages of Debian hold: ${missing[*]}. Install them and start again." >&2
    return 2
  fi
}

harness_libaio() { # the headers that DeepSpeed's NVMe operator is compiled with; returns 1 where they cannot be had
  if echo '#include <libaio.h>' | c++ -E -x c++ - >/dev/null 2>&1 || harness_apt libaio-dev; then return 0; fi
  echo "libaio's headers are missing, so NVMe offload is not available (Debian: apt-get install libaio-dev)." >&2
  return 1
}

harness_mpi() { # mpirun, under which several machines prepare data together; returns 1 where it cannot be had
  if command -v mpirun >/dev/null 2>&1 || harness_apt openmpi-bin; then return 0; fi
  echo "mpirun is missing, so data cannot be prepared by the ranks of an MPI job (Debian: apt-get install openmpi-bin)." >&2
  return 1
}

harness_mpich() { # a second MPI, in a folder of its own, under which a launch is tested; returns 1 where it cannot be had
  local folder="$VIRTUAL_ENV/share/harness/mpich"
  if [ -x "$folder/bin/mpirun" ]; then return 0; fi
  if python -m pip install -q --prefix "$folder" --no-deps --ignore-installed mpich==5.0.2 2>/dev/null; then return 0; fi
  echo "MPICH could not be installed into $folder; its test says that it was skipped." >&2
  return 1
}

harness_quietly() { # PACKAGE ...: installs Debian packages of servers without starting them; returns 1 where they cannot be had
  local policy=/usr/sbin/policy-rc.d status=0
  if [ "$(id -u)" = 0 ] && [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" # Debian's switch: installing a server does not start it
  else
    policy=
  fi
  harness_apt "$@" || status=1
  if [ -n "$policy" ]; then rm -f "$policy"; fi
  return "$status"
}

harness_cluster() { # hosts on this machine, on which launches and checks of several hosts are tested; returns 1 where they cannot be had
  local program missing=()
  for program in sshd:openssh-server ssh:openssh-client ip:iproute2 pdsh:pdsh; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "${program%%:*}" >/dev/null 2>&1 || missing+=("${program#*:}")
  done
  if [ ${#missing[@]} = 0 ] || harness_quietly "${missing[@]}"; then return 0; fi
  echo "Several hosts cannot be tried on this machine, which takes root and ${missing[*]} (Debian: apt-get install ${missing[*]})." >&2
  return 1
}

harness_slurm() { # a Slurm on those hosts; returns 1 where it cannot be had
  if PATH="$PATH:/usr/sbin:/sbin" command -v slurmctld >/dev/null 2>&1 || harness_quietly slurm-wlm munge; then return 0; fi
  echo "Slurm is missing, so its jobs cannot be tried (Debian: apt-get install slurm-wlm munge)." >&2
  return 1
}

harness_browser() { # a browser, in which pages are looked at; returns 1 where it cannot be had
  if command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || harness_quietly chromium; then return 0; fi
  echo "Chromium is missing, so pages cannot be tried (Debian: apt-get install chromium)." >&2
  return 1
}

harness_step() { # LOG LABEL COMMAND ...: runs it quietly, tells the seconds as they pass, and the end of its log if it fails
  local log=$1 label=$2 status=0 ticker
  shift 2
  echo "$label ..."
  (
    seconds=0
    while sleep 1 && kill -0 $$ 2>/dev/null; do
      seconds=$((seconds + 1))
      if [ $((seconds % 15)) = 0 ]; then echo "  ... $seconds s"; fi
    done
  ) &
  ticker=$!
  "$@" >>"$log" 2>&1 </dev/null || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  if [ "$status" != 0 ]; then
    echo "harness: this failed; the end of $log:" >&2
    grep -v '^WARNING' "$log" | tail -n 25 >&2
    return 1
  fi
}

harness_has_gpu() {
  ls /dev/nvidia[0-9]* >/dev/null 2>&1 || nvidia-smi -L 2>/dev/null | grep -q '^GPU'
}

harness_install_torch() { # PINS LOG: a CPU build where pip's configuration offers one and there is no GPU
  local pin log=$2
  pin=$(grep '^torch==' "$1")
  if python -c 'import importlib.metadata, sys; sys.exit(importlib.metadata.version("torch").split("+")[0] != sys.argv[1])' "${pin#*==}" 2>/dev/null; then
    return 0
  fi
  if harness_has_gpu; then
    harness_step "$log" "Installing torch with its CUDA libraries (about 3 GB to download)" python -m pip install "$pin,!=${pin#*==}+cpu"
  elif python -m pip install -q --dry-run --no-deps --ignore-installed --only-binary :all: "$pin+cpu" >/dev/null 2>&1; then
    harness_step "$log" "Installing torch, CPU build (about 200 MB)" python -m pip install "$pin+cpu"
  else
    echo "There is no GPU here, but pip's configuration offers no CPU build of torch: taking the one that carries CUDA."
    harness_step "$log" "Installing torch with its CUDA libraries (about 3 GB to download)" python -m pip install "$pin"
  fi
}

harness_install() { # REPOSITORY PINS_FILE ...: into the active environment
  local repository=$1 log file build=() files=()
  shift
  log="$VIRTUAL_ENV/harness-install.log"
  : >"$log"
  for file in "$@"; do files+=(-r "$file"); done
  mapfile -t build < <(grep -hE '^(setuptools|wheel|ninja|numpy|packaging|poetry-core)==' "$@")
  harness_step "$log" "Installing build tools" python -m pip install "${build[@]}" || return 1
  harness_install_torch "$1" "$log" || return 1
  export DS_BUILD_OPS=0
  harness_step "$log" "Installing DeepSpeed (from source), transformers and the rest" python -m pip install --no-build-isolation "${files[@]}" || return 1
  harness_step "$log" "Installing the harness itself" python -m pip install --no-build-isolation --no-deps -e "$repository" || return 1
}

harness_environment() {
  local repository=$1 python venv="$1/.venv" stamp file wanted=()
  shift
  stamp="$venv/.harness-installed"
  for file in "$@"; do wanted+=("$repository $(cat "$repository/setup.py" "$file" | cksum) ${file##*/}"); done
  if [ -e "$stamp" ] && ! grep -qF "$repository " "$stamp"; then
    echo "The repository was moved since .venv was made."
    rm -f "$stamp" "$venv/bin/python" # its programs name the old place: made anew below
  fi
  if ! { [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    python=$(harness_find_python) || return $?
    harness_compiler "$python" || return $?
    echo "Making a virtual environment in $venv ($("$python" --version)) ..."
    "$python" -m venv --clear "$venv" || return 1
  fi
  # shellcheck source=/dev/null
  source "$venv/bin/activate"
  for file in "${wanted[@]}"; do
    if ! grep -qsxF "$file" "$stamp"; then
      harness_install "$repository" "$@" || return 1
      printf '%s\n' "${wanted[@]}" >"$stamp"
      break
    fi
  done
}
