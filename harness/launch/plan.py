"""What a batch system starts: the node starter's command on every host, computed from the run file as a value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from harness.config.load import Loaded
from harness.errors import Refused

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")


@dataclass(frozen=True)
class JobPlan:
    """A job of several hosts under a scheduler that starts it again.

    Attributes:
        slots: ranks of every host, in order.
        run_file: as the hosts find it.
        overrides: `key.path=value` words.
        run_dir: of the run, as the hosts find it.
        restarts: starts in a row without a new checkpoint that the job may have.
        uses_gpus: one a rank.
        grace_s: from the request to stop to the kill.
    """

    slots: tuple[int, ...]
    run_file: str
    overrides: tuple[str, ...]
    run_dir: PurePath
    restarts: int
    uses_gpus: bool
    grace_s: int

    def starter(self, *, python: str, master: str, job: str) -> tuple[str, ...]:
        """The words of the node starter, which finds the number of its host in its environment.

        Args:
            python: the interpreter on the hosts.
            master: `HOST:PORT` where the ranks meet.
            job: what names this job over all its starts.
        """
        return (
            python, "-u", "-m", "harness.launch.node", "--slots", ",".join(map(str, self.slots)), "--meet", master,
            "--job", job, "--restarts", str(self.restarts), self.run_file, *self.overrides,
        )


def plan(loaded: Loaded, *, hosts: int, ranks_per_host: int, grace_s: int, run_file: str, run_dir: PurePath, overrides: Sequence[str]) -> JobPlan:
    """The plan for hosts that are alike.

    The grace is passed on to the trainer, unless the run file says more; what only a scheduler reads is left out of the words.
    """
    words = [word for word in overrides if not word.startswith(("launch.slurm.", "launch.kubernetes."))]
    if loaded.run.checkpoint.grace_seconds is None:
        words.append(f"checkpoint.grace_seconds={grace_s}")
    uses_gpus = loaded.run.engine.device != "cpu"
    return JobPlan((ranks_per_host,) * hosts, run_file, tuple(words), run_dir, loaded.run.launch.restarts, uses_gpus, grace_s)


def label(text: str, *, where: str, longest: int = 63) -> str:
    """A DNS label (RFC 1123): what Kubernetes allows as a name.

    Raises:
        Refused: when it is none.
    """
    if len(text) > longest or not _LABEL.fullmatch(text):
        raise Refused(
            f"`{text}` is not a name that Kubernetes allows here: up to {longest} of a-z, 0-9 and -, with a letter or digit at both ends.",
            where=where, remedy="Choose another name.",
        )
    return text


def as_label(text: str, *, longest: int) -> str:
    """The nearest DNS label to a text; empty when nothing of it can stay."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:longest].strip("-")
