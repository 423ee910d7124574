"""When a checkpoint is real: written aside, digested, renamed, marked last."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed
from harness.checkpoint import buffers as buffer_file
from harness.checkpoint import certificate
from harness.checkpoint.disks import Disks
from harness.checkpoint.shelf import MARKER, checkpoints_folder, committed, folder_name
from harness.errors import Failure
from harness.files import sync_folder, write_text
from harness.formats.certificate import Certificate
from harness.formats.manifest import Manifest, SliceFile, coverage_problems, part_name, write_manifest
from harness.formats.tensor_file import TensorEntry, write_tensors
from harness.units import format_bytes
from harness.world import World

if TYPE_CHECKING:
    import torch

    from harness.engine.slices import SliceGroup

BYTES_PER_PARAMETER = 12
_LIBRARIES = ("torch", "deepspeed", "transformers", "safetensors")


@dataclass(frozen=True)
class Written:
    """What one rank wrote of a checkpoint: its files, Adam's step count, and the sums of its slices for the certificate."""

    files: list[SliceFile]
    adam_step: int
    sums: certificate.Sums


Answer = tuple[Written | None, str]
"""What a rank wrote, or why it could not."""


def check_room(run_dir: Path, fields: dict[str, Any], disks: Disks) -> None:
    """Before anything is written. Collective.

    Raises:
        Failure: on all ranks, when the checkpoint would not fit on a disk.
    """
    lacking = room_problems(run_dir, fields["parameters"], checkpoints=1, disks=disks)
    if lacking:
        raise Failure(f"The checkpoint of step {fields['step']} was not saved; the one before it stands.\n  {lacking}")


def write(
    groups: Iterable[SliceGroup], buffers: Mapping[str, torch.Tensor], *, run_dir: Path, step: int, attempt: int, rank: int
) -> Answer:
    """Write this rank's part of a checkpoint aside. No collective; what goes wrong is part of the answer."""
    return _attempt(lambda: _write(_aside(run_dir, step, attempt), groups, buffers, rank))


def conclude(answer: Answer, *, run_dir: Path, fields: dict[str, Any], attempt: int, world: World, disks: Disks) -> Path:
    """Commit what all ranks wrote. Collective: it fails on all of them or on none.

    Args:
        answer: what `write` gave on this rank.
        run_dir: the run's folder.
        fields: what the manifest says besides files, versions, world size and Adam's step count; of its `certificate`, what is
            not of the slices.
        attempt: number of this start of the run.
        world: this rank's place.
        disks: which ranks share the run's folder.

    Returns:
        the folder of the checkpoint.

    Raises:
        Failure: when a rank could not write, or a parameter would not be stored whole and once.
    """
    folder, aside = checkpoints_folder(run_dir) / folder_name(fields["step"]), _aside(run_dir, fields["step"], attempt)
    answers = distributed.gather_on_main(answer)
    manifest, problems = _manifest_of(answers, fields, world, disks) if world.is_main else (None, [])
    problems = distributed.broadcast_object(problems) or _commit_everywhere(aside, folder, manifest, disks)
    if problems:
        if disks.is_leader:
            shutil.rmtree(aside, ignore_errors=True)
        raise Failure(
            f"The checkpoint of step {fields['step']} was not saved; the one before it stands.\n  "
            + "\n  ".join(problems)
        )
    return folder


def _aside(run_dir: Path, step: int, attempt: int) -> Path:
    return checkpoints_folder(run_dir) / f"{folder_name(step)}.tmp-{attempt}"


def size_bytes(parameters: Mapping[str, Any]) -> int:
    """Of one checkpoint, but for its headers: each parameter is stored with both moments, in fp32."""
    return sum(math.prod(getattr(held, "shape", None) or held["shape"]) for held in parameters.values()) * BYTES_PER_PARAMETER


def room_problems(run_dir: Path, parameters: Mapping[str, Any], *, checkpoints: int, disks: Disks) -> str:
    """`room_problem` of every disk, each with its ranks' share of a checkpoint. Collective."""
    mine = room_problem(run_dir, parameters, checkpoints=checkpoints, share=disks.share) if disks.is_leader else ""
    told = [(rank, text) for rank, text in enumerate(distributed.gather_objects(mine)) if text]
    return " ".join(text if disks.is_one else f"On {disks.name(disks.number_of(rank))}: {text}" for rank, text in told)


def room_problem(run_dir: Path, parameters: Mapping[str, Any], *, checkpoints: int, share: float = 1.0) -> str:
    """Why so many new checkpoints would not fit on the disk of the run's folder; empty when they do.

    Args:
        run_dir: the run's folder.
        parameters: shape of every parameter.
        checkpoints: how many are to be there at once, those that are there already included.
        share: of a checkpoint, what comes to this disk.
    """
    folder = checkpoints_folder(run_dir)
    there = folder
    while not there.exists():
        there = there.parent
    one = math.ceil(size_bytes(parameters) * share)
    kept = min(checkpoints - 1, len(committed(run_dir)))
    needed, free = one * (checkpoints - kept), shutil.disk_usage(there).free
    if needed <= free:
        return ""
    return f"{checkpoints - kept} more checkpoints of {format_bytes(one)} need {format_bytes(needed)} in {folder}, where {format_bytes(free)} are free."


def _attempt(action: Callable[[], Any]) -> tuple[Any, str]:
    """Run a part of a save; what goes wrong becomes text, so that all ranks can fail together."""
    try:
        return action(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def _write(aside: Path, groups: Iterable[SliceGroup], buffers: Mapping[str, torch.Tensor], rank: int) -> Written:
    """Write every group to a file; its sums are taken meanwhile."""
    aside.mkdir(parents=True, exist_ok=True)
    files, adam_step, sums = [buffer_file.write(aside, buffers)] if buffers else [], 0, {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        for number, group in enumerate(groups):
            counting = pool.submit(certificate.sums_of_group, group)
            path = aside / f"rank-{rank:05d}-{number:03d}.safetensors"
            keys = [(kind, part.name, part.length) for kind in group.tensors for part in group.slices]
            entries = [TensorEntry(f"{kind}/{name}", "F32", (length,)) for kind, name, length in keys]
            chunks = (group.tensors[kind][name].contiguous().numpy() for kind, name, _ in keys)
            num_bytes, digest = write_tensors(path, entries, chunks)
            slices = tuple((part.name, part.offset, part.length) for part in group.slices)
            files.append(SliceFile(file=path.name, bytes=num_bytes, digest=digest, slices=slices))
            adam_step = max(adam_step, group.adam_step)
            sums = certificate.add([sums, counting.result()])
    sync_folder(aside)
    return Written(files, adam_step, sums)


def _manifest_of(answers: list[Answer], fields: dict[str, Any], world: World, disks: Disks) -> tuple[Manifest | None, list[str]]:
    """The manifest, or what went wrong on which rank."""
    if problems := [f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text]:
        return None, problems
    manifest, problem = _attempt(lambda: _manifest(fields, [written for written, _ in answers], world, disks))
    return manifest, [problem] if problem else []


def _commit_everywhere(aside: Path, folder: Path, manifest: Manifest | None, disks: Disks) -> list[str]:
    """Each disk's leader commits its part; none is renamed before all are ready. Collective; answers with what went wrong."""
    if not disks.is_one:
        manifest = distributed.broadcast_object(manifest)
    for act in (lambda: _prepare(aside, manifest, disks.number), lambda: publish(aside, folder)):
        problem = _attempt(act)[1] if disks.is_leader else ""
        answers = distributed.gather_objects(problem)
        if problems := [text if disks.is_one else f"{disks.hosts[rank]}: {text}" for rank, text in enumerate(answers) if text]:
            return problems
    return []


def _manifest(fields: dict[str, Any], written: list[Written], world: World, disks: Disks) -> Manifest:
    files = tuple(entry.model_copy(update={"disk": disks.number_of(rank)}) for rank, part in enumerate(written) for entry in part.files)
    adam_step = max(part.adam_step for part in written)
    seals = certificate.seals(certificate.add(part.sums for part in written))
    certified = Certificate(adam_step=adam_step, tensors=seals, **fields.get("certificate", {}))
    fields = {"adam_step": adam_step, **fields, "certificate": certified}
    manifest = Manifest(**fields, world_size=world.size, versions=_versions(), disks=disks.names, files=files)
    problems = coverage_problems(manifest.parameters, files)
    if problems:
        raise Failure("; ".join(problems[:5]))
    return manifest


def _prepare(aside: Path, manifest: Manifest, disk: int) -> None:
    """Complete the part of a disk: its manifest, and nothing that this does not vouch for."""
    aside.mkdir(parents=True, exist_ok=True)
    for path in aside.iterdir():
        if path.name not in {entry.file for entry in manifest.files if entry.disk == disk}:
            path.unlink()
    if manifest.disks:
        write_text(aside / part_name(disk), "")
    write_manifest(aside, manifest)
    sync_folder(aside)


def publish(aside: Path, folder: Path) -> None:
    """Give a checkpoint that is ready its name, in the place of one that has it, and mark it."""
    replaced = folder.with_name(f"{folder.name}.replaced")
    if folder.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(folder, replaced)
    os.rename(aside, folder)
    sync_folder(folder.parent)
    write_text(folder.parent / MARKER, folder.name + "\n")
    shutil.rmtree(replaced, ignore_errors=True)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES if find_spec(name)}}
