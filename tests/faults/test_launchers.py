"""Launchers and starters that are killed or asked themselves, ours and others': ranks notice, save, stop, and nothing is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from harness.launch.local import free_port
from tests.end_to_end.faults import Running, assert_same, events, launched, losses, said
from tests.faults import cases
from tests.faults.cases import Above, Case, rows
from tests.faults.test_runs import wait

BIN = Path(sys.executable).parent
NOTICE = "is gone; stopping"


def command(launcher: str, run_file: Path, run_dir: Path, *words: str) -> list[str]:
    """What starts two ranks under that launcher."""
    train = ["-m", "harness", "train", str(run_file), f"run_dir={run_dir}", *words]
    if launcher == "harness":
        return [sys.executable, "-m", "harness", "launch", *train[3:]]
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(free_port()), "--no_local_rank", "--module", "harness", *train[2:]]
    return [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port()), *train]


@contextmanager
def under(launcher: str, run_file: Path, run_dir: Path, *words: str) -> Iterator[Running]:
    """A run under any launcher; whatever is left of it in the end is killed."""
    told = run_dir.with_name(f"{run_dir.name}.told")
    with open(told, "ab") as stream:
        child = subprocess.Popen(command(launcher, run_file, run_dir, *words), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield Running(child, run_dir, told)
    finally:
        for one in _of(run_dir):
            with suppress(psutil.Error):
                one.kill()
        child.kill()
        child.wait()


def _of(run_dir: Path) -> list[psutil.Process]:
    """Every process that was told of a run's folder."""
    return [one for one in psutil.process_iter(["cmdline"]) if any(str(run_dir) in word for word in one.info["cmdline"] or [])]


def _victims(case: Above, it: Running) -> list[psutil.Process]:
    """What is struck: the launcher is what was started, the starter is the parent of the ranks."""
    ranks = it.ranks()
    there = {"launcher": psutil.Process(it.child.pid), "starter": ranks[1].parent(), "rank 1": ranks[1]}
    return [there[name] for name in case.victims]


@rows(*cases.ABOVE)
def test_what_is_above_the_ranks_is_struck(case: Above, course, fault, measured, tmp_path):
    run_dir, place = tmp_path / "run", fault(1, "backward", 7)
    with under(case.launcher, course.run_file, run_dir, "launch.restarts=0") as it:
        it.until((place / "struck").exists)
        victims, struck = _victims(case, it), time.time()
        for victim in victims:
            victim.send_signal(case.number)
        if case.victims == ("starter",) and case.launcher == "harness":  # the kernel tells its ranks
            time.sleep(0.3)
        elif "rank 1" not in case.victims:
            measured["noticed"] = wait(lambda: NOTICE in it.output + said(run_dir), NOTICE, timeout_s=cases.DEAD_S) - struck
        (place / "go").touch()
        wait(lambda: not [one for one in _of(run_dir) if one.pid != it.child.pid], "the end of all ranks", timeout_s=30)
        measured["ended"] = time.time() - struck
        code = it.child.wait(timeout=30)
    if case.code:
        assert re.fullmatch(case.code, str(code % 256)), it.output
    found = it.outcome()
    assert found.code == 75 and re.fullmatch(case.state, found.state), found
    assert found.state == "lost" or max(losses(run_dir)) >= 7 and events(run_dir, "save")[-1]["step"] >= 7
    launched(course.run_file, run_dir)
    assert_same(run_dir, course.run_dir)


@rows(cases.TWICE_DEEPSPEED)
def test_one_of_two_of_deepspeeds_launchers(case: Case, course, fault, measured, monkeypatch, tmp_path):
    one, other, place = tmp_path / "one", tmp_path / "other", fault(1, "backward", 7)
    with ExitStack() as both:
        struck_one = both.enter_context(under("deepspeed", course.run_file, one))
        struck_one.until((place / "struck").exists)
        monkeypatch.delenv("FAULT")  # only the first stands still
        spared = both.enter_context(under("deepspeed", course.run_file, other))
        wait(lambda: len(losses(other)) >= 1, "the other's first step")
        struck = time.time()
        os.kill(struck_one.ranks()[1].ppid(), signal.SIGTERM)
        time.sleep(0.3)
        (place / "go").touch()
        wait(lambda: not _of(one), "the end of the one", timeout_s=60)
        measured["ended"] = time.time() - struck
        assert spared.child.wait(timeout=120) == 0, spared.output
    assert struck_one.outcome().code == 75
    assert_same(other, course.run_dir)
    launched(course.run_file, one)
    assert_same(one, course.run_dir)
