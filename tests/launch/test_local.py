"""`harness launch --on local`: the words of the command, the port, what happens to signals, and which code comes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from harness.errors import EXIT_FAILURE, EXIT_RESUME_ME, Refused
from harness.launch import local
from tests.launch import fake_ranks


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A plan whose ranks are fakes in `tmp_path`."""
    launcher = fake_ranks.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda *words: local.LaunchPlan((sys.executable, str(launcher), *words), 2, tmp_path)


def _when(condition, then) -> threading.Thread:
    def watch() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def _up(folder: Path) -> bool:
    return all((folder / f"up-{rank}").is_file() and (folder / f"up-{rank}").stat().st_size for rank in range(2))


def _all_gone(folder: Path) -> bool:
    """Whether no rank runs; one that lost its parent may stay a zombie until the machine's first process looks at it."""
    pids = [json.loads(path.read_text())["pid"] for path in folder.glob("up-*")]
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


def test_the_command_on_a_machine_without_gpus():
    words = local.render(ranks=2, port=20123, run_file="run.yaml", overrides=["train.steps=3", "run_dir=a b"])
    flags = "--num_gpus 2 --master_port 20123 --no_local_rank --log_level error --module harness train run.yaml train.steps=3".split()
    assert words[1:] == (*flags, "run_dir=a b")
    assert Path(words[0]).name == "deepspeed"


def test_the_command_keeps_to_the_gpus_that_are_visible():
    words = local.render(ranks=2, port=20123, run_file="run.yaml", overrides=[], gpu_ids=(2, 3, 5))
    assert words[1:3] == ("--include", "localhost:2,3")
    assert "--num_gpus" not in words


def test_without_the_script_the_module_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert local.render(ranks=1, port=1, run_file="r", overrides=[])[:3] == (
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
    )


def test_gpus_named_by_uuid_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8f3b")
    with pytest.raises(Refused, match="GPU-8f3b"):
        local._visible_gpus()


def test_ports_are_free_differ_and_lie_below_the_ephemeral_range():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [local.free_port() for _ in range(20)]
    assert len(set(ports)) > 15
    assert all(local.FIRST_PORT <= port < first for port in ports)
    with socket.socket() as probe:
        probe.bind(("", ports[0]))


def test_a_taken_port_is_passed_over(monkeypatch):
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("", 0))
        taken.listen()
        free.bind(("", 0))
        wanted = free.getsockname()[1]
        free.close()
        choices = [taken.getsockname()[1], wanted]
        monkeypatch.setattr(local.random.SystemRandom, "sample", lambda self, population, k: choices)
        assert local.free_port() == wanted


@pytest.mark.parametrize(("manner", "code"), [("done", 0), ("refuse", 2), ("crash", 9)])
def test_the_code_is_that_of_the_outcome_else_of_the_launcher(start, tmp_path, manner, code):
    assert local.run(start(str(tmp_path), manner)) == code


def test_an_outcome_of_an_earlier_attempt_is_not_believed(start, tmp_path):
    old = {"state": "done", "code": 0, "reason": "", "step": 1, "attempt": 1, "time": time.time() - 60, "version": 1}
    (tmp_path / "outcome.json").write_text(json.dumps(old))
    assert local.run(start(str(tmp_path), "crash")) == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_all_ranks_at_once_and_their_save_is_waited_for(start, tmp_path, number):
    before = signal.signal(number, signal.SIG_DFL)  # nohup and a shell's background ignore some, which is then respected
    try:
        thread = _when(lambda: _up(tmp_path), lambda: os.kill(os.getpid(), number))
        assert local.run(start(str(tmp_path), "work")) == EXIT_RESUME_ME
        thread.join()
    finally:
        signal.signal(number, before)
    times = [float((tmp_path / f"asked-{rank}").read_text()) for rank in range(2)]
    assert abs(times[0] - times[1]) < 0.3
    assert _all_gone(tmp_path)


def test_a_signal_before_there_are_ranks_ends_the_launch(start, tmp_path):
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    assert local.run(start("--late", str(tmp_path), "work")) == EXIT_RESUME_ME
    assert not list(tmp_path.glob("up-*"))


def test_ranks_that_lost_their_launcher_are_asked_to_save(start, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LINGER_S", 0.3)

    def kill_the_launcher() -> None:
        pid = json.loads((tmp_path / "up-0").read_text())["pid"]
        psutil.Process(pid).parent().kill()

    thread = _when(lambda: _up(tmp_path), kill_the_launcher)
    assert local.run(start(str(tmp_path), "work")) == EXIT_RESUME_ME
    thread.join()
    assert _all_gone(tmp_path)


def test_a_launcher_that_answers_0_without_an_outcome_has_failed(start, tmp_path):
    plan = replace(start(str(tmp_path), "done"), command=(sys.executable, "-c", "pass"))
    assert local.run(plan) == EXIT_FAILURE


def test_handlers_are_given_back(start, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    local.run(start(str(tmp_path), "done"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_launching_loads_neither_torch_nor_deepspeed():
    code = "import sys, harness.launch.local; sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.launcher
def test_deepspeeds_own_launcher_takes_the_command(tmp_path, monkeypatch):
    fake_ranks.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = local.render(ranks=2, port=local.free_port(), run_file=str(tmp_path), overrides=["work"])
    plan = local.LaunchPlan(command, 2, tmp_path, local.environment(ranks=2) | {"DS_ACCELERATOR": "cpu"})
    thread = _when(lambda: _up(tmp_path), lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert local.run(plan) == EXIT_RESUME_ME
    thread.join()
    ups = [json.loads((tmp_path / f"up-{rank}").read_text()) for rank in range(2)]
    assert [up["port"] for up in ups] == [command[command.index("--master_port") + 1]] * 2
    assert [up["world"] for up in ups] == ["2", "2"]
    assert (tmp_path / "asked-0").is_file() and (tmp_path / "asked-1").is_file()
    assert _all_gone(tmp_path)
