"""A run as a Slurm job, under a real Slurm with two nodes: whatever ends its starts, it goes back into the queue and ends with the losses of an undisturbed run."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from harness.formats import ledger
from harness.formats.outcome import last_step, read_outcome
from tests.cluster import slurm as slurms
from tests.cluster.slurm import Slurm
from tests.end_to_end.conftest import QUESTIONS, harness
from tests.end_to_end.faults import armed, assert_same, losses
from harness.testing.models import tiny_architecture

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def slurm(hosts, tmp_path_factory) -> Slurm:
    """Two nodes and a controller."""
    if reason := slurms.missing():
        pytest.skip(reason)
    return Slurm(hosts(3), tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory) -> Path:
    """A tiny GPT-2 in float32, prepared, for two ranks."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": question, "completion": answer}) + "\n" for question, answer in QUESTIONS))
    values = {
        "run_dir": "unset",
        "data": {
            "dir": str(folder / "data"), "train": {"path": str(folder / "pairs.jsonl")}, "validation_share": 0.2, "shape": "prompt_completion",
            "sequence_length": 64, "train_tokenizer": {"vocab_size": 320},
        },
        "model": {"architecture": tiny_architecture("gpt2", width=32, dropout=0.1)},
        "train": {"steps": STEPS, "global_batch_rows": 4, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": "constant"},
        "engine": {"deepspeed": "zero1", "device": "cpu", "timeout_minutes": 1},
        "evaluation": {"at_start": False},
        "launch": {"ranks": 2, "slurm": {"nodes": 2, "ranks_per_node": 1, "partition": "low", "time": "10"}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    prepared = harness("prepare", path)
    assert prepared.code == 0, prepared.output
    return path


@pytest.fixture(scope="module")
def reference(slurm, run_file, tmp_path_factory) -> Path:
    """The undisturbed run, as a Slurm job of its own; also its followed log is looked at."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    told = _launch(slurm, run_file, run_dir, "--follow")
    assert told.returncode == 0, told.stdout
    for words in ("Submitted job", "is RUNNING", "steps 0 to 60", "srun ended with 0, the run with 0", "The run is done after step 60, attempt 1"):
        assert words in told.stdout, told.stdout
    assert _starts(run_dir)[0]["ranks"] == 2
    assert sorted(path.name[-9:] for path in (run_dir / "launch").glob("*node*.log")) == ["node0.log", "node1.log"]
    return run_dir


def _launch(slurm: Slurm, run_file: Path, run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`harness launch --on slurm` on the login node, to its end."""
    command = ["python", "-m", "harness", "launch", run_file, "--on", "slurm", *words, f"run_dir={run_dir}"]
    return slurm.cluster.run(0, *command, env=slurm.env, timeout=300)


def _starts(run_dir: Path) -> list[dict]:
    return [event for event in ledger.read(run_dir) if event["kind"] == "start"]


def _log(run_dir: Path) -> str:
    return "".join(path.read_text() for path in run_dir.glob("launch/slurm-*[0-9].log") if "node" not in path.name)


def _struck(slurm: Slurm, run_file: Path, run_dir: Path, strike: Callable[[str], None], *words: str) -> tuple[int, str]:
    """A launch that something happens to while rank 1 stands in step 6, until Slurm has acted on it; its code, and what it told."""
    told, place = run_dir.with_name("told"), run_dir.with_name("held")
    place.mkdir()
    command = ["python", "-m", "harness", "launch", run_file, "--on", "slurm", *words, f"run_dir={run_dir}"]
    with slurm.start(*command, told=told, variables=armed(1, "backward", 6, place)) as launch:
        try:
            slurm.until(lambda: (place / "struck").exists() or launch.poll() is not None)
            assert launch.poll() is None, told.read_text()
            job = slurm.job()
            strike(job)
            slurm.until(lambda: "asked to stop" in _log(run_dir) or slurm("squeue", "-h", "-j", job, "-o", "%T").strip() != "RUNNING", timeout_s=90)
            (place / "go").touch()
            return launch.wait(240), told.read_text() + _log(run_dir)
        finally:
            launch.kill()
            slurm("scancel", "--full", "--signal=KILL", "--user=root")


@pytest.mark.parametrize("mpi", ["none", "pmi2"])
def test_srun_alone_starts_ranks(slurm, run_file, tmp_path, mpi):
    """Each task is a rank, without the script and without a node starter."""
    told = tmp_path / "told"
    words = ["srun", "-p", "low", "-N", "2", "-n", "2", f"--mpi={mpi}", "-t", "5", "python", "-m", "harness"]
    assert slurm.start(*words, "train", run_file, "train.steps=4", f"run_dir={tmp_path / 'run'}", told=told).wait(180) == 0, told.read_text()
    assert [event["ranks"] for event in _starts(tmp_path / "run")] == [2] and len(losses(tmp_path / "run")) == 4
    if mpi == "none":
        slurm.start(*words, "doctor", told=tmp_path / "doctor").wait(180)
        assert "2 ranks on 2 hosts" in (tmp_path / "doctor").read_text()


def test_preempted_by_a_higher_partition(slurm, run_file, reference, tmp_path):
    def strike(job: str) -> None:
        slurm("sbatch", "-p", "high", "--exclusive", "-N", "2", "-o", "/dev/null", "--wrap", "sleep 1")

    code, told = _struck(slurm, run_file, tmp_path / "run", strike)
    assert code == 0, told
    assert "back into the queue" in told and len(_starts(tmp_path / "run")) == 2, told
    assert_same(tmp_path / "run", reference)


def test_requeued_by_the_administrator(slurm, run_file, reference, tmp_path):
    code, told = _struck(slurm, run_file, tmp_path / "run", lambda job: slurm("scontrol", "requeue", job))
    assert code == 0, told
    assert len(_starts(tmp_path / "run")) == 2, told
    assert_same(tmp_path / "run", reference)


def test_the_time_limit(slurm, run_file, reference, tmp_path):
    """The limit is drawn in until the signal before it has come; the second start has time."""
    def strike(job: str) -> None:
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=2")
        slurm.until(lambda: "asked to stop" in _log(tmp_path / "run"), timeout_s=90)
        slurm("scontrol", "update", f"JobId={job}", "TimeLimit=10")

    code, told = _struck(slurm, run_file, tmp_path / "run", strike, "launch.slurm.grace_seconds=110", "engine.timeout_minutes=5")
    assert code == 0, told
    assert "back into the queue" in told and len(_starts(tmp_path / "run")) == 2, told
    assert_same(tmp_path / "run", reference)


def test_a_cancelled_job_saves_and_stays_cancelled(slurm, run_file, tmp_path):
    code, told = _struck(slurm, run_file, tmp_path / "run", lambda job: slurm("scancel", job))
    assert code == 75 and "back into the queue" not in told, told
    assert not slurm.job() and len(_starts(tmp_path / "run")) == 1
    saved = [event["step"] for event in ledger.read(tmp_path / "run") if event["kind"] == "save"]
    assert saved == [last_step(tmp_path / "run")]


def test_a_run_that_is_refused_is_not_queued_again(slurm, run_file, tmp_path):
    told = _launch(slurm, run_file, tmp_path / "run", "engine.nvme_dir=/nonexistent/x", "data.train.path=/nonexistent.jsonl")
    assert told.returncode == 2, told.stdout
    assert "back into the queue" not in _log(tmp_path / "run") and read_outcome(tmp_path / "run").state == "refused"


def test_a_run_that_kills_a_rank_at_every_start_ends_by_itself(slurm, run_file, tmp_path):
    """Without a checkpoint, `launch.restarts` bounds the starts; the losses up to there are told."""
    run_dir = tmp_path / "run"
    told = tmp_path / "told"
    with slurm.start("python", "-m", "harness", "launch", run_file, "--on", "slurm", f"run_dir={run_dir}", "launch.restarts=1", told=told) as launch:
        for number in (1, 2):
            slurm.until(lambda: len(_starts(run_dir)) == number and last_step(run_dir) >= 2 and _ranks(slurm, 2), timeout_s=90)
            before = last_step(run_dir)
            slurm.until(lambda: last_step(run_dir) != before)
            _ranks(slurm, 2)[0].kill()
        assert launch.wait(120) == 1, told.read_text()
    assert "2 times in a row without a new checkpoint" in read_outcome(run_dir).reason
    assert re.search(r"Rank 1 on h2 was ended by SIGKILL", read_outcome(run_dir).reason)
    assert losses(run_dir)


def _ranks(slurm: Slurm, host: int):
    return [process for process in slurm.cluster.processes(host) if process.cmdline()[1:5] == ["-u", "-m", "harness", "train"]]
