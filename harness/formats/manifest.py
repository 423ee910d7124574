"""What a checkpoint holds, and what vouches for it: `manifest.json`, version 2.

A checkpoint that hosts wrote on disks of their own lies in parts: each disk has the whole manifest, its hosts' files, and an empty file
`disk-N` that says which part it is. The parts copied together into one folder are the whole.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.files import digest_text, write_text
from harness.formats.certificate import Certificate

FILE_NAME = "manifest.json"
VERSION = 2
"""1 knew of one disk only."""
KINDS = ("master", "exp_avg", "exp_avg_sq")
BUFFERS = "buffers.safetensors"
"""The file that holds what the model keeps beside its parameters, where there is such a thing; it has no slices."""


class ManifestError(ValueError):
    """A manifest is missing or damaged."""


class LaterVersion(ValueError):
    """A manifest is of a later version than this harness knows."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ParameterEntry(_Part):
    """One parameter of the model: its full shape, and the type in which it was trained."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class SliceFile(_Part):
    """A file, and the slices (parameter, flat offset, length) of which it holds every kind as `<kind>/<parameter>`; `disk` is where it was written."""

    file: str
    bytes: int
    digest: str
    slices: tuple[tuple[str, int, int], ...]
    disk: int = 0


class Manifest(_Part):
    """A checkpoint: where the run stood, what the model is, and the files that hold its state."""

    version: int = VERSION
    step: int = Field(ge=0, description="Optimizer steps done.")
    rows_consumed: int = Field(ge=0, description="The cursor: rows of the global sequence that were trained on.")
    adam_step: int = Field(ge=0, description="Adam's own count, which skipped steps do not advance.")
    data_fingerprint: str
    run_file: dict[str, Any] = Field(default_factory=dict, description="The run file as resolved.")
    engine: str = "zero"
    pipeline_stages: int = 1
    zero_stage: int = 0
    offload: dict[str, str] = Field(default_factory=dict)
    world_size: int = 1
    versions: dict[str, str] = Field(default_factory=dict, description="Versions of the libraries that wrote it.")
    parameters: dict[str, ParameterEntry]
    tied: dict[str, str] = Field(
        default_factory=dict, description="Alias of a tied parameter -> the name it is stored under."
    )
    groups: list[dict[str, Any]] = Field(
        default_factory=list, description="Hyper-parameters of the optimizer's groups."
    )
    loss_scale: dict[str, float] = Field(
        default_factory=dict, description="State of dynamic loss scaling; empty unless the run is in fp16."
    )
    metrics: dict[str, float] = Field(default_factory=dict)
    state: dict[str, Any] = Field(
        default_factory=dict, description="The progress of the run, the best evaluation among it."
    )
    certificate: Certificate | None = Field(default=None, description="What a resume must find again; older checkpoints have none.")
    disks: tuple[str, ...] = Field(default=(), description="Hosts of each disk, by number; empty when all ranks shared one.")
    files: tuple[SliceFile, ...] = ()


def part_name(disk: int) -> str:
    """Name of the file that says that a folder has the files of a disk."""
    return f"disk-{disk}"


def parts(folder: Path, manifest: Manifest) -> set[int]:
    """The numbers of the disks whose files a folder should have; all of them where there was one disk."""
    if not manifest.disks:
        return {0}
    return {number for number in range(len(manifest.disks)) if (Path(folder) / part_name(number)).is_file()}


def absent_parts(folder: Path, manifest: Manifest) -> set[int]:
    """The numbers of the disks whose files are not in a folder, and are not to be expected there."""
    return {entry.disk for entry in manifest.files} - parts(folder, manifest)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, one entry or file a line, with a digest of its own content."""
    content = manifest.model_dump()
    lines = [f'"digest": "{_digest(content)}"']
    lines += [f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in content.items() if key != "files"]
    files = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in content["files"])
    lines.append(f'"files": [\n  {files}\n]')
    write_text(Path(folder) / FILE_NAME, "{\n" + ",\n".join(lines) + "\n}\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        ManifestError: when it is missing, or was changed since it was written.
        LaterVersion: when it is of a later version.
        OSError: when the disk does not give it.
    """
    try:
        text = (Path(folder) / FILE_NAME).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ManifestError(f"{FILE_NAME} is missing") from None
    except ValueError as error:
        raise ManifestError(f"{FILE_NAME} cannot be read: {error}") from None
    return parse_manifest(text)


def parse_manifest(text: str) -> Manifest:
    """A manifest from the text of its file; errors are those of `read_manifest`, but for the disk's."""
    try:
        content = json.loads(text)
        digest = content.pop("digest")
        version = int(content["version"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"{FILE_NAME} cannot be read: {error}") from None
    if version > VERSION:
        raise LaterVersion(f"{FILE_NAME} has version {version}, this harness reads up to {VERSION}")
    if digest != _digest(content):
        raise ManifestError(f"{FILE_NAME} was changed since it was written")
    content.pop("config_fingerprint", None)  # always empty, and no longer written
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ManifestError(f"{FILE_NAME} is not valid: {error}") from None


def _digest(content: dict[str, Any]) -> str:
    return digest_text(json.dumps(content, sort_keys=True, separators=(",", ":")))


def coverage_problems(parameters: dict[str, ParameterEntry], files: tuple[SliceFile, ...]) -> list[str]:
    """Where slices leave a gap in a parameter, overlap, or name an unknown one; empty when all is stored once."""
    stored: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}
    problems = []
    for file in files:
        for name, offset, length in file.slices:
            if name not in stored:
                problems.append(f"{file.file} holds the unknown parameter {name}")
            else:
                stored[name].append((offset, length))
    for name, slices in stored.items():
        end = 0
        for offset, length in sorted(slices):
            if offset != end:
                problems.append(
                    f"{name} {'has a gap' if offset > end else 'is stored twice'} at element {min(offset, end)}"
                )
                break
            end += length
        else:
            if end != parameters[name].numel:
                problems.append(f"{name} is stored up to element {end} of {parameters[name].numel}")
    return problems
