"""`harness launch --on hosts` on hosts of their own network: it trains on all, and whatever befalls one ends the job with its name."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml

from harness.formats.outcome import read_outcome
from tests.cluster.hosts import Cluster
from tests.end_to_end.faults import events, losses

HARNESS = ("python", "-m", "harness")
TRAIN = ("checkpoint.every_steps=5", "evaluation.every_steps=null", "engine.deepspeed=zero3_offload_cpu")


def launch(cluster: Cluster, path: Path, *words: object, host: int = 0, on: str = "hosts", hostfile: Path | None = None, env: dict[str, str] | None = None):
    """`harness launch` from one of the hosts, under way."""
    with open(path.parent / "told", "ab") as stream:
        return cluster.start(
            host, *HARNESS, "launch", path, "--on", on, f"launch.hosts.file={hostfile or cluster.hostfile}", "launch.ranks=null", *TRAIN, *words,
            stdout=stream, stderr=stream, start_new_session=True, env=env,
        )


def until(started, there: Callable[[], object], path: Path, *, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert started.poll() is None and time.monotonic() < deadline, told(path)
        time.sleep(0.05)


def told(path: Path) -> str:
    return (path.parent / "told").read_text(errors="replace")


def left(cluster: Cluster) -> list[str]:
    """Processes of the run on any host."""
    found = []
    for process in (process for number in range(len(cluster.names)) for process in cluster.processes(number)):
        with suppress(psutil.Error):  # gone meanwhile
            found.append(" ".join(process.cmdline()))
    return [line[:90] for line in found if "harness" in line]


@pytest.mark.parametrize("through, words", [("deepspeed", ()), ("ssh", ("engine.deepspeed=zero1_offload_cpu", "engine.pipeline_stages=2"))])
def test_two_hosts_train(hosts, run_file, tmp_path, through, words):
    cluster = hosts(2)
    started = launch(cluster, run_file, f"launch.hosts.through={through}", "train.steps=6", *words)
    assert started.wait(timeout=180) == 0, told(run_file)
    assert len(losses(tmp_path / "run")) == 6 and read_outcome(tmp_path / "run").state == "done"
    assert events(tmp_path / "run", "start")[0]["ranks"] == 2
    assert not left(cluster)


@pytest.mark.slow
def test_a_host_that_is_down_or_differs_is_named_before_anything_starts(hosts, run_file, tmp_path):
    """One host without a cable, one with another version: refused with both names; with `at_least`, the run goes on without them."""
    cluster = hosts(3)
    original = next(Path(sys.prefix, "lib").glob("python3*/site-packages/safetensors-*.dist-info"))
    other = tmp_path / "other.dist-info"
    shutil.copytree(original, other)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    cluster.link(1, up=False)
    assert cluster.run(2, "mount", "--bind", other, original).returncode == 0
    try:
        started = time.monotonic()
        refused = launch(cluster, run_file, "train.steps=4")
        assert refused.wait(timeout=60) == 2 and time.monotonic() - started < 45
        assert "2 of 3 hosts cannot train this run" in told(run_file) and "h2: it has safetensors 0.0.1, this host" in told(run_file), told(run_file)
        assert "h1: ssh: connect to host h1 port 22" in told(run_file), told(run_file)
        assert not list(tmp_path.glob("run/attempts/*"))
        going_on = launch(cluster, run_file, "train.steps=4", "launch.hosts.at_least=1")
        assert going_on.wait(timeout=180) == 0, told(run_file)
        assert "Going on without 2 of 3 hosts" in told(run_file)
    finally:
        cluster.link(1, up=True)
        cluster.run(2, "umount", original)


@pytest.mark.slow
def test_a_killed_rank_ends_all_hosts_and_names_its_own(hosts, run_file, tmp_path):
    """Then the same command goes on, on one host less."""
    cluster = hosts(3)
    started = launch(cluster, run_file, "train.steps=4000", "train.global_batch_rows=6", "launch.restarts=0")
    until(started, lambda: 8 in losses(tmp_path / "run"), run_file)
    rank = next(process for process in cluster.processes(2) if "train" in process.cmdline())
    rank.kill()
    struck = time.monotonic()
    assert started.wait(timeout=60) == 75, told(run_file)
    assert time.monotonic() - struck < 20 and not left(cluster)
    assert read_outcome(tmp_path / "run").reason.startswith("Rank 2 on h2 was ended by SIGKILL"), read_outcome(tmp_path / "run")
    again = launch(cluster, run_file, "train.steps=12", "train.global_batch_rows=6", "launch.hosts.exclude=[h2]")
    assert again.wait(timeout=180) == 0, told(run_file)
    assert events(tmp_path / "run", "start")[-1]["ranks"] == 2 and events(tmp_path / "run", "resume")


@pytest.mark.slow
@pytest.mark.parametrize("through", ["deepspeed", "ssh"])
def test_a_cut_cable_ends_the_job_in_bounded_time_and_names_the_host(hosts, run_file, tmp_path, through):
    cluster = hosts(2)
    started = launch(cluster, run_file, "train.steps=4000", f"launch.hosts.through={through}", "launch.restarts=0")
    until(started, lambda: 8 in losses(tmp_path / "run"), run_file)
    cluster.link(1, up=False)
    struck = time.monotonic()
    try:
        assert started.wait(timeout=120) == 75, told(run_file)
        assert time.monotonic() - struck < 75
        assert "Host h1 (rank 1) is lost" in read_outcome(tmp_path / "run").reason, read_outcome(tmp_path / "run")
        while left(cluster) and time.monotonic() - struck < 100:
            time.sleep(0.5)
        assert not left(cluster), "the host behind the cut ends its ranks by itself"
    finally:
        cluster.link(1, up=True)


@pytest.mark.slow
def test_ctrl_c_on_one_of_two_runs_leaves_the_other_alone(hosts, run_file, tmp_path):
    cluster = hosts(2)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "run.yaml"
    other.write_text(yaml.safe_dump(yaml.safe_load(run_file.read_text()) | {"run_dir": str(tmp_path / "other" / "run")}))
    first, second = launch(cluster, run_file, "train.steps=4000"), launch(cluster, other, "train.steps=60", host=1)
    until(first, lambda: 8 in losses(tmp_path / "run"), run_file)
    until(second, lambda: 8 in losses(tmp_path / "other" / "run"), other)
    cluster.inner(first).send_signal(signal.SIGINT)
    assert first.wait(timeout=60) == 75, told(run_file)
    assert read_outcome(tmp_path / "run").state == "stopped"
    saved = events(tmp_path / "run", "save")[-1]["step"]
    assert saved >= 8
    assert second.wait(timeout=180) == 0, told(other)
    both = losses(tmp_path / "run"), losses(tmp_path / "other" / "run")
    assert len(both[1]) == 60 and all(both[1][step] == loss for step, loss in both[0].items() if step <= min(saved, 60))


@pytest.mark.slow
def test_a_name_that_resolves_to_loopback_is_no_hindrance(hosts, run_file, tmp_path):
    """Debian's `127.0.1.1 HOST` line on every host: the starters tell gloo which interface the others can reach."""
    cluster = hosts(2)
    kept = [cluster.read_hosts(number) for number in range(2)]
    for number, text in enumerate(kept):
        cluster.write_hosts(number, f"127.0.1.1 h{number}\n{text}")
    try:
        started = launch(cluster, run_file, "train.steps=4")
        assert started.wait(timeout=180) == 0, told(run_file)
    finally:
        for number, text in enumerate(kept):
            cluster.write_hosts(number, text)


@pytest.mark.slow
def test_mpirun_trains_on_two_hosts_and_a_request_saves(hosts, run_file, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun (Debian: apt-get install openmpi-bin)")
    cluster = hosts(2)
    started = launch(cluster, run_file, "train.steps=4000", on="mpi", host=1)  # where Open MPI starts rank 0; the hostfile names it last
    until(started, lambda: 8 in losses(tmp_path / "run"), run_file)
    assert events(tmp_path / "run", "start")[0]["ranks"] == 2
    cluster.inner(started).send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == 75, told(run_file)
    assert read_outcome(tmp_path / "run").state == "stopped" and events(tmp_path / "run", "save")[-1]["step"] >= 8


@pytest.mark.slow
def test_a_third_request_kills_the_ranks_of_mpirun_on_all_hosts(hosts, run_file, tmp_path):
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun (Debian: apt-get install openmpi-bin)")
    cluster = hosts(2)
    started = launch(cluster, run_file, "train.steps=4000", on="mpi")
    until(started, lambda: 2 in losses(tmp_path / "run"), run_file)
    for process in cluster.processes(1):
        if "train" in process.cmdline():
            process.suspend()  # it can neither save nor end, and the other one waits for it
    for _ in range(3):
        cluster.inner(started).send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert started.wait(timeout=20) == 75, told(run_file)
    until_s = time.monotonic() + 20
    while left(cluster) and time.monotonic() < until_s:
        time.sleep(0.2)
    assert not left(cluster)


@pytest.mark.slow
def test_mpich_trains_on_one_host(hosts, run_file, tmp_path):
    """The MPICH of the package registry, in a folder of its own beside the environment (tests/run.sh puts it there)."""
    folder = Path(sys.prefix) / "share" / "harness" / "mpich"
    if not (folder / "bin" / "mpirun").is_file():
        pytest.skip(f"there is no MPICH in {folder}")
    cluster, hostfile = hosts(2), tmp_path / "one-host"
    hostfile.write_text("h0 slots=2\n")
    env = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": str(folder / "lib"), "MPI4PY_MPIABI": "mpich"}
    started = launch(cluster, run_file, "train.steps=4000", on="mpi", hostfile=hostfile, env=env)
    until(started, lambda: 8 in losses(tmp_path / "run"), run_file)
    assert events(tmp_path / "run", "start")[0]["ranks"] == 2
    cluster.inner(started).send_signal(signal.SIGTERM)
    assert started.wait(timeout=60) == 75, told(run_file)
    assert read_outcome(tmp_path / "run").state == "stopped" and events(tmp_path / "run", "save")[-1]["step"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("on", ["hosts", "mpi"])
def test_a_machine_that_does_not_see_the_folder_of_the_run_answers_for_it(hosts, run_file, tmp_path, on):
    """Launched from a host that takes no part, with a disk on each: done is 0, and a run whose rank is killed is started again."""
    if on == "mpi" and shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun (Debian: apt-get install openmpi-bin)")
    cluster, hostfile = hosts(3), tmp_path / "two-hosts"
    hostfile.write_text("h1 slots=1\nh2 slots=1\n")
    (tmp_path / "run").mkdir()
    for number in range(3):
        cluster.own_folder(number, tmp_path / "run")
    try:
        started = launch(cluster, run_file, "train.steps=30", "launch.restarts=1", on=on, hostfile=hostfile)
        until(started, lambda: cluster.run(1, "test", "-d", tmp_path / "run" / "checkpoints" / "step-000010").returncode == 0, run_file)
        next(process for process in cluster.processes(2) if "train" in process.cmdline()).kill()
        assert started.wait(timeout=180) == 0, told(run_file)
        assert "Starting again in 1 s (1 of 1 without a new checkpoint)" in told(run_file), told(run_file)
        assert '"state": "done"' in cluster.run(1, "cat", tmp_path / "run" / "outcome.json").stdout
        assert not (tmp_path / "run" / "outcome.json").exists()
    finally:
        for number in range(3):
            cluster.run(number, "umount", tmp_path / "run")
