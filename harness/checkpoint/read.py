"""Any slice of a checkpoint, put together from the slices that are stored, whatever ranks wrote them."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from harness.errors import Failure
from harness.formats.manifest import BUFFERS, KINDS, Manifest

if TYPE_CHECKING:
    from harness.engine.holdings import Slice

_MAX_OPEN_FILES = 64


class SliceReader:
    """Reads from a checkpoint that was found to hold; files are mapped, and only what is asked for is copied.

    Args:
        folder: the checkpoint.
        manifest: its manifest.
        fetched: another folder, with files of the checkpoint that the first one lacks.
    """

    def __init__(self, folder: Path, manifest: Manifest, fetched: Path | None = None):
        self.folder, self.manifest, self.fetched = Path(folder), manifest, fetched
        self._open: OrderedDict[str, Any] = OrderedDict()
        self._stored: dict[str, list[tuple[int, int, str]]] = {}
        for entry in manifest.files:
            for name, offset, length in entry.slices:
                self._stored.setdefault(name, []).append((offset, length, entry.file))
        for slices in self._stored.values():
            slices.sort()

    def read(self, kind: str, name: str, offset: int, length: int) -> torch.Tensor:
        """Elements [offset, offset + length) of a flattened parameter.

        Args:
            kind: `master`, `exp_avg` or `exp_avg_sq`.
            name: the parameter, or the alias of a tied one.
            offset: first element.
            length: number of elements.

        Returns:
            fp32 CPU tensor [length].

        Raises:
            Failure: when the checkpoint does not hold all of it.
        """
        if kind not in KINDS:
            raise Failure(f"A checkpoint holds {', '.join(KINDS)}, not {kind!r}.")
        name = self.manifest.tied.get(name, name)
        result = torch.empty(length, dtype=torch.float32)
        slices = self._stored.get(name, [])
        position, end = offset, offset + length
        index = max(0, bisect_right(slices, (offset, float("inf"))) - 1)
        while position < end:
            if index >= len(slices) or not slices[index][0] <= position < slices[index][0] + slices[index][1]:
                raise Failure(f"{self.folder.name} does not hold {kind} of {name} from element {position} to {end}.")
            start, stored, file = slices[index]
            stop = min(end, start + stored)
            part = self._file(file).get_slice(f"{kind}/{name}")[position - start : stop - start]
            result[position - offset : stop - offset] = part
            position, index = stop, index + 1
        return result

    def files(self, slices: Iterable[Slice]) -> set[str]:
        """The files in which slices lie, and that of the buffers."""
        found = {entry.file for entry in self.manifest.files if entry.file == BUFFERS}
        for part in slices:
            stored = self._stored.get(self.manifest.tied.get(part.name, part.name), [])
            end = part.offset + part.length
            found |= {file for start, length, file in stored if start < end and part.offset < start + length}
        return found

    def buffers(self) -> dict[str, torch.Tensor]:
        """The model's persistent buffers, in their own types; empty where it has none, or an earlier version saved it."""
        if not any(entry.file == BUFFERS for entry in self.manifest.files):
            return {}
        file = self._file(BUFFERS)
        return {name: file.get_tensor(name) for name in file.keys()}

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if len(self._open) >= _MAX_OPEN_FILES:
                self._open.popitem(last=False)
            own = self.folder / name
            self._open[name] = safe_open(own if self.fetched is None or own.is_file() else self.fetched / name, framework="pt")
        self._open.move_to_end(name)
        return self._open[name]
