"""Checkpoints made by hand: a small model's master and moments, cut over pretended ranks, without a process group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import commit, shelf
from harness.checkpoint.disks import Disks
from harness.engine.holdings import Slice, SliceGroup
from harness.formats.manifest import KINDS
from harness.world import World

SHAPES = {"wte.weight": (7, 5), "h.weight": (4, 4), "h.bias": (4,), "scale": ()}


def state(shapes: dict[str, tuple[int, ...]] = SHAPES, *, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """kind -> name -> flat fp32 tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {name: torch.randn(shape, generator=generator).reshape(-1) for name, shape in shapes.items()}
        for kind in KINDS
    }


def groups(
    tensors: dict[str, dict[str, torch.Tensor]],
    *,
    rank: int,
    ranks: int,
    per_group: int = 2,
    step: int = 9,
    shapes: dict[str, Any] = SHAPES,
) -> Iterator[SliceGroup]:
    """What one of `ranks` ranks owns when each parameter is cut evenly, a few parameters a group."""
    parts = []
    for name, flat in tensors["master"].items():
        cut = -(-flat.numel() // ranks)
        length = min(cut, flat.numel() - cut * rank)
        if length > 0:
            parts.append(Slice(name, cut * rank, length, shapes[name]))
    for begin in range(0, len(parts), per_group):
        portion = parts[begin : begin + per_group]
        cuts = {
            kind: {p.name: tensors[kind][p.name][p.offset : p.offset + p.length] for p in portion} for kind in KINDS
        }
        yield SliceGroup(portion, cuts, step)


def fields(step: int, shapes: dict[str, tuple[int, ...]] = SHAPES, **others: Any) -> dict[str, Any]:
    """The part of a manifest that the run gives."""
    parameters = {name: {"shape": list(shape), "dtype": "float32"} for name, shape in shapes.items()}
    return {"step": step, "rows_consumed": step * 8, "data_fingerprint": "f", "parameters": parameters, **others}


def commit_groups(
    groups: Iterable[SliceGroup], *, run_dir: Path, fields: dict[str, Any], attempt: int, world: World, disks: Disks | None = None,
    buffers: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Commit a checkpoint of one or several ranks; the arguments are those of `commit.write` and `commit.conclude`. Collective."""
    disks = disks or Disks.shared(world)
    commit.check_room(run_dir, fields, disks)
    answer = commit.write(groups, buffers or {}, run_dir=run_dir, step=fields["step"], attempt=attempt, rank=world.rank)
    return commit.conclude(answer, run_dir=run_dir, fields=fields, attempt=attempt, world=world, disks=disks)


def save(
    run_dir: Path, step: int, *, tensors: dict[str, dict[str, torch.Tensor]] | None = None, attempt: int = 1
) -> Path:
    """Commit a checkpoint of a single rank."""
    owned = groups(tensors or state(seed=step), rank=0, ranks=1)
    return commit_groups(owned, run_dir=run_dir, fields=fields(step), attempt=attempt, world=World())


def save_as_ranks(
    run_dir: Path,
    tensors: dict[str, dict[str, torch.Tensor]],
    *,
    ranks: int,
    step: int = 1,
    shapes: dict[str, Any] = SHAPES,
    buffers: dict[str, torch.Tensor] | None = None,
    **others: Any,
) -> Path:
    """Commit a checkpoint as `ranks` ranks would have written it."""
    folder = shelf.checkpoints_folder(run_dir) / shelf.folder_name(step)
    aside = folder.with_name(f"{folder.name}.tmp-1")
    written = [
        commit._write(aside, groups(tensors, rank=rank, ranks=ranks, shapes=shapes), {} if rank else buffers or {}, rank) for rank in range(ranks)
    ]
    manifest = commit._manifest(fields(step, shapes, **others), written, World(size=ranks), Disks.shared(World(size=ranks)))
    commit._prepare(aside, manifest, 0)
    commit.publish(aside, folder)
    return folder
