"""Training that begins while its data are still being prepared: a process of its own makes the shards in training's order."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from harness import files
from harness.config.schema import RunFile
from harness.data import sources
from harness.data.fetch import never
from harness.data.lazy import lazy
from harness.data.order import VERSION as ORDER_VERSION
from harness.data.order import Order
from harness.data.maker import set_fingerprint
from harness.data.prepare import fingerprint
from harness.data.packing import Packing, Plan, plan_folder
from harness.data.plans import Summary
from harness.data.rows import OPEN_SHARDS, OpenShard, RowTable
from harness.data.store import LocalStore
from harness.errors import Failure, Refused
from harness.formats.index import DRAFT, NAME, Draft, ShardEntry, ShardSetIndex, read_index, shard_name

POLL_S = 0.1
WORTH_BYTES = 64 << 20
FAILED, LOG, RUN = "failed.json", "prepare.log", ".run.yaml"


def worth_it(run: RunFile) -> bool:
    """Whether training can begin before all is prepared, and would gain by it: much text that can be cut at once, a length in steps."""
    source, optimizer = run.data.train, run.optimizer
    if source is None or source.path is None or run.train.steps is None or optimizer.warmup_epochs is not None or run.data.train_tokenizer is not None:
        return False
    paths = sources.source_paths(source, key="data.train")
    return sum(path.stat().st_size for path in paths) > WORTH_BYTES and not any(path.suffix in sources.COMPRESSED for path in paths)


def start(run: RunFile) -> None:
    """Prepare in a process of its own, at low priority, and wait until what is known beforehand is written.

    Raises:
        Refused: what the preparation found wrong by then.
    """
    folder = Path(str(run.data.dir))
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation"):
        (folder / name / NAME).unlink(missing_ok=True)
        if not _is_of(folder / name / DRAFT, run, name):
            (folder / name / DRAFT).unlink(missing_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    files.write_text(folder / RUN, yaml.safe_dump(run.model_dump(mode="json"), allow_unicode=True))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_", "PMI_", "PMIX_", "MPI_"))}
    with open(folder / LOG, "wb") as log:
        child = subprocess.Popen([sys.executable, "-m", "harness", "prepare", str(folder / RUN)], stdout=log, stderr=subprocess.STDOUT, env=environment,
                                 preexec_fn=lambda: os.nice(10))
    threading.Thread(target=_watch, args=(child, folder), name="harness-prepare", daemon=True).start()
    for name in ("train", "validation"):
        wait_for(lambda name=name: (folder / name / DRAFT).is_file() or (folder / name / NAME).is_file(), folder)


def _is_of(draft: Path, run: RunFile, name: str) -> bool:
    """Whether a draft, which another process may be filling, is that of this run file."""
    if not draft.is_file():
        return False
    found = Draft.model_validate(files.read_json(draft))
    return found.fingerprint == set_fingerprint(fingerprint(run), found.backend, name)


def _watch(child: subprocess.Popen[bytes], folder: Path) -> None:
    code = child.wait()
    (folder / RUN).unlink(missing_ok=True)
    if code:
        said = (folder / LOG).read_text(errors="replace")
        text = said.rpartition("harness: ")[2].strip() if "harness: " in said else f"it ended with code {code}; {folder / LOG} has its last words"
        files.write_json(folder / FAILED, {"code": code, "text": text})


def wait_for(there: Callable[[], bool], folder: Path, given_up: Callable[[], bool] = never) -> None:
    """Wait until something is prepared.

    Raises:
        Refused: when the preparation found something that the user can mend.
        Failure: when it ended otherwise, or what is waited for is given up.
    """
    while not there():
        if given_up():
            raise Failure(f"{folder} was closed while it was being prepared.")
        if (folder / FAILED).is_file():
            failed = files.read_json(folder / FAILED)
            if failed["code"] == Refused.exit_code:
                raise Refused(failed["text"])
            raise Failure(f"The preparation of the data failed: {failed['text']}")
        time.sleep(POLL_S)


def growing(folder: Path, packing: Packing) -> RowTable | None:
    """The rows of a set that is being prepared; None where none is."""
    path = folder / DRAFT
    if not path.is_file() or read_index(folder) is not None:
        return None
    return GrowingTable(folder, Draft.model_validate(files.read_json(path)), packing)


class GrowingTable(RowTable):
    """The rows of a set whose shards come into being; whatever is not there yet is waited for.

    Args:
        folder: of the set.
        draft: what is known of it.
        packing: how documents become rows, the one that is planned while the shards are made.
    """

    def __init__(self, folder: Path, draft: Draft, packing: Packing):
        known: dict[str, Any] = {"store": LocalStore(folder), "packing": packing, "open_shards": OPEN_SHARDS, "_open": OrderedDict(), "_coming": []}
        self.__dict__.update(known, folder=folder, draft=draft, given_up=never)

    def __repr__(self) -> str:
        return f"GrowingTable({self.folder})"

    @property
    def is_whole(self) -> bool:
        """Whether all shards are there."""
        return (self.folder / NAME).is_file()

    @lazy
    def index(self) -> ShardSetIndex:
        """Of the whole set."""
        return self._whole.index

    @lazy
    def summary(self) -> Summary:
        """Of the whole set."""
        return self._whole.summary

    @lazy
    def _whole(self) -> RowTable:
        wait_for(lambda: self.is_whole, self.folder.parent, self.given_up)
        return RowTable.build(self.folder, self.packing)

    @property
    def template(self) -> dict[str, Any]:
        """How examples became text."""
        return self.draft.template

    @property
    def vocab_size(self) -> int:
        """Largest token id that the tokenizer can give, plus one."""
        return self.draft.vocab_size

    @property
    def pad_token_id(self) -> int:
        """What stands where nothing is."""
        return self.draft.pad_token_id

    @property
    def fingerprint(self) -> str:
        """That of the whole set."""
        return files.digest_text(self.packing.fingerprint(self.draft.fingerprint), str(ORDER_VERSION))

    @property
    def may_wait(self) -> bool:
        """Rows are waited for until they are prepared."""
        return not self.is_whole

    def heed(self, given_up: Callable[[], bool]) -> None:
        """Let a wait for what is not prepared yet end with a Failure when `given_up` says so."""
        self.__dict__["given_up"] = given_up

    @property
    def num_shards(self) -> int:
        """Shards of the whole set."""
        return self.draft.num_shards

    def order(self, *, seed: int, window_shards: int) -> Order:
        """The order of the whole set."""
        return Order(self.num_shards, lambda number: self.shard(number).plan.num_rows, seed, window_shards)

    def _opened(self, number: int) -> OpenShard:
        name = shard_name(number)
        part = self.folder / "parts" / f"{name}.json"
        wait_for(lambda: part.is_file() or self.is_whole, self.folder.parent, self.given_up)
        try:
            done = files.read_json(part)
        except FileNotFoundError:  # all was finished meanwhile
            entry = self.index.shards[number]
        else:
            if done["fingerprint"] != self.draft.fingerprint:
                raise Failure("The data were prepared anew while training had begun.\n  remedy: Start a new run in another run_dir.")
            entry = ShardEntry.model_validate(done["entry"])
        return OpenShard(self.store, entry, Plan.open(plan_folder(self.folder, self.packing, self.draft.fingerprint) / f"{name}.npy"), [])
