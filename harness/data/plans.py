"""Where the plans of a set's rows come from, and what they add up to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson

from harness import files
from harness.data.packing import Packing, Plan, plan_folder
from harness.data.store import Store, Wanted
from harness.formats.index import ShardFile, ShardSetIndex, shard_name

SUMMARY = "summary.json"


def wanted(file: ShardFile, folder: str = "") -> Wanted:
    """A file of the index as a store is asked for it."""
    return Wanted(f"{folder}{file.name}", file.bytes, file.digest)


@dataclass(frozen=True)
class Summary:
    """What the plans of a set add up to.

    Attributes:
        rows: of each shard.
        filled: positions of each shard that hold a token.
        trained: tokens of each shard.
        truncated: documents that lost their end.
        dropped: documents that were left out for their length.
        sizes: bytes of each plan's file; empty where plans are kept nowhere.
        digests: of the same.
        untrained: rows without a trained token.
    """

    rows: list[int]
    filled: list[int]
    trained: list[int]
    truncated: int
    dropped: int
    sizes: list[int]
    digests: list[str]
    untrained: int = 0

    @classmethod
    def of(cls, plans: list[Plan], files: list[ShardFile]) -> Summary:
        """Add up."""
        return cls(
            [plan.num_rows for plan in plans], [int((plan.pieces[:, 1] - plan.pieces[:, 0]).sum(dtype=np.int64)) for plan in plans],
            [int(plan.trained.sum(dtype=np.int64)) for plan in plans], sum(plan.truncated for plan in plans), sum(plan.dropped for plan in plans),
            [file.bytes for file in files], [file.digest for file in files], sum(int((plan.trained == 0).sum()) for plan in plans),
        )

    @classmethod
    def from_json(cls, text: bytes) -> Summary:
        """As `as_json` wrote it."""
        return cls(**orjson.loads(text))

    def as_json(self) -> str:
        """Readable without this class."""
        return json.dumps(self.__dict__)


@dataclass
class PlanSource:
    """Where the plans of a set's shards come from: they lie in its store, or they are made here.

    Args:
        store: of the set.
        index: of the set.
        packing: how documents become rows.
        local: folder in which plans are kept that were made here; None keeps none.
    """

    store: Store
    index: ShardSetIndex
    packing: Packing
    local: Path | None
    _in_store: Summary | None = None

    @property
    def name(self) -> str:
        """Of the folder of plans, below the set or `local`."""
        return plan_folder(Path(), self.packing, self.index.fingerprint).name

    def summary(self) -> Summary:
        """That of all plans; makes those that are nowhere yet."""
        if (text := self.store.read_small(f"{self.name}/{SUMMARY}")) is not None:
            self._in_store = Summary.from_json(text)
            return self._in_store
        kept = self.local / self.name / SUMMARY if self.local else None
        if kept is not None and kept.is_file():
            return Summary.from_json(kept.read_bytes())
        return self.make()

    def make(self) -> Summary:
        """Plan the shards that are not planned yet, and keep what all plans add up to."""
        plans = [self._own(number) for number in range(len(self.index.shards))]
        if self.local is None:
            return Summary.of(plans, [])
        summary = Summary.of(plans, [ShardFile.of(self._path(entry.name)) for entry in self.index.shards])
        files.write_text(self.local / self.name / SUMMARY, summary.as_json())
        return summary

    def plan(self, number: int) -> tuple[Plan, list[str]]:
        """The plan of a shard, and the names of files that the store holds for it."""
        if self._in_store is None:
            return self._own(number), []
        [file] = self.files(number)
        return Plan.open(self.store.hold(file)), [file.name]

    def files(self, number: int) -> list[Wanted]:
        """What the store has to hold for the plan of a shard."""
        if self._in_store is None:
            return []
        return [Wanted(f"{self.name}/{shard_name(number)}.npy", self._in_store.sizes[number], self._in_store.digests[number])]

    def size(self, number: int) -> int:
        """Bytes of them."""
        return self._in_store.sizes[number] if self._in_store else 0

    def _path(self, shard: str) -> Path:
        assert self.local is not None
        return self.local / self.name / f"{shard}.npy"

    def _own(self, number: int) -> Plan:
        entry = self.index.shards[number]
        if self.local is not None and self._path(entry.name).is_file():
            return Plan.open(self._path(entry.name))
        sources = [entry.file("lengths.npy"), entry.file("spans.npy")]
        plan = Plan.make(*(np.load(self.store.hold(wanted(file))) for file in sources), self.packing)
        for file in sources:
            self.store.release(file.name)
        if self.local is not None:
            self._path(entry.name).parent.mkdir(parents=True, exist_ok=True)
            plan.write(self._path(entry.name))
        return plan
