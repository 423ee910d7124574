# shellcheck shell=bash
# Makes .venv in the repository and installs the tested versions into it; sourced by launch/quickstart.sh and tests/run.sh.
# usage: harness_environment REPOSITORY [PINS_FILE ...]      leaves the environment activated

harness_find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return 0
    fi
  done
  echo "harness: Python 3.11 or 3.12 is needed and was not found; install one, or set PYTHON to its path." >&2
  return 2
}

harness_headers() { # libaio's headers, with which DeepSpeed's NVMe operator is compiled
  if [ "$(uname -s)" = Linux ] && [ ! -e /usr/include/libaio.h ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
      echo "Installing libaio-dev (headers for NVMe offload) ..."
      (apt-get install -y -q libaio-dev || (apt-get update -q && apt-get install -y -q libaio-dev)) >/dev/null 2>&1 ||
        echo "libaio-dev could not be installed: NVMe offload will not be available."
    else
      echo "libaio's headers are missing: NVMe offload will not be available (Debian: apt-get install libaio-dev)."
    fi
  fi
}

harness_install_torch() { # a CPU build where pip's configuration offers one and there is no GPU
  local python=$1 pin
  pin=$(grep '^torch==' "$2")
  if ! "$python" -c 'import torch' 2>/dev/null; then
    if ! ls /dev/nvidia[0-9]* >/dev/null 2>&1 && "$python" -m pip install --dry-run -q --no-deps --report - "$pin+cpu" >/dev/null 2>&1; then
      echo "Installing torch (CPU build, about 200 MB) ..."
      pin="$pin+cpu"
    else
      echo "Installing torch with its CUDA libraries: about 3 GB to download."
    fi
    "$python" -m pip install -q "$pin" numpy
  fi
}

harness_environment() {
  local repository=$1 python stamp wanted
  shift
  local venv="$repository/.venv"
  if [ ! -x "$venv/bin/python" ]; then
    python=$(harness_find_python) || return $?
    echo "Making a virtual environment in $venv ..."
    "$python" -m venv "$venv"
  fi
  # shellcheck source=/dev/null
  source "$venv/bin/activate"
  stamp="$venv/.harness-installed"
  wanted=$(cat "$repository/setup.py" "$@" | cksum)
  if ! grep -qsxF "$wanted" "$stamp"; then
    harness_headers
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    python -m pip install -q "$(grep '^setuptools==' "$1")" "$(grep '^wheel==' "$1")" "$(grep '^ninja==' "$1")" 2>/dev/null
    harness_install_torch python "$1"
    echo "Installing the other packages (DeepSpeed is built from source, a minute or two) ..."
    local arguments=()
    local file
    for file in "$@"; do arguments+=(-r "$file"); done
    DS_BUILD_OPS=0 python -m pip install -q --no-build-isolation "${arguments[@]}" || return 1
    python -m pip install -q --no-build-isolation --no-deps -e "$repository" || return 1
    echo "$wanted" >>"$stamp"
  fi
}
