"""Marks reach the starter from another process, time adds up, and no child marks in a rank's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from harness.heartbeat import Board

RANK = """
import json, os, subprocess, sys, time
from harness import heartbeat
heartbeat.mark("build")
time.sleep(0.2)
heartbeat.mark("forward", 7)
child = subprocess.run([sys.executable, "-c", "from harness import heartbeat; heartbeat.mark('save', 99)"], close_fds=False)
heartbeat.mark("backward")
heartbeat.mark("forward", 8)
heartbeat.mark("backward")
print(json.dumps({"spent": heartbeat.spent(), "began": heartbeat.began(), "now": time.time(), "left": "HARNESS_HEARTBEAT" in os.environ}))
"""


def test_a_rank_marks_and_its_starter_reads():
    made = time.monotonic()
    board = Board(2)
    assert board.beat(1).count == 0 and made <= board.beat(1).at_s <= time.monotonic(), "a rank that has not marked yet is not silent since the host began"
    started, before = time.time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", RANK], env=os.environ | board.variable(1), pass_fds=(board.descriptor,), capture_output=True, text=True, check=True)
    beat, told = board.beat(1), json.loads(done.stdout)
    assert (beat.step, beat.phase, beat.count, beat.first) == (8, "backward", 5, 7) and before < beat.at_s < time.monotonic()
    assert board.beat(0).count == 0 and not told["left"]
    assert abs(told["began"] - started) < 0.5 and told["spent"]["build"] >= 0.2
    assert abs(sum(told["spent"].values()) - (told["now"] - told["began"])) < 0.05, "the phases add up to the life of the process"
    board.close()


def test_a_number_that_names_another_file_is_not_written_to(tmp_path):
    victim = tmp_path / "file"
    victim.write_bytes(b"x" * 256)
    with open(victim, "r+b") as stream:
        code = "from harness import heartbeat; heartbeat.mark('forward', 3)"
        subprocess.run([sys.executable, "-c", code], env=os.environ | {"HARNESS_HEARTBEAT": f"{stream.fileno()}:0"}, pass_fds=(stream.fileno(),), check=True)
    assert victim.read_bytes() == b"x" * 256
