#!/usr/bin/env bash
# Installs what the tests need, compiles DeepSpeed's operators once, then runs the tests.
# usage: bash tests/run.sh [--all] [pytest arguments]      --all adds the long matrices
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
selection="not slow and not gpu"
if [ "${1:-}" = --all ]; then
  shift
  selection="not gpu"
fi
harness_environment "$repository" "$repository/launch/pins.txt" "$repository/launch/pins-test.txt"
cd "$repository"
operators=(ShareMemCommBuilder CPUAdamBuilder)
if harness_libaio; then operators+=(AsyncIOBuilder); fi
harness_mpi || true # its tests say that they were skipped
if [ "$selection" = "not gpu" ]; then harness_mpich || true; fi
harness_cluster || true # these too
if [ "$selection" = "not gpu" ]; then harness_slurm || true; fi # and these, which are long
if [ "$selection" = "not gpu" ]; then harness_browser || true; fi
python -c 'import sys; from harness.launch import operators; operators.build(sys.argv[1:], speak=True)' "${operators[@]}"
exec python -m pytest -m "$selection" "$@"
