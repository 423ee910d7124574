"""A rank whose launcher is gone says so, whatever asked it to stop before, and ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.faults.test_runs import wait

RANK = """
import sys, time
from harness.resilience.guard import Guard
from harness.resilience.signals import StopFlag
stop = StopFlag()
stop.reason = sys.argv[1]
Guard(stop, leash_s=1.0).start()
print("watching", flush=True)
while stop.reason == sys.argv[1]:
    time.sleep(0.02)
print("reason:", stop.reason, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("asked", ["", "SIGTERM"])
def test_a_launcher_that_is_gone_is_named(asked, tmp_path):
    script, told, code = tmp_path / "rank.py", tmp_path / "told", tmp_path / "code"
    script.write_text(RANK)
    between = f"{sys.executable} {script} '{asked}' > {told} 2>&1; echo $? > {code}"
    launcher = subprocess.Popen(["torchrun", "-c", 'bash -c "$0" & wait', between], executable="/bin/bash", start_new_session=True)
    try:
        wait(lambda: told.exists() and "watching" in told.read_text(), "the rank")
        launcher.kill()
        launcher.wait()
        wait(lambda: code.exists() and code.read_text().strip(), "its end")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
    said = told.read_text()
    assert f"torchrun (process {launcher.pid}), which started this rank, is gone; stopping." in said
    assert code.read_text().strip() == "75"
    assert ("reason: torchrun" in said) == (not asked), said
