"""Raw sources -> two sets of token shards; finished work is kept, and the bytes do not depend on who made them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import files
from harness.config.schema import RunFile
from harness.data import backends, builtin, ranges, sources, workers
from harness.data.audit import Audit, sample_rows
from harness.data.bpe import train_bpe
from harness.data.encode import KNOWN, ShardJob, SideJob, held_out, make_shard
from harness.data.examples import example_of, key_of
from harness.data.order import shards_of_epoch
from harness.data.progress import Progress
from harness.data.ranges import InputRange
from harness.data.rows import Packing, PlanSource, RowTable, plan_folder
from harness.data.store import LocalStore
from harness.data.template import VERSION as TEMPLATE_VERSION
from harness.data.template import Template, start_ids
from harness.errors import Failure, Refused
from harness.formats.index import DRAFT, VERSION, Draft, ShardEntry, ShardFile, ShardSetIndex, read_index, shard_name, write_index
from harness.formats.index import NAME as INDEX
from harness.log import say

SHARD_TEXT_BYTES = 16 << 20
"""About so much text goes into a shard; few enough bytes that training can start on the first ones, and that a window of them fits into memory."""
ALONE_BYTES = 256 << 20
"""Less text than this is done sooner in one process, whose tokenizer uses all cores, than processes start."""
HASHES_AT_ONCE = 16_000_000
SETS = ("train", "validation")
Group = tuple[InputRange, ...]


def fingerprint(run: RunFile) -> str:
    """What identifies both sets of a run: sources, tokenizer, template and every option that changes a byte, but for the backend."""
    data, known = run.data, Path(run.data.dir) / ".digests.json"
    parts = [str(VERSION), str(TEMPLATE_VERSION), data.shape, json.dumps(data.columns.model_dump()), json.dumps(data.template.model_dump()), data.broken_rows, str(SHARD_TEXT_BYTES)]
    parts.append(sources.source_digest(data.train, key="data.train", known=known) + str(data.train.max_rows))
    if data.validation is not None:
        parts.append(sources.source_digest(data.validation, key="data.validation", known=known) + str(data.validation.max_rows))
    else:
        parts.append(f"share {data.validation_share} seed {run.train.seed}")
    parts.append(f"bpe {data.train_tokenizer.vocab_size}" if data.train_tokenizer else _tokenizer_digest(data.tokenizer or run.model.path))
    return files.digest_text(*parts)


def set_fingerprint(base: str, backend: str, name: str) -> str:
    """That of one set, made by one backend."""
    return files.digest_text(base, backend, name)


def _tokenizer_digest(name: str | None) -> str:
    folder = Path(str(name))
    if not folder.is_dir():
        return f"hub {name}"
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".model", ".jinja") and p.name not in ("config.json", "generation_config.json", "harness.json"))
    return files.digest_text(*(f"{p.name} {files.digest_file(p)}" for p in names))


def prepared_index(run: RunFile) -> ShardSetIndex | None:
    """The index of the training set when both sets are there and fit the run file; None when they must be made."""
    indexes = [read_index(Path(run.data.dir) / name) for name in SETS]
    if any(index is None for index in indexes):
        return None
    wanted = fingerprint(run)
    fits = all(index.fingerprint == set_fingerprint(wanted, index.backend, name) for index, name in zip(indexes, SETS, strict=True) if index)
    return indexes[0] if fits else None


def prepare(run: RunFile, *, progress: bool = True, executor: Executor | None = None) -> Audit:
    """Make both sets, or find them made.

    Args:
        run: the run file.
        progress: show it.
        executor: workers that share this file system, such as the ranks of an MPI job; by default processes of this machine.

    Returns:
        the audit, to render.

    Raises:
        Refused: whatever is wrong with a source, the tokenizer or the rows.
    """
    folder = Path(run.data.dir)
    tokenizer = None
    if prepared_index(run) is None or (_parts(folder) and os.access(folder, os.W_OK)):
        with _alone(folder):
            if prepared_index(run) is None:
                tokenizer = _make(run, folder, progress=progress, executor=executor)
            _tidy(folder)
    return Audit(folder, {name: RowTable.of_run(run, name) for name in SETS}, sample_rows(folder / "train", tokenizer, count=3))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for another process that prepares the same folder; the kernel lets go of the lock of one that dies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}.", where="data.dir", remedy="Set `data.dir` to another place.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"Another process prepares {folder}; waiting for it ...")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(run: RunFile, folder: Path, *, progress: bool, executor: Executor | None) -> Any:
    """Make both sets; returns the tokenizer, which takes long to load."""
    cache = folder / ".sources"
    try:
        return _make_sets(run, folder, cache, progress=progress, executor=executor)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _parts(folder: Path) -> list[Path]:
    """What is there of unfinished sets."""
    return [where for name in SETS if (where := folder / name / "parts").is_dir()]


def _tidy(folder: Path) -> None:
    """Take away what only preparing needed, and what killed preparations left half written; the parts last, by which this is known to be due."""
    parts = _parts(folder)
    if not parts:
        return
    shutil.rmtree(folder / ".sources", ignore_errors=True)
    for pattern in (".*.tmp", "*/.*.tmp", "*/rows-*/.*"):
        for aside in folder.glob(pattern):
            aside.unlink(missing_ok=True)
    for where in parts:
        shutil.rmtree(where, ignore_errors=True)


def _make_sets(run: RunFile, folder: Path, cache: Path, *, progress: bool, executor: Executor | None) -> Any:
    data, size = run.data, SHARD_TEXT_BYTES
    train = sources.open_source(data.train, data, key="data.train", cache=cache, size=size)
    validation = sources.open_source(data.validation, data, key="data.validation", cache=cache, size=size) if data.validation else None
    tokenizer = _save_tokenizer(run, folder / "tokenizer", train)
    backend = backends.choose(folder / "tokenizer")
    text_bytes = sum(part.size for group in [*train, *(validation or ())] for part in group)
    processes = data.num_processes or (1 if text_bytes <= ALONE_BYTES else workers.cores())
    with nullcontext(executor) if executor is not None else workers.local_executor(min(processes, len(train))) as pool:
        maker = Maker(run, folder, tokenizer, pool, progress=progress)
        try:
            maker.make(train, validation, backend)
        except backends.Differs as difference:
            say(f"fastokens and tokenizers read {str(difference)[:60]!r} differently; all is made anew with tokenizers.")
            maker.make(train, validation, backends.ORACLE)
        except BrokenProcessPool:
            raise Failure("A process that prepares the data was killed, often for want of memory; start again, and finished shards are kept "
                          "(fewer processes: data.num_processes).") from None
    return tokenizer


@dataclass
class Made:
    """The shards of one set, in order, and what their processes reported."""

    groups: list[Group]
    parts: list[dict[str, Any]]

    @property
    def dropped(self) -> Counter[str]:
        """Rows left out, by cause."""
        return sum((Counter(part["dropped"]) for part in self.parts), Counter())

    @property
    def rows_in(self) -> int:
        """Rows of the source."""
        return sum(part["rows_in"] for part in self.parts)


class Maker:
    """What all shards of a run's sets are made with.

    Args:
        run: the run file.
        folder: of both sets.
        tokenizer: as transformers loaded it.
        executor: workers, or None for this process.
        progress: show it.
    """

    def __init__(self, run: RunFile, folder: Path, tokenizer: Any, executor: Executor | None, *, progress: bool):
        self.run, self.folder, self.tokenizer, self.executor, self.progress = run, folder, tokenizer, executor, progress
        self.template = Template.from_run(run, tokenizer)
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
        self.base = fingerprint(run)

    def make(self, train: list[Group], validation: list[Group] | None, backend: str) -> None:
        """Make both sets with one backend."""
        drafts = {}
        for name, groups in zip(SETS, (train, validation if validation is not None else train), strict=True):
            (self.folder / name / "parts").mkdir(parents=True, exist_ok=True)
            (self.folder / name / INDEX).unlink(missing_ok=True)
            drafts[name] = self._draft(name, backend, len(groups))
            files.write_json(self.folder / name / DRAFT, drafts[name].model_dump())
        if validation is None:
            made = self._shards(train, backend, SETS)
        else:
            watch = self._questions(validation)
            made = self._shards(train, backend, ("train",), watch=watch)
            exclude = self.folder / "validation" / "parts" / "met.npy"
            np.save(exclude, np.asarray(sorted({key for part in made["train"].parts for key in part["met"]}), np.uint64))
            made |= self._shards(validation, backend, ("validation",), exclude=exclude)
        for name in SETS:
            self._refuse_losses(made[name], name)
        for name in SETS:
            self._finish(made[name], drafts[name], name)

    def _draft(self, name: str, backend: str, num_shards: int) -> Draft:
        tokenizer = self.tokenizer
        return Draft(
            fingerprint=set_fingerprint(self.base, backend, name), backend=backend, vocab_size=self.vocab_size, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            template=self.template.to_dict(), tokenizer=[ShardFile.of(path) for path in sorted((self.folder / "tokenizer").iterdir())], num_shards=num_shards,
        )

    def _shards(self, groups: list[Group], backend: str, names: tuple[str, ...], **keys: Path) -> dict[str, Made]:
        """Make the shards of some sets, in the order in which the first epoch needs them."""
        jobs = [
            ShardJob(
                shard_name(number), group, self.run.data, self.run.train.seed,
                {name: SideJob(self.folder / name, set_fingerprint(self.base, backend, name)) for name in names},
                self.folder / "tokenizer", backend, self.template, [] if self.template.chat else start_ids(self.tokenizer),
                self.template.stop_ids(self.tokenizer), self.vocab_size > 65536, **keys,
            )
            for number, group in enumerate(groups)
        ]
        turns = shards_of_epoch(len(jobs), seed=self.run.train.seed, epoch=0).tolist()
        done: dict[int, dict[str, dict[str, Any]]] = {}
        with Progress(len(jobs), f"tokenising {' and '.join(names)}", shown=self.progress) as progress:
            for turn, result in workers.results(self.executor, make_shard, [jobs[number] for number in turns]):
                done[turns[turn]] = result
                progress.advance(sum(part["entry"]["tokens"] for part in result.values()))
        return {name: Made(groups, [done[number][name] for number in range(len(jobs))]) for name in names}

    def _questions(self, groups: list[Group]) -> Path:
        """The validation questions, which must not be trained on."""
        path = self.folder / "validation" / "parts" / "questions.npy"
        np.save(path, np.unique(np.fromiter((key_of(example) for example in examples_of(groups, self.run)), np.uint64)))
        return path

    def _refuse_losses(self, made: Made, name: str) -> None:
        causes = ", ".join(f"{count} because {cause}" for cause, count in made.dropped.most_common())
        if sum(part["entry"]["trained_tokens"] for part in made.parts) == 0:
            detail = f" ({causes})" if causes else ""
            raise Refused(f"The {name} set has no row with a trained token{detail}.", where=f"data.{name}",
                          remedy="Check data.shape, data.columns and data.template" + (", or raise data.validation_share." if name == "validation" else "."))
        lost = made.dropped.total() - made.dropped[KNOWN]
        if made.rows_in and lost / made.rows_in > self.run.data.max_dropped_share:
            first = next((f" The first that cannot be read: {place}." for part in made.parts for place in part["broken"]), "")
            raise Refused(f"{lost} of {made.rows_in} rows of the {name} set would be dropped: {causes}.{first}", where=f"data.{name}",
                          remedy="Mend the rows, or raise data.max_dropped_share.")

    def _finish(self, made: Made, draft: Draft, name: str) -> None:
        """Write what makes a set of the shards, the index last, and take away what only preparing needed."""
        folder = self.folder / name
        entries = _numbered([ShardEntry.model_validate(part["entry"]) for part in made.parts])
        broken = [place for part in made.parts for place in part["broken"]]
        audit = {"rows_in": made.rows_in, "dropped": dict(sorted(made.dropped.items())), "duplicates": _duplicates(folder / "parts", entries),
                 **({"broken": broken[:20]} if broken else {})}
        index = draft.index(entries, audit)
        _write_dataset_files(folder, entries, index.fingerprint)
        wanted = {file.name for entry in entries for file in entry.files}
        for stale in folder.glob("shard-*"):
            if stale.name not in wanted:
                stale.unlink()
        packing = Packing.of(self.run.data)
        for stale in folder.glob("rows-*"):
            if stale != plan_folder(folder, packing, index.fingerprint):
                shutil.rmtree(stale)
        PlanSource(LocalStore(folder), index, packing, folder).make()
        write_index(folder, index)


def examples_of(groups: list[Group], run: RunFile) -> Iterator[Any]:
    """All examples of a source, in order, read anew."""
    for group in groups:
        for part in group:
            for record in ranges.read(part):
                if isinstance(record, dict) and (example := example_of(record, run.data)) is not None:
                    yield example


def held_out_questions(run: RunFile, *, count: int) -> list[str]:
    """Some of the built-in questions that a run does not train on."""
    questions = [q for q, answer in builtin.python_questions() if held_out(run.train.seed, run.data.validation_share, key_of((q, answer)))]
    return questions[:: max(1, len(questions) // count)][:count]


def _save_tokenizer(run: RunFile, folder: Path, train: list[Group]) -> Any:
    from transformers import AutoTokenizer

    data = run.data
    if data.train_tokenizer is not None:
        plain = Template.from_run(run, None) if data.shape != "messages" else Template("messages", "turns")
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier tokenizer had, such as a chat template, is not this one's
        trained = (example for example in examples_of(train, run) if data.validation or not held_out(run.train.seed, data.validation_share, key_of(example)))
        train_bpe(("".join(text for text, _ in plain.segments(example, None)) for example in trained), vocab_size=data.train_tokenizer.vocab_size, folder=folder)
        return AutoTokenizer.from_pretrained(folder)
    name = data.tokenizer or run.model.path
    where = "data.tokenizer" if data.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=run.model.trust_code)
    except Exception as error:
        raise Refused(f"There is no tokenizer in {name!r}: {str(error).splitlines()[0][:200]}", where=where,
                      remedy="Name a Hugging Face folder with a tokenizer, or train one with data.train_tokenizer.") from None
    if not tokenizer.is_fast:
        raise Refused(f"The tokenizer of {name!r} is not a fast one.", where=where, remedy="Use a tokenizer that has a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise Refused(f"The tokenizer of {name!r} has no end-of-text token, so answers could never stop.", where=where, remedy="Set its eos_token.")
    if not (folder.exists() and Path(name).exists() and folder.samefile(name)):
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _numbered(entries: list[ShardEntry]) -> list[ShardEntry]:
    """With the row of its file at which each range begins, known once all ranges before it were read."""
    seen: Counter[str] = Counter()
    numbered = []
    for entry in entries:
        placed = []
        for source in entry.sources:
            placed.append(source.model_copy(update={"first_row": seen[source.file]}))
            seen[source.file] += source.rows
        numbered.append(entry.model_copy(update={"sources": placed}))
    return numbered


def _duplicates(parts: Path, entries: list[ShardEntry]) -> int:
    """Rows whose example stood in an earlier row; hashes are compared a part of their range at a time, so that memory stays bounded."""
    arrays = [np.load(parts / f"{entry.name}.identities.npy", mmap_mode="r") for entry in entries]
    portions = 1 + sum(len(array) for array in arrays) // HASHES_AT_ONCE
    edges = [(2**64 * portion // portions) for portion in range(portions)]
    found = 0
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        chosen = [array[np.searchsorted(array, np.uint64(low)) : None if high is None else np.searchsorted(array, np.uint64(high))] for array in arrays]
        hashes = np.concatenate(chosen)
        found += len(hashes) - len(np.unique(hashes))
    return found


def _write_dataset_files(folder: Path, entries: list[ShardEntry], fingerprint: str) -> None:
    """The two files with which `datasets.load_from_disk` opens the set in place."""
    import pyarrow as pa
    from datasets import DatasetInfo, Features

    with pa.memory_map(str(folder / f"{entries[0].name}.arrow")) as source:
        features = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
    files.write_json(folder / "state.json", {
        "_data_files": [{"filename": f"{entry.name}.arrow"} for entry in entries], "_fingerprint": fingerprint[:16], "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    })
    DatasetInfo(features=features).write_to_directory(str(folder))
