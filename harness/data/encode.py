"""One shard: the records of its ranges, given to a side, tokenised, and written as Arrow files with their arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from harness import collector, files
from harness.config.schema import Data
from harness.data import records
from harness.data.backends import open_backend
from harness.data.documents import Documents, Pending, save_array, write_arrow
from harness.data.examples import Unreadable, key_of, reader
from harness.data.packing import Packing, write_plan
from harness.data.ranges import InputRange
from harness.data.records import Broken
from harness.data.specials import OWN, Specials
from harness.data.template import Template
from harness.errors import Refused, first_line
from harness.formats import digest
from harness.formats.index import ShardEntry, ShardFile, ShardSource

EMPTY = "a part is empty or missing"
KNOWN = "its question is in the training set"
UNREADABLE = "cannot be read"
REFUSED = "refused by the chat template"
LONGEST_DOCUMENT = 1 << 20
"""So many characters of a text file are one document, about; a longer one goes on in another, without an end between them."""
BATCH_CHARACTERS = 4 << 20
"""So much text is tokenised at a time: little enough to be in the processor's cache still, and for its memory to be used again."""


@dataclass(frozen=True)
class SideJob:
    """What a shard gives to one set.

    Attributes:
        folder: of the set.
        fingerprint: of the set; a finished shard of the same fingerprint is kept.
    """

    folder: Path
    fingerprint: str

    def part(self, name: str) -> Path:
        """Where the shard's part of the index and audit is kept until the set is whole."""
        return self.folder / "parts" / f"{name}.json"


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to make one shard of each set that its records belong to.

    Attributes:
        name: such as shard-00000.
        parts: ranges of records, in order.
        data: the section of the run file.
        seed: of the run, which decides what is held out.
        sides: train, validation, or both: then `data.validation_share` of the questions goes to validation.
        tokenizer: folder of the tokenizer.
        backend: that tokenises.
        template: how examples become text.
        start: tokens before every text.
        ends: tokens that end an answer, the end of text first.
        wide: int32 instead of uint16 tokens.
        trust_code: run code that ships with the tokenizer.
        watch: uint64 array of questions; those that are met are reported.
        exclude: uint64 array of questions whose rows are left out.
    """

    name: str
    parts: tuple[InputRange, ...]
    data: Data
    seed: int
    sides: dict[str, SideJob]
    tokenizer: Path
    backend: str
    template: Template
    start: list[int]
    ends: list[int]
    wide: bool
    trust_code: bool = False
    watch: Path | None = None
    exclude: Path | None = None


@dataclass
class Side:
    """What a shard gives to one set, what was left out of it, and how many rows hold special tokens; of some kinds of rows the first, by its number."""

    pending: Pending = field(default_factory=Pending)
    made: list[Documents] = field(default_factory=list)
    rows_in: int = 0
    special: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, tuple[int, str]] = field(default_factory=dict)

    def note_special(self, records: Sequence[int]) -> None:
        """Count rows with special tokens of their own, given in order."""
        self.special += len(records)
        self.firsts.setdefault(OWN, (records[0], ""))


def make_shard(job: ShardJob) -> dict[str, dict[str, Any]]:
    """Write the shard's files, or find them finished; returns for each side its part of the index and audit.

    Raises:
        Refused: a record that cannot be read, where it may not be dropped.
        Differs: when the fast backend disagrees with `tokenizers`.
    """
    if (done := _finished(job)) is not None:
        return done
    with nullcontext() if job.template.chat else collector.off():  # chat templates leave cycles behind
        return _made(job)


def _made(job: ShardJob) -> dict[str, dict[str, Any]]:
    gathering, counts = _gather(job)
    results = {}
    for which, side in gathering.sides.items():
        documents, where = Documents.join(side.made), job.sides[which]
        entry = write_shard(where.folder, job, where.fingerprint, documents, counts)
        save_array(where.part(job.name).with_suffix(".identities.npy"), np.sort(documents.identities))
        results[which] = {
            "fingerprint": where.fingerprint, "entry": entry.model_dump(), "rows_in": side.rows_in, "dropped": dict(side.dropped), "special": side.special, "firsts": side.firsts,
            "broken": gathering.broken if side is gathering.first else [], "met": sorted(gathering.met),
        }
    for which, result in results.items():
        files.write_json(job.sides[which].part(job.name), result)
    return results


def _finished(job: ShardJob) -> dict[str, dict[str, Any]] | None:
    found = {}
    for which, side in job.sides.items():
        part = side.part(job.name)
        done = files.read_json(part) if part.is_file() else None
        if done is None or done["fingerprint"] != side.fingerprint:
            return None
        for file in ShardEntry.model_validate(done["entry"]).files:
            path = side.folder / file.name
            if not path.is_file() or digest.of_file(path) != file.digest:
                return None
        found[which] = done
    return found


@lru_cache(maxsize=1)
def _chat_tokenizer(folder: Path, *, trust_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_code)


def held_out(seed: int, share: float, key: int) -> bool:
    """Whether the share of the training source that is kept for validation holds the question `key`."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{key}".encode()) < share * 2**64


class _Gathering:
    """The records of a job on their way to a side, and to tokens."""

    def __init__(self, job: ShardJob):
        self.job, self.sides, self.backend = job, {which: Side() for which in job.sides}, open_backend(job.tokenizer, job.backend)
        self.read, self.characters = reader(job.data), 0
        self.specials = Specials(self.backend, job.template, job.ends)
        self.first, self.splits = next(iter(self.sides.values())), len(self.sides) > 1
        self.exclude = frozenset(np.load(job.exclude).tolist() if job.exclude else ())
        self.watched = frozenset(np.load(job.watch).tolist() if job.watch else ())
        self.met: set[int] = set()
        self.broken: list[str] = []
        self.open: Side | None = None  # whose last document the next piece of a text file goes on with
        self.room = 0
        self.tokenizer = _chat_tokenizer(job.tokenizer, trust_code=job.trust_code) if job.template.chat else None

    def add(self, record: Any, number: int, *, is_piece: bool) -> None:
        """Give a record, or a piece of a text file, to a side, or count why it is left out.

        Raises:
            Unreadable: when it holds values that cannot be read.
        """
        example = self.read(record)
        if example is None:
            self.leave_out(self.first, EMPTY)
            return
        key = key_of(example)
        side = self.sides["validation"] if self.splits and held_out(self.job.seed, self.job.data.validation_share, key) else self.first
        if key in self.watched:
            self.met.add(key)
        if key in self.exclude:
            self.leave_out(side, KNOWN)
            return
        try:
            segments = self.job.template.segments(example, self.tokenizer)
        except Exception as error:  # a chat template may refuse a conversation
            self.leave_out(side, REFUSED)
            side.firsts.setdefault(REFUSED, (number, first_line(error)))
            return
        side.rows_in += 1
        if self.tokenizer is not None and self.specials.in_conversation(example):
            side.note_special([number])
        if self.open is not side or self.room <= 0:
            self._begin(side, number)
        pending = side.pending
        for text, trained in segments:
            pending.texts.append(text)
            pending.trained.append(trained)
            self.characters += len(text)
            self.room -= len(text)
        pending.segments[-1] += len(segments)
        if is_piece:
            self.open = side
            pending.open.append(len(pending.texts) - 1)

    def _begin(self, side: Side, number: int) -> None:
        """Begin a document; all before it are whole, and tokenised once they are many."""
        self.open, self.room = None, LONGEST_DOCUMENT
        if self.characters >= BATCH_CHARACTERS:
            self.tokenise()
        side.pending.segments.append(0)
        side.pending.records.append(number)

    def end(self) -> None:
        """A file ends, and with it the document that its last piece belongs to."""
        if self.open is not None:
            self.open.pending.open.pop()
            self.open = None

    def tokenise(self) -> None:
        """Make documents of what is pending."""
        job, begin = self.job, 0
        texts = [text for side in self.sides.values() for text in side.pending.texts]
        if self.backend.leads is None:
            ids, offsets = self.backend.encode(texts)
        else:
            ids, offsets = self.backend.encode_amid(texts, [text for side in self.sides.values() for text in side.pending.before()])
        for side in self.sides.values():
            own = offsets[begin : begin + len(side.pending.texts) + 1]
            begin += len(side.pending.texts)
            if self.tokenizer is None and len(found := self.specials.in_segments(ids[own[0] : own[-1]], own - own[0], np.asarray(side.pending.trained, bool))):
                side.note_special(side.pending.records_of(found))
            documents, lost = Documents.assemble(ids[own[0] : own[-1]], own - own[0], side.pending, start=job.start, ends=job.ends, wide=job.wide)
            side.made.append(documents)
            if lost:
                side.dropped["no trained token"] += lost
            side.pending = Pending()
        self.characters = 0

    def leave_out(self, side: Side, cause: str) -> None:
        """Count a row that is dropped."""
        self.open = None
        side.rows_in += 1
        side.dropped[cause] += 1

    def unreadable(self, record: Broken, part: InputRange) -> None:
        """Refuse a record that cannot be read, or count it where the run file says so."""
        if self.job.data.broken_rows == "refuse":
            what = "line" if part.kind in records.LINES else "row"
            raise Refused(f"{part.shown} {what} {record.line} {record.reason}.", where=f"{part.shown}:{record.line} ({part.key}.path)",
                          remedy=f"Mend or remove the {what}, or set data.broken_rows=drop to count such rows instead.")
        self.broken.append(f"{part.shown}:{record.line} {record.reason}")
        self.leave_out(self.first, UNREADABLE)


def _gather(job: ShardJob) -> tuple[_Gathering, list[int]]:
    """The documents of each side, and how many records each range holds."""
    gathering, counts, number = _Gathering(job), [], 0
    for part in job.parts:
        before = number
        for record in records.read(part):
            if isinstance(record, Broken):
                gathering.unreadable(record, part)
            elif record is not None:
                try:
                    gathering.add(record, number, is_piece=part.kind == "text")
                except Unreadable as error:
                    gathering.unreadable(Broken(records.line_of(part, number - before), str(error)), part)
            number += 1
        if part.ends:
            gathering.end()
        counts.append(number - before)
    gathering.tokenise()
    return gathering, counts


def write_shard(folder: Path, job: ShardJob, fingerprint: str, documents: Documents, counts: list[int]) -> ShardEntry:
    """The files of the shard: an Arrow file, and the arrays from which packing and provenance are computed without it."""
    path = folder / f"{job.name}.arrow"
    write_arrow(path, documents, wide=job.wide)
    arrays = {"lengths": documents.lengths, "spans": documents.spans, "records": documents.records}
    for what, array in arrays.items():
        save_array(folder / f"{job.name}.{what}.npy", array)
    write_plan(folder, job.name, documents.lengths, documents.spans, Packing.of(job.data), fingerprint=fingerprint)
    spans = documents.spans
    return ShardEntry(
        name=job.name, rows=len(documents.lengths), tokens=int(documents.lengths.sum(dtype=np.int64)),
        trained_tokens=int((spans[:, 2] - np.maximum(spans[:, 1], 1)).sum()),
        files=[ShardFile.of(folder / f"{job.name}.{suffix}") for suffix in ("arrow", *(f"{what}.npy" for what in arrays))],
        sources=[ShardSource(file=part.shown, rows=count) for part, count in zip(job.parts, counts, strict=True)],
    )
