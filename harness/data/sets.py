"""All that a run trains and evaluates on, opened: the sets that were prepared from its sources, or prepared sets by name, near or far."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import files
from harness.config.schema import Data, RunFile, SetSpec
from harness.data.background import growing
from harness.data.mixture import MixedTable, Share
from harness.data.packing import Packing
from harness.data.plans import wanted
from harness.data.rows import OPEN_SHARDS, RowTable
from harness.data.remote import open_store
from harness.data.store import Store
from harness.data.template import Template
from harness.errors import HarnessError, Refused
from harness.formats.index import ShardFile, shard_name
from harness.units import format_bytes

GIB = 1 << 30
SPARE_SHARDS = 2
"""Beside a window: the first of the next one, and room in which it arrives."""


@dataclass(frozen=True)
class RunData:
    """What a run trains on.

    Attributes:
        train: rows of training, of one set or several.
        validation: rows of evaluation, by the name of the set; the name is empty where there is no mixture.
        tokenizer: folder, on this host.
        template: how examples became text.
    """

    train: RowTable | MixedTable
    validation: dict[str, RowTable]
    tokenizer: Path
    template: Template

    @property
    def is_whole(self) -> bool:
        """Whether nothing is being prepared any more, as this rank sees it."""
        return self.train.is_whole and all(table.is_whole for table in self.validation.values())

    def facts(self) -> dict[str, Any]:
        """What a run keeps of its data, so that a later attempt can say what has changed."""
        tables = self.train.tables if isinstance(self.train, MixedTable) else [self.train]
        names = list(self.validation)
        found: dict[str, Any] = {}
        for name, table in zip(names, tables, strict=True):
            found[name or "train"] = {
                "fingerprint": table.index.fingerprint, "backend": table.index.backend, "packing": dict(table.packing.__dict__),
                "rows": table.num_rows, "shards": {shard_name(number): digest for number, digest in enumerate(table.index.columns["files"]["arrow"]["digest"])},
            }
            if isinstance(self.train, MixedTable):
                share = self.train.shares[names.index(name)]
                found[name] |= {"weight": share.weight, "max_epochs": share.max_epochs}
        return found

    def close(self) -> None:
        """Let go of all shards."""
        self.train.close()
        for table in self.validation.values():
            table.close()


def cache_folder(data: Data) -> Path:
    """Where files of remote sets are kept on this host."""
    return Path(data.cache_dir) if data.cache_dir else Path("~/.cache/harness").expanduser()


def open_data(run: RunFile) -> RunData:
    """Open what a run file names; it must be prepared.

    Raises:
        Refused: a set that is not there, sets that do not fit together, a cache too small for a window of shards.
    """
    data = run.data
    if data.sets is None:
        folder = Path(str(data.dir))
        train, validation = (growing(folder / name, Packing.of(data)) or RowTable.of_run(run, name) for name in ("train", "validation"))
        return RunData(train, {"": validation}, folder / "tokenizer", Template.from_dict(train.template))
    opened = {name: _open_set(name, spec, data) for name, spec in data.sets.items()}
    trains = [train for train, _ in opened.values()]
    _same_tokenizer(list(opened), trains)
    _room(data, [table for pair in opened.values() for table in pair])
    first = next(iter(data.sets.values()))
    tokenizer = _tokenizer(first, trains[0].index.tokenizer, data)
    shares = [Share(name, spec.weight, spec.max_epochs) for name, spec in data.sets.items()]
    train = trains[0] if len(trains) == 1 and shares[0].max_epochs is None else MixedTable(trains, shares)
    names = opened if len(opened) > 1 else [""]
    validation = dict(zip(names, (table for _, table in opened.values()), strict=True))
    return RunData(train, validation, tokenizer, Template.from_dict(trains[0].template))


def _open_set(name: str, spec: SetSpec, data: Data) -> tuple[RowTable, RowTable]:
    tables = []
    for which, shards in (("train", data.window_shards + SPARE_SHARDS - 1), ("validation", 1)):
        try:
            store = _store(spec, which, data)
            local = _plans(spec, which, data, store)
            tables.append(RowTable.open(store, Packing.of(data), local=local, open_shards=shards if store.is_remote else OPEN_SHARDS))
        except Refused:
            raise
        except HarnessError as error:
            raise Refused(f"The {which} part of the set {name!r} cannot be opened: {error}", where=f"data.sets.{name}.dir",
                          remedy="Give the folder or URL that `harness prepare` filled, with train/, validation/ and tokenizer/ below it.") from None
    return tables[0], tables[1]


def open_table(place: str, data: Data) -> RowTable:
    """The rows of one set, a folder or URL that ends in `train` or `validation`."""
    base, _, which = place.rstrip("/").rpartition("/")
    spec = SetSpec(dir=base or ".")
    store = _store(spec, which, data)
    return RowTable.open(store, Packing.of(data), local=_plans(spec, which, data, store))


def tokenizer_of(place: str, table: RowTable, data: Data) -> Path:
    """The folder of the tokenizer with which a set was made."""
    return _tokenizer(SetSpec(dir=place.rstrip("/").rpartition("/")[0] or "."), table.index.tokenizer, data)


def _store(spec: SetSpec, below: str, data: Data) -> Store:
    where = f"{spec.dir.rstrip('/')}/{below}"
    return open_store(where, cache_dir=cache_folder(data), cache_bytes=int(data.cache_gib * GIB))


def _plans(spec: SetSpec, which: str, data: Data, store: Store) -> Path | None:
    """Where plans are kept that the set lacks: beside it if that can be written, else in the cache's own corner."""
    if not store.is_remote and os.access(Path(spec.dir) / which, os.W_OK):
        return Path(spec.dir) / which
    return cache_folder(data) / "plans" / files.digest_text(f"{spec.dir}/{which}")[:16]


def _same_tokenizer(names: list[str], tables: list[RowTable]) -> None:
    for name, table in zip(names[1:], tables[1:], strict=True):
        if _tokenizer_digest(table) != _tokenizer_digest(tables[0]):
            raise Refused(f"The sets {names[0]!r} and {name!r} were made with different tokenizers.", where="data.sets",
                          remedy="Prepare both with the same data.tokenizer.")


def _tokenizer_digest(table: RowTable) -> str:
    return next(file.digest for file in table.index.tokenizer if file.name == "tokenizer.json")


def _room(data: Data, tables: list[RowTable]) -> None:
    """Refuse a cache that could not hold what is in use at once."""
    needed = 0
    for table in tables:
        if table.store.is_remote:
            sizes = sorted((size + table.plans.size(number) for number, size in enumerate(table.index.columns["files"]["arrow"]["bytes"])), reverse=True)
            needed += sum(sizes[: table.open_shards + 1])
    if needed > data.cache_gib * GIB:
        raise Refused(
            f"The cache of {data.cache_gib:g} GiB is too small: with data.window_shards={data.window_shards} up to {format_bytes(needed)} are in use at once.",
            where="data.cache_gib", remedy=f"Set data.cache_gib to {needed / GIB * 1.05:.3g} or more, or lower data.window_shards.",
        )


def _tokenizer(spec: SetSpec, wanted_files: list[ShardFile], data: Data) -> Path:
    """The tokenizer's folder: that of a local set, or a copy in the cache."""
    store = _store(spec, "tokenizer", data)
    if not store.is_remote:
        return Path(spec.dir) / "tokenizer"
    folder = cache_folder(data) / "tokenizers" / files.digest_text(*(f"{file.name} {file.digest}" for file in wanted_files))[:16]
    if not folder.is_dir():
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
        for file in wanted_files:
            (aside / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.hold(wanted(file)), aside / file.name)
            store.release(file.name)
        try:
            aside.rename(folder)
        except OSError:  # another rank was first
            shutil.rmtree(aside)
    store.close()
    return folder
