"""The lower floors are light: they load neither torch nor deepspeed, and `harness --help` answers at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest

LIGHT = [
    "harness.errors", "harness.files", "harness.units", "harness.world", "harness.log", "harness.config.load", "harness.config.rules",
    "harness.config.deepspeed", "harness.formats.index", "harness.formats.manifest", "harness.formats.metrics", "harness.formats.outcome",
    "harness.formats.ledger", "harness.launch.local", "harness.launch.operators", "harness.launch.node", "harness.launch.again", "harness.launch.slurm", "harness.launch.kubernetes",
    "harness.supervise.relaunch", "harness.supervise.slurm", "harness.supervise.kubernetes", "harness.review.goodput", "harness.review.summary", "harness.review.limits", "harness.review.page", "harness.cli.review", "harness.heartbeat", "harness.cli.main", "harness.cli.launch",
    "harness.data.order", "harness.data.rows", "harness.data.loader",
    "harness.preflight.machine", "harness.preflight.remote", "harness.preflight.ranks", "harness.cli.doctor",
]
HEAVY = "torch deepspeed transformers datasets pandas"


@pytest.mark.parametrize("module", LIGHT)
def test_light(module):
    code = f"import sys, {module}\nprint([name for name in {HEAVY.split()!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_help_answers_at_once():
    """A median of five; a bound wide enough for a busy machine, and ten times below what loading torch takes."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "harness", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    print(f"harness --help: {statistics.median(times):.2f} s")
    assert statistics.median(times) < 1.0
