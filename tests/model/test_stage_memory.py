"""A stage is loaded without ever holding more than its own weights and one tensor."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.testing.models import tiny_config

SLACK_BYTES = 12 << 20
"""Allocator, modules of the skeleton, and the interpreter's own growth while it loads."""

PROGRAM = """
import sys, threading, time, torch
from harness.model.partition import stage_bounds, skeleton
from harness.model.stage import build_stage
from transformers import AutoConfig, AutoModelForCausalLM

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

folder, number = sys.argv[1], int(sys.argv[2])
config = AutoConfig.from_pretrained(folder)
bounds = stage_bounds(config, stages=4, method="parameters", sequence_length=64)
skeleton(config)  # what is imported on the way is not the stage's
before, peak, done = resident(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
stage = build_stage(config, bounds, number, weights=folder, precision="fp32", seed=0)
done = True
thread.join()
share = sum(p.numel() * p.element_size() for p in stage.parameters())
print(max(peak, resident()) - before, share, max(p.numel() * p.element_size() for p in stage.parameters()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of about 300 MB in several files."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("large")
    model = AutoModelForCausalLM.from_config(tiny_config("llama", layers=24, width=512, vocabulary=16384, tied=False))
    assert 2.5e8 < sum(p.numel() * 4 for p in model.parameters()) < 3.5e8
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [0, 1, 3])
def test_peak_memory_is_the_stages_share(folder, number):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), str(number)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    grown, share, largest = map(int, done.stdout.split()[-3:])
    assert 0.5 * share < grown <= share + largest + SLACK_BYTES, (grown, share, largest)
    assert share < 0.45 * sum(f.stat().st_size for f in folder.glob("*.safetensors"))
