"""Operators are built once, by one process, whatever a killed build left; the builder is a fake that writes what torch writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from harness import cgroup
from harness.errors import Failure
from harness.launch import locks, operators

COUNTING_BUILD = """
import os, sys, time
from pathlib import Path
folder = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam"
folder.mkdir(exist_ok=True)
descriptor = os.open(folder / "lock", os.O_CREAT | os.O_EXCL)
with open(folder / "builds", "a") as stream:
    stream.write("built\\n")
time.sleep(1)
(folder / "cpu_adam.so").touch()
os.remove(folder / "lock")
"""
BUILD_WITH = """
from harness.launch import operators
operators._BUILD = {!r}
operators.build(['CPUAdamBuilder'], speak=True)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(operators, "_BUILD", COUNTING_BUILD)
    monkeypatch.setattr(locks, "UNOWNED_S", 0.3)
    return tmp_path


def _builds(place) -> int:
    return (place / "cpu_adam" / "builds").read_text().count("built")


def test_what_is_built_is_not_built_again(place, capfd):
    operators.build(["CPUAdamBuilder"], speak=False)
    operators.build(["CPUAdamBuilder"], speak=False)
    assert _builds(place) == 1
    assert capfd.readouterr().out == ""


def test_a_stale_lock_is_removed_and_what_lies_beside_it_built_again(place):
    operators.build(["CPUAdamBuilder"], speak=False)
    (place / "cpu_adam" / "lock").touch()
    operators.build(["CPUAdamBuilder"], speak=False)
    assert _builds(place) == 2
    assert not (place / "cpu_adam" / "lock").exists()


@pytest.mark.slow
def test_two_builders_wait_for_each_other(place):
    code = BUILD_WITH.format("import time; time.sleep(5)\n" + COUNTING_BUILD)
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)]
    while not (place / ".building").exists():
        time.sleep(0.05)
    both.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
    words = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert _builds(place) == 1
    assert sum("waiting for it" in word for word in words) == 1


def test_a_killed_build_does_not_stop_the_next(place):
    code = BUILD_WITH.format("import time; time.sleep(60)")
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in a shell's background
    slow = subprocess.Popen([sys.executable, "-c", listening + code], env=os.environ)
    while not (place / ".building").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    slow.send_signal(2)
    slow.wait(timeout=30)
    operators.build(["CPUAdamBuilder"], speak=False)
    assert _builds(place) == 1


def test_a_failure_shows_the_last_words_and_what_is_missing(place, monkeypatch):
    monkeypatch.setattr(operators, "_BUILD", "import sys; print('fatal error: libaio.h: No such file'); sys.exit(1)")
    with pytest.raises(Failure, match="(?s)async_io could not be built.*libaio.h: No such file.*libaio-dev"):
        operators.build(["AsyncIOBuilder"], speak=False)


def test_progress_counts_the_files_of_ninja(place):
    folder = place / "cpu_adam"
    folder.mkdir()
    rules = [
        "build cpu_adam.o: compile a.cpp",
        "build cpu_adam_impl.o: compile b.cpp",
        "build cpu_adam.so: link cpu_adam.o",
    ]
    (folder / "build.ninja").write_text("\n".join(rules))
    (folder / "cpu_adam.o").touch()
    assert operators._progress("CPUAdamBuilder") == "cpu_adam (1 of 2 files)"


@pytest.mark.parametrize(
    ("offload", "nvme", "gpu", "names"),
    [
        ("none", False, False, ["ShareMemCommBuilder"]),
        ("cpu", False, False, ["ShareMemCommBuilder", "CPUAdamBuilder"]),
        ("nvme", True, False, ["ShareMemCommBuilder", "CPUAdamBuilder", "AsyncIOBuilder"]),
        ("none", False, True, ["FusedAdamBuilder"]),
        ("cpu", False, True, ["CPUAdamBuilder"]),
    ],
)
def test_a_run_needs_only_what_it_loads(offload, nvme, gpu, names):
    assert operators.needed(optimizer_offload=offload, nvme=nvme, gpu=gpu) == names


def test_the_environment_of_a_rank(monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(operators, "_present_gpus", lambda: 0)
    monkeypatch.setattr(cgroup, "cores", lambda: 8)
    values = operators.environment(ranks=2)
    assert values["PATH"] == f"{sys.prefix}/bin:/usr/bin"
    assert values["OMP_NUM_THREADS"] == "4"
    assert values["DS_ACCELERATOR"] == "cpu"
    assert values["TORCH_EXTENSIONS_DIR"].startswith(sys.prefix) and "deepspeed-0.19" in values["TORCH_EXTENSIONS_DIR"]


def test_targets_are_named_as_deepspeed_reads_them(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a;10.0f+PTX")
    assert operators.environment()["TORCH_CUDA_ARCH_LIST"] == "8.0 9.0;10.0+PTX"
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert "TORCH_CUDA_ARCH_LIST" not in operators.environment()


def test_a_toolkit_without_headers_finds_those_of_torch(tmp_path, monkeypatch):
    """Searched after what the user named, and after the toolkit's own."""
    (tmp_path / "nvidia" / "cu13" / "include").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")
    assert operators._headers()["CPLUS_INCLUDE_PATH"].split(":")[:2] == ["/mine", f"{tmp_path}/nvidia/cu13/include"]


def test_gpus_are_counted_as_far_as_they_are_visible(monkeypatch):
    monkeypatch.setattr(operators, "_present_gpus", lambda: 4)
    for visible, count in (("0,2", 2), ("", 0), ("-1", 0), ("0,1,2,3,4,5", 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert operators.num_gpus() == count
