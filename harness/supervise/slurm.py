"""A Slurm job: submitted, followed through its starts to its end, and answered for by the run's outcome."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from harness import files
from harness.errors import EXIT_FAILURE, EXIT_RESUME_ME, Refused
from harness.formats.outcome import newest_attempt, read_outcome
from harness.log import say
from harness.supervise import follow

POLL_S = 2.0
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "GONE"}
_KEPT = ("SLURM_CONF", "SLURM_JWT")
"""Where the cluster is and who asks; all else of Slurm's own variables describes a job that this process may be in, and srun would read it."""
_LOOKS = 2
"""How often in a row a job must be seen ended: one that goes back into the queue may look so for a moment."""


@dataclass
class SlurmJob:
    """A job of this run.

    Attributes:
        number: Slurm's.
        run_dir: of the run.
        submitted: when, in seconds since the epoch.
    """

    number: int
    run_dir: Path
    submitted: float
    _shown: dict[Path, int] = field(default_factory=dict)

    @property
    def logs(self) -> list[Path]:
        """Of the batch script, and of the first node, whose rank 0 speaks for all."""
        folder = self.run_dir / "launch"
        return [folder / f"slurm-{self.number}.log", folder / f"slurm-{self.number}-node0.log"]

    def state(self) -> str:
        """As squeue says; GONE when it knows the job no more, empty when it does not answer."""
        told = subprocess.run(["squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={self.number}"], capture_output=True, text=True)
        if told.returncode == 0:
            return told.stdout.strip() or "GONE"
        return "GONE" if "Invalid job id" in told.stderr else ""

    def show(self) -> None:
        """Print what the logs have gained."""
        for path in self.logs:
            self._shown[path] = follow.print_from(path, self._shown.get(path, 0))


def submit(script: str, run_dir: Path) -> SlurmJob:
    """Write the script into the run's folder and hand it to sbatch; a job of this run that is still there is taken up instead.

    Raises:
        Refused: where there is no sbatch, or it takes offence at the script.
    """
    if shutil.which("sbatch") is None:
        remedy = "Launch from a login node of the cluster, or see the script with --print."
        raise Refused("sbatch is not on this machine.", where="PATH", remedy=remedy)
    folder = follow.folder(run_dir)
    memory = folder / "slurm.json"
    if memory.is_file():
        job = SlurmJob(run_dir=run_dir, **files.read_json(memory))
        if job.state() not in ENDED:
            say(f"Job {job.number} of this run is in the queue already: following it. End it with: scancel {job.number}")
            return job
    path = folder / "job.sbatch"
    files.write_text(path, script)
    submitted = time.time()
    told = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, env=_outside_of_jobs())
    if told.returncode:
        remedy = "Correct launch.slurm; `sinfo` shows partitions and their limits."
        raise Refused(f"sbatch refuses the job: {told.stderr.strip()}", where=str(path), remedy=remedy)
    job = SlurmJob(int(told.stdout.strip().split(";")[0]), run_dir, submitted)
    files.write_json(memory, {"number": job.number, "submitted": job.submitted})
    say(f"Submitted job {job.number}; logs: {folder}/slurm-{job.number}*.log. End it with: scancel {job.number}")
    return job


def _outside_of_jobs() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith(("SLURM_", "SLURMD_", "SRUN_"))}


def wait(job: SlurmJob, *, show_log: bool) -> int:
    """Follow a job until it is over; a request to this process leaves it alone.

    Returns:
        the code of the run's outcome; 75 when the job goes on without us.
    """
    before, looks = "", 0
    with follow.until_asked() as asked:
        while looks < _LOOKS:
            state = job.state()
            if state and state != before:
                say(f"Job {job.number} is {state}.")
                before = state
            if show_log:
                job.show()
            looks = looks + 1 if state in ENDED else 0
            if looks < _LOOKS and asked.wait(POLL_S):
                say(f"Job {job.number} goes on. The same command follows it again; scancel {job.number} ends it after a save.")
                return EXIT_RESUME_ME
    outcome = read_outcome(job.run_dir)
    if outcome is None or outcome.time < job.submitted:
        say(f"Job {job.number} ended, {before}, before the run could say why; see {job.logs[0]}.")
        return EXIT_RESUME_ME if before == "CANCELLED" else EXIT_FAILURE
    say(f"The run is {outcome.state} after step {outcome.step}, attempt {newest_attempt(job.run_dir)[0]}: {outcome.reason}")
    return outcome.code
