#!/usr/bin/env bash
# Installs what the tests need, then runs them.
# usage: bash tests/run.sh [--all] [pytest arguments]      --all adds the long matrices
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
harness_environment "$repository" "$repository/launch/pins.txt" "$repository/launch/pins-test.txt"
cd "$repository"
selection=(-m "not slow and not gpu")
if [ "${1:-}" = --all ]; then
  shift
  selection=(-m "not gpu")
fi
python -c 'from harness.launch import operators; operators.build(["ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder"], speak=True)'
exec python -m pytest "${selection[@]}" "$@"
