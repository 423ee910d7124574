#!/usr/bin/env bash
# Every test that needs a GPU, and a short benchmark; under 8 minutes from a bare machine with torch and transformers.
# usage: bash tests/gpu.sh [WHEELS]      WHEELS: a folder of wheels to install first, where there is no network
# exit codes: 0 all passed, 1 something failed, 2 there is no GPU
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
python=${PYTHON:-python3}
limit_s=480

if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "tests/gpu.sh: $python has no torch; set PYTHON to one that has." >&2
  exit 2
fi
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "tests/gpu.sh: torch sees no GPU here, so nothing was tested or measured." >&2
  exit 2
fi

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${1:-}" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$1"/*.whl || exit 1
  export PYTHONPATH="$PYTHONPATH:$site"
fi

rows=()
status=0
measure() { # LABEL COMMAND ...: within what is left of the time
  local label=$1 began=$SECONDS left=$((limit_s - SECONDS)) code=0 verdict=passed
  shift
  if [ "$left" -lt 10 ]; then code=124; else timeout --kill-after=10 "$left" "$@" || code=$?; fi
  case $code in
    0) ;;
    5) verdict="no test found" ;;
    124 | 137) verdict="out of time" ;;
    *) verdict="failed ($code)" ;;
  esac
  [ "$code" = 0 ] || status=1
  rows+=("$(printf '%-12s %-16s %4d s' "$label" "$verdict" $((SECONDS - began)))")
}

measure tests "$python" -m pytest -m gpu tests/gpu
measure benchmark "$python" benchmarks/gpu.py

echo
"$python" -c 'import deepspeed, torch, transformers as t
print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {t.__version__}, deepspeed {deepspeed.__version__}")' 2>/dev/null | tail -n 1
printf '%s\n' "${rows[@]}"
exit "$status"
