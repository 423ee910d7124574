"""What a run's data were when it began, and whether it may go on with what they are now."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import distributed, files
from harness.config.schema import RunFile
from harness.data.sets import RunData
from harness.errors import Refused
from harness.formats import ledger
from harness.log import say

if TYPE_CHECKING:
    from harness.formats.manifest import Manifest
    from harness.train.progress import Progress

FILE = "data.json"
"""Version 2: `known`, the facts of all data that the run was trained on, by fingerprint; before, it held those of the last attempt alone."""
VERSION = 2


@dataclass(frozen=True)
class Changes:
    """Between the data of the last attempt and those of this one.

    Attributes:
        run_dir: of the run.
        known: facts of all data that it was trained on, those of now among them unless they are still being prepared; on rank 0.
        appended: a sentence about what was added, where that is all that changed; empty otherwise.
    """

    run_dir: Path
    known: dict[str, Any]
    appended: str

    @classmethod
    def since(cls, run: RunFile, data: RunData, found: tuple[Path, Manifest] | None) -> Changes:
        """Compare with what the checkpoint was trained on; rank 0, which knows that, judges for all. Collective.

        Raises:
            Refused: on all ranks, when a cursor into the old rows means nothing in the new ones, or the ranks have different rows.
        """
        fingerprints = distributed.gather_objects(data.train.fingerprint)
        if strangers := [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]:
            raise Refused(f"Rank {strangers[0]} has other training data than rank 0.", where=_places(run), remedy="Give all hosts the same prepared data.")
        changes, refused = distributed.broadcast_object(_judge(run, data, found) if distributed.rank() == 0 else None)
        if refused is not None:
            raise refused
        return changes

    def first_row(self, found: tuple[Path, Manifest] | None) -> int:
        """Rows that were consumed before the order in force begins."""
        state = found[1].state if found else {}
        return state.get("rows" if self.appended else "first_row", 0)

    def passed(self, found: tuple[Path, Manifest] | None) -> list[list[int]]:
        """Rows that are left out; those that appended data came before mean other rows now."""
        state = found[1].state if found else {}
        return [pair for pair in state.get("passed", []) if not self.appended or pair[0] < state["rows"]]

    def accept(self, progress: Progress) -> None:
        """Begin a new epoch over appended data, and remember what is trained on from now."""
        if self.appended:
            progress.first_row = progress.rows
            progress.passed = [pair for pair in progress.passed if pair[0] < progress.rows]
            say(f"Going on with appended data: {self.appended}; a new epoch over all rows begins at row {progress.rows:,}.")
        if distributed.rank() == 0:
            if self.appended:
                ledger.append(self.run_dir, "appended", reason=self.appended, first_row=progress.first_row)
            files.write_json(self.run_dir / FILE, {"version": VERSION, "known": self.known})


def _judge(run: RunFile, data: RunData, found: tuple[Path, Manifest] | None) -> tuple[Changes | None, Refused | None]:
    """What changed, or why that is not accepted."""
    now = data.facts() if data.train.is_whole else {}
    known = {} if found is None else _known(run.run_path / FILE, found[1])
    known_now = known | ({data.train.fingerprint: now} if now else {})
    before = known.get(found[1].data_fingerprint) if found is not None else None
    if found is None or found[1].data_fingerprint == data.train.fingerprint and not (before and now and _other_bytes(before, now)):
        return Changes(run.run_path, known_now, ""), None
    difference = describe(before, now) if before and now else "what was recorded of them is not enough to say more"
    added = _appended(before, now) if before and now else ""
    if added and run.data.accept_appended:
        return Changes(run.run_path, known_now, added), None
    remedy = "Restore the data, or start a new run in another run_dir"
    return None, Refused(
        f"The checkpoint {found[0].name} was trained on other rows than there are now: {difference}.", where=f"{found[0]} and {_places(run)}",
        remedy=f"{remedy}; data.accept_appended=true goes on with all of them, from a new epoch." if added else f"{remedy}.",
    )


def _known(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What a run has recorded of its data; a record of before version 2 is taken for that of the checkpoint."""
    record = files.read_json(path) if path.is_file() else {}
    return record["known"] if record.get("version") == VERSION else {manifest.data_fingerprint: record}


def _places(run: RunFile) -> str:
    return ", ".join(spec.dir for spec in run.data.sets.values()) if run.data.sets else str(run.data.dir)


def _other_bytes(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a shard holds other bytes than it had under the same fingerprint."""
    same = [name for name in before.keys() & now.keys() if before[name]["fingerprint"] == now[name]["fingerprint"]]
    return any(before[name]["shards"] != now[name]["shards"] for name in same)


def _appended(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What was added, if the old shards of every set are all there as they were; else nothing."""
    told = []
    for name, old in before.items():
        new = now.get(name, {})
        kept = {"packing", "backend", "weight", "max_epochs"}
        if any(old.get(key) != new.get(key) for key in kept) or not old["shards"].items() <= new["shards"].items():
            return ""
        if more := len(new["shards"]) - len(old["shards"]):
            told.append(f"{more} shards and {new['rows'] - old['rows']:,} rows more in {name}")
    return ", ".join(told) if now.keys() == before.keys() else ""


def describe(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The difference between the facts of two attempts, in words."""
    told = [f"the set {name} is {'gone' if name in before else 'new'}" for name in sorted(before.keys() ^ now.keys())]
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name], now[name]
        for key in ("weight", "max_epochs", "backend", "packing"):
            if old.get(key) != new.get(key):
                told.append(f"{key} of {name} was {old.get(key)} and is {new.get(key)}")
        if old["rows"] != new["rows"]:
            told.append(f"{name} had {old['rows']:,} rows and has {new['rows']:,}")
        gone, added = old["shards"].keys() - new["shards"].keys(), new["shards"].keys() - old["shards"].keys()
        other = [shard for shard in sorted(old["shards"].keys() & new["shards"].keys()) if old["shards"][shard] != new["shards"][shard]]
        if other:
            told.append(f"{len(other)} of {len(old['shards'])} shards of {name} hold other bytes, the first is {other[0]}")
        if gone or added:
            told.append(f"{name} had {len(old['shards'])} shards and has {len(new['shards'])}")
        if old["fingerprint"] != new["fingerprint"] and not (other or gone or added):
            told.append(f"{name} was prepared from other sources or settings, with the same tokens")
    return "; ".join(told) or "the order of rows is another"
