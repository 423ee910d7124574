#!/usr/bin/env bash
# From a fresh clone to a fine-tuned GPT-2 that answers: installs, then runs the main job on what this machine has.
# usage: bash launch/quickstart.sh [--dir FOLDER] [--engine zero|pipeline]
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$repository/launch/environment.sh"
harness_environment "$repository" "$repository/launch/pins.txt"
cd "$repository"
exec python -m harness.cli.quickstart "$@"
