"""Whether a checkpoint holds and is what its certificate says, from its files alone: no engine, a slice at a time in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from harness.checkpoint import certificate
from harness.checkpoint.disks import refuse_part
from harness.checkpoint.shelf import checkpoints_folder, committed, inspect
from harness.errors import Refused
from harness.formats.certificate import Certificate, Seal
from harness.formats.manifest import KINDS, Manifest, SliceFile

CHUNK_ELEMENTS = 1 << 22


@dataclass
class Verdict:
    """What was found of a checkpoint.

    Attributes:
        folder: the checkpoint.
        manifest: its manifest, or None when it cannot be read.
        found: seals computed from the files; empty when these do not hold.
        problems: every reason against it.
    """

    folder: Path
    manifest: Manifest | None = None
    found: dict[str, dict[str, Seal]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """A table for people."""
        if self.manifest is None:
            return [f"checkpoint  {self.folder.name}"]
        manifest, saved = self.manifest, self.manifest.certificate
        lines = [
            f"checkpoint  {self.folder.name}: {len(manifest.files)} files of {manifest.world_size} ranks, {len(manifest.parameters)} parameters",
            f"step        {manifest.step}, {manifest.rows_consumed:,} rows consumed, Adam's step {manifest.adam_step}",
        ]
        lines += [f"{kind:<11} {_total(self.found, kind):.9g}{_against(saved, kind)}" for kind in KINDS if self.found]
        if saved is None and self.found:
            lines.append("certificate none: it was saved by an earlier version, so that only the digests of its files speak for it")
        return [*lines, f"verdict     {'it does not hold' if self.problems else 'it holds'}"]


def _total(seals: dict[str, dict[str, Seal]], kind: str) -> float:
    return math.sqrt(sum(held[kind].norm ** 2 for held in seals.values() if kind in held))


def _against(saved: Certificate | None, kind: str) -> str:
    return " L2 norm over all parameters" + (f", saved as {_total(saved.tensors, kind):.9g}" if saved else "")


def verify(run_dir: Path, *, checkpoint: str | None = None) -> Verdict:
    """Look at a checkpoint; nothing is changed or set aside.

    Args:
        run_dir: the run's folder.
        checkpoint: name of one of its checkpoints; by default the newest.

    Raises:
        Refused: when there is none, or other hosts have files of it.
    """
    folder = _find(Path(run_dir), checkpoint)
    manifest, problems = inspect(folder)
    if manifest is None or problems:
        return Verdict(folder, manifest, problems=problems)
    refuse_part(folder, manifest)
    found = certificate.seals(certificate.add(_sums(folder, entry) for entry in manifest.files))
    return Verdict(folder, manifest, found, _problems(manifest, found))


def _find(run_dir: Path, checkpoint: str | None) -> Path:
    if checkpoint is not None:
        folder = checkpoints_folder(run_dir) / checkpoint
        if folder.is_dir():
            return folder
        raise Refused(f"There is no checkpoint {checkpoint!r}.", where=str(folder.parent), remedy="Name one of the folders there.")
    saved = committed(run_dir)
    if not saved:
        raise Refused("There is no checkpoint here.", where=str(run_dir), remedy="Name the folder of a run that has saved.")
    return saved[0][1]


def _problems(manifest: Manifest, found: dict[str, dict[str, Seal]]) -> list[str]:
    saved = manifest.certificate
    if saved is None:
        return []
    problems = certificate.tensor_problems(saved, found, adam_step=manifest.adam_step)
    if saved.rows is not None and saved.rows.first != manifest.rows_consumed:
        problems.append(f"the cursor is {manifest.rows_consumed:,} rows instead of {saved.rows.first:,}")
    return problems


def _sums(folder: Path, entry: SliceFile) -> certificate.Sums:
    with safe_open(folder / entry.file, framework="np") as stored:
        return certificate.add(
            {(kind, name): _sums_of(stored.get_slice(f"{kind}/{name}"), offset, length)} for name, offset, length in entry.slices for kind in KINDS
        )


def _sums_of(part: Any, offset: int, length: int) -> tuple[float, int]:
    blocks = (
        certificate.sums_of(part[begin : min(begin + CHUNK_ELEMENTS, length)], offset + begin) for begin in range(0, length, CHUNK_ELEMENTS)
    )
    return certificate.add({("", ""): block} for block in blocks)["", ""]
