"""A lock that a killed build left behind is removed; one that somebody holds is waited for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from harness.launch import locks

SLEEP = "import time; print('up', flush=True); time.sleep(60)"
HOLD_TORCH_LOCK = f"import os, sys; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); {SLEEP}"
HOLD_OUR_LOCK = """
import subprocess, sys, time
from pathlib import Path
from harness.launch import locks
with locks.exclusive(Path(sys.argv[1]), notice=lambda: None) as held:
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], pass_fds=(held,))
    print(child.pid, flush=True)
    time.sleep(60)
"""


def _start(code: str, *words: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _is_free(path: Path) -> bool:
    told = []

    class Busy(Exception):
        pass

    def notice() -> None:
        told.append(True)
        raise Busy

    try:
        with locks.exclusive(path, notice=notice):
            pass
    except Busy:
        pass
    return not told


def test_a_lock_without_an_owner_is_removed(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    holder, _ = _start(HOLD_TORCH_LOCK, str(lock))
    _end(holder)
    assert lock.exists()
    assert locks.clear(lock, notice=lambda pids: None, unowned_s=0.3)
    assert not lock.exists()


def test_a_lock_that_is_held_is_waited_for_and_its_owner_named(tmp_path):
    lock = tmp_path / "lock"
    holder, _ = _start(HOLD_TORCH_LOCK, str(lock))
    seen: list[int] = []

    def notice(pids: list[int]) -> None:
        seen.extend(pids)
        lock.unlink()  # as the owner does when it is done

    try:
        assert not locks.clear(lock, notice=notice, unowned_s=0.3)
        assert seen == [holder.pid]
    finally:
        _end(holder)


def test_a_compiler_without_its_parent_still_owns_the_lock(tmp_path):
    lock = tmp_path / "lock"
    lock.touch()
    compiler = subprocess.Popen([sys.executable, "-c", SLEEP], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert compiler.stdout is not None and compiler.stdout.readline()
        assert locks.owners(lock) == [compiler.pid]
    finally:
        _end(compiler)
    assert locks.owners(lock) == []


def test_no_lock_is_no_wait(tmp_path):
    began = time.monotonic()
    assert not locks.clear(tmp_path / "lock", notice=lambda pids: None)
    assert time.monotonic() - began < 0.2


def test_our_lock_lives_as_long_as_the_child_that_inherited_it(tmp_path):
    path = tmp_path / ".building"
    holder, child = _start(HOLD_OUR_LOCK, str(path))
    assert not _is_free(path)
    _end(holder)
    assert not _is_free(path), "the compiler goes on, so must the lock"
    os.kill(int(child), 9)
    for _ in range(50):
        if _is_free(path):
            return
        time.sleep(0.1)
    raise AssertionError("the lock outlived its holders")
