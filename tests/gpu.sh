#!/usr/bin/env bash
# Every test that needs a GPU, and a short benchmark; under 8 minutes from a bare machine with torch and transformers.
# usage: bash tests/gpu.sh      with the packages of launch/pins.txt importable
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "tests/gpu.sh: torch sees no GPU here." >&2
  exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m pytest -m gpu tests
exec "$python" benchmarks/step.py --gpu
