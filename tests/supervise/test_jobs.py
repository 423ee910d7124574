"""What followers of Slurm and Kubernetes jobs make of states, codes and missing programs."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from harness.errors import Refused
from harness.formats.outcome import Outcome, write_outcome
from harness.supervise import follow, kubernetes, slurm


@pytest.mark.parametrize(("codes", "code"), [([75, 2, 75], 2), ([137, 4], 4), ([1, 1], 1), ([], 1), ([75, 75], 1)])
def test_the_code_of_a_failed_job(codes, code):
    assert kubernetes.code_of(codes) == code


@pytest.mark.parametrize(("conditions", "told"), [
    ([], ""), ([("Complete", "True")], "Complete"), ([("Suspended", "True"), ("Failed", "False")], ""), ([("FailureTarget", "True"), ("Failed", "True")], "Failed"),
    ([("Completed", "True")], "Completed"),
])
def test_when_a_job_is_over(conditions, told):
    found = {"status": {"conditions": [{"type": kind, "status": status} for kind, status in conditions]}}
    assert kubernetes.ended(found) == told


def test_without_sbatch_it_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="sbatch is not on this machine"):
        slurm.submit("#!/bin/bash\n", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """sbatch and squeue that answer as told."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answer(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "POLL_S", 0.05)
    return answer


def test_what_sbatch_refuses_is_told(programs, tmp_path):
    programs("sbatch", "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1")
    with pytest.raises(Refused, match="invalid partition specified: gpu"):
        slurm.submit("#!/bin/bash\n", tmp_path / "run")


def test_a_job_hears_nothing_of_the_job_that_submits_it(programs, tmp_path, monkeypatch):
    """An interactive job with --mem-per-cpu would clash with the memory of the new one."""
    inherited = {"SLURM_MEM_PER_CPU": "1000", "SLURM_JOB_ID": "3", "SRUN_DEBUG": "3", "SLURM_CONF": "/etc/slurm.conf", "SBATCH_ACCOUNT": "mine"}
    for name, value in inherited.items():
        monkeypatch.setenv(name, value)
    programs("sbatch", f"env > {tmp_path}/told; echo 8")
    slurm.submit("one\n", tmp_path)
    told = dict(line.split("=", 1) for line in (tmp_path / "told").read_text().splitlines() if "=" in line)
    assert {name: told.get(name) for name in inherited} == {name: inherited[name] if name in ("SLURM_CONF", "SBATCH_ACCOUNT") else None for name in inherited}


def test_a_job_that_is_in_the_queue_is_taken_up(programs, tmp_path):
    programs("sbatch", "echo 8")
    programs("squeue", "echo PENDING")
    assert slurm.submit("one\n", tmp_path).number == 8
    programs("sbatch", "echo 9")
    assert slurm.submit("two\n", tmp_path).number == 8
    programs("squeue", "echo COMPLETED")
    assert slurm.submit("two\n", tmp_path).number == 9
    assert (tmp_path / "launch" / "job.sbatch").read_text() == "two\n"


def test_a_moment_between_two_starts_is_no_end(programs, tmp_path):
    """PREEMPTED is told once on the way back into the queue; a silent controller is no end either."""
    states = tmp_path / "states"
    states.write_text("RUNNING\nPREEMPTED\nPENDING\nRUNNING\nSILENT\nCOMPLETED\nCOMPLETED\n")
    programs("squeue", f"state=$(head -n 1 {states}); sed -i 1d {states}; [ $state = SILENT ] && exit 1; echo $state")
    job = slurm.SlurmJob(7, tmp_path, 0.0)
    write_outcome(tmp_path, Outcome("done", 0, "well", 9, 2))
    assert slurm.wait(job, show_log=False) == 0
    assert states.read_text() == ""


@pytest.mark.parametrize(("state", "code"), [("FAILED", 1), ("CANCELLED", 75)])
def test_a_job_that_never_began_is_answered_for_by_its_state(programs, tmp_path, state, code):
    programs("squeue", f"echo {state}")
    write_outcome(tmp_path, Outcome("done", 0, "long ago", 9, 2, time=1.0))
    assert slurm.wait(slurm.SlurmJob(7, tmp_path, 2.0), show_log=False) == code


def test_a_log_is_printed_as_it_grows(tmp_path: Path, capsys):
    path = tmp_path / "log"
    assert follow.print_from(path, 0) == 0
    path.write_text("one\n")
    place = follow.print_from(path, 0)
    path.write_text("one\ntwo\n")
    assert follow.print_from(path, place) == 8 and capsys.readouterr().out == "one\ntwo\n"
