"""From the master weights of any checkpoint to a Hugging Face folder, without the ranks that trained it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from harness.checkpoint import buffers as buffer_file
from harness.checkpoint.disks import refuse_part
from harness.checkpoint.read import SliceReader
from harness.checkpoint.shelf import best, checkpoints_folder, folder_name, inspect, newest_good
from harness.errors import Refused
from harness.files import UNWRITABLE, read_json, sync_folder, write_json
from harness.formats.manifest import FILE_NAME, Manifest
from harness.formats.tensor_file import TensorEntry, write_tensors
from harness.log import say

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
SHARD_BYTES = 5 * 10**9
CHUNK_ELEMENTS = 1 << 24


def export(
    source: Path,
    to: Path,
    *,
    checkpoint: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; it appears whole or not at all.

    Args:
        source: a run's folder, or a checkpoint in it.
        to: the new folder.
        checkpoint: name of one of the run's checkpoints, or `best`; by default the newest that holds.
        dtype: `fp32`, `bf16`, `fp16` or the long name; by default the type in which the model was trained.
        overwrite: replace an earlier export in `to`.
        shard_bytes: size above which the weights are split.

    Returns:
        the new folder.

    Raises:
        Refused: when there is no such checkpoint or it does not hold, other hosts have files of it, the type is unknown, or `to` is in the way.
    """
    to = Path(to)
    folder, manifest = _find(Path(source), checkpoint)
    description = folder.parent.parent / "model"
    if not (description / "config.json").is_file():
        raise Refused(
            "The run's folder has no description of its model.",
            where=str(description),
            remedy="Copy `model/` from where the run was trained.",
        )
    dtype = SHORT_DTYPES.get(dtype or "", dtype) or _trained_dtype(manifest)
    if dtype not in DTYPES:
        raise Refused(
            f"Weights cannot be exported as {dtype!r}.", where="dtype", remedy=f"Use one of {', '.join(SHORT_DTYPES)}."
        )
    _check_target(to, overwrite=overwrite)
    try:
        _write_aside(SliceReader(folder, manifest), description, to.absolute(), dtype=dtype, shard_bytes=shard_bytes)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise Refused(f"{to} cannot be written: {error.strerror}.", where="--to", remedy="Choose a folder that can be written and has room.") from None
    return to


def _write_aside(reader: SliceReader, description: Path, to: Path, *, dtype: str, shard_bytes: int) -> None:
    aside = to.with_name(f".{to.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _copy_description(description, aside, dtype=dtype)
        write_weights(reader, aside, dtype=dtype, shard_bytes=shard_bytes)
        sync_folder(aside)
        if to.exists():
            shutil.rmtree(to)
        os.rename(aside, to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(to.parent)


def _find(source: Path, checkpoint: str | None) -> tuple[Path, Manifest]:
    if checkpoint not in (None, "best"):
        source = checkpoints_folder(source) / checkpoint
        if not source.is_dir():
            raise Refused(
                f"There is no checkpoint {checkpoint!r}.",
                where=str(source.parent),
                remedy="Name one of the folders there, or `best`.",
            )
    if (source / FILE_NAME).is_file() or checkpoint not in (None, "best"):
        return _holding(source)
    found, skipped = newest_good(source)
    if found is None:
        problem = f"No checkpoint holds: {'; '.join(skipped[:3])}." if skipped else "There is no checkpoint here."
        raise Refused(
            problem, where=str(source), remedy="Name the folder of a run that has saved, or one of its checkpoints."
        )
    if checkpoint == "best":
        return _best(source, found[1])
    refuse_part(*found)
    return found[0].absolute(), found[1]


def _holding(folder: Path) -> tuple[Path, Manifest]:
    manifest, problems = inspect(folder)
    if manifest is None or problems:
        raise Refused(
            f"The checkpoint is damaged: {'; '.join(problems[:3])}.",
            where=str(folder),
            remedy="Export another checkpoint of the run.",
        )
    refuse_part(folder, manifest)
    return folder.absolute(), manifest


def _best(run_dir: Path, newest: Manifest) -> tuple[Path, Manifest]:
    """The checkpoint of the lowest evaluation loss, as the newest one remembers it, or of the lowest among those that are there."""
    wanted = int(newest.state.get("best_step") or 0)
    step = best(run_dir, wanted)
    if step is None:
        raise Refused(
            "The run kept no best checkpoint.",
            where=str(checkpoints_folder(run_dir)),
            remedy="Leave `best` out to export the newest, or set `checkpoint.keep_best`.",
        )
    if step != wanted:
        say(f"The evaluation of step {wanted} was the best, and there is no checkpoint of it; the best of those that are there is of step {step}.")
    return _holding(checkpoints_folder(run_dir) / folder_name(step))


def _trained_dtype(manifest: Manifest) -> str:
    types = {entry.dtype for entry in manifest.parameters.values()}
    return types.pop() if len(types) == 1 else "float32"


def _check_target(to: Path, *, overwrite: bool) -> None:
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    if not overwrite or not (to / "config.json").is_file():
        raise Refused(
            "The folder to export to exists and is not empty.",
            where=str(to),
            remedy="Name another folder, or remove this one.",
        )


def _copy_description(description: Path, to: Path, *, dtype: str) -> None:
    """Configuration, tokenizer and template, with the type of the exported weights."""
    shutil.copytree(description, to, dirs_exist_ok=True)
    config = read_json(to / "config.json")
    config.pop("torch_dtype", None)
    write_json(to / "config.json", {**config, "dtype": dtype})


def write_weights(reader: SliceReader, to: Path, *, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Stream every parameter, tied ones once, into `model.safetensors` or into shards with an index, and persistent buffers in their own type.

    Args:
        reader: the checkpoint.
        to: the folder, which exists.
        dtype: key of `DTYPES`.
        shard_bytes: most bytes of tensors in a file, a single larger tensor aside.
    """
    (code, kind), buffers = DTYPES[dtype], reader.buffers()
    entries = [TensorEntry(name, code, entry.shape) for name, entry in reader.manifest.parameters.items()] + buffer_file.entries(buffers)
    shards = _shards(entries, shard_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(names, shards, strict=True):
        write_tensors(to / file, shard, _chunks(reader, buffers, shard, kind))
    if len(shards) > 1:
        total = sum(entry.num_bytes for entry in entries)
        count = sum(entry.numel for entry in reader.manifest.parameters.values())
        index: dict[str, Any] = {"metadata": {"total_size": total, "total_parameters": count}}
        index["weight_map"] = {entry.name: file for file, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(to / "model.safetensors.index.json", index)


def _shards(entries: list[TensorEntry], shard_bytes: int) -> list[list[TensorEntry]]:
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    return shards


def _chunks(reader: SliceReader, buffers: dict[str, torch.Tensor], shard: list[TensorEntry], kind: torch.dtype) -> Iterator[Any]:
    for entry in shard:
        if entry.name in buffers:
            yield buffer_file.content(buffers[entry.name])
            continue
        numel = reader.manifest.parameters[entry.name].numel
        for offset in range(0, numel, CHUNK_ELEMENTS):
            part = reader.read("master", entry.name, offset, min(CHUNK_ELEMENTS, numel - offset))
            yield part.to(kind).view(torch.uint8).numpy()
