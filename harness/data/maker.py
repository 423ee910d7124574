"""Two sets made of their groups of ranges: jobs for the workers, and then what makes a set of the shards."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import files
from harness.config.schema import RunFile
from harness.data import losses, records, workers
from harness.data.encode import ShardJob, SideJob, make_shard
from harness.data.examples import Unreadable, key_of, reader
from harness.data.order import shards_of_epoch
from harness.data.packing import Packing, plan_folder
from harness.data.plans import PlanSource, Summary
from harness.data.progress import Progress
from harness.data.ranges import InputRange
from harness.data.store import LocalStore
from harness.data.template import Template, start_ids
from harness.errors import Refused
from harness.formats.index import DRAFT, Draft, ShardEntry, ShardFile, ShardSetIndex, shard_name, write_index

HASHES_AT_ONCE = 16_000_000
SETS = ("train", "validation")
Group = tuple[InputRange, ...]


def set_fingerprint(base: str, backend: str, name: str) -> str:
    """That of one set, made by one backend."""
    return files.digest_text(base, backend, name)


@dataclass
class Made:
    """The shards of one set, in order, and what their processes reported."""

    groups: list[Group]
    parts: list[dict[str, Any]]

    @property
    def dropped(self) -> Counter[str]:
        """Rows left out, by cause."""
        return sum((Counter(part["dropped"]) for part in self.parts), Counter())

    def firsts(self, entries: list[ShardEntry]) -> dict[str, str]:
        """Of each kind of row that is worth a look, the first: file, row and what it is."""
        found: dict[str, str] = {}
        for part, entry in zip(self.parts, entries, strict=True):
            for kind, (record, text) in part.get("firsts", {}).items():
                file, row = entry.origin(record)
                found.setdefault(kind, f"{file}:{row + 1} {text}".rstrip())
        return found

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
        fingerprint: of sources and options.
        progress: show it.
    """

    def __init__(self, run: RunFile, folder: Path, tokenizer: Any, executor: Executor | None, *, fingerprint: str, progress: bool):
        self.run, self.folder, self.tokenizer, self.executor, self.progress = run, folder, tokenizer, executor, progress
        self.template = Template.from_run(run, tokenizer)
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
        self.base = fingerprint

    def make(self, train: list[Group], validation: list[Group] | None, backend: str) -> None:
        """Make both sets with one backend."""
        drafts = {}
        for name, groups in zip(SETS, (train, validation if validation is not None else train), strict=True):
            (self.folder / name / "parts").mkdir(parents=True, exist_ok=True)
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
        indexes = {name: self._index(made[name], drafts[name], name) for name in SETS}
        for name in SETS:
            self._refuse_emptiness(made[name], indexes[name], name)
            losses.refuse(self.run.data, name, indexes[name], self._plan(indexes[name], name))
        for name in SETS:
            self._finish(indexes[name], name)

    def _draft(self, name: str, backend: str, num_shards: int) -> Draft:
        tokenizer = self.tokenizer
        return Draft(
            fingerprint=set_fingerprint(self.base, backend, name), backend=backend, vocab_size=self.vocab_size, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            template=self.template.to_dict(), tokenizer=ShardFile.below(self.folder / "tokenizer"), num_shards=num_shards,
        )

    def _shards(self, groups: list[Group], backend: str, names: tuple[str, ...], **keys: Path) -> dict[str, Made]:
        """Make the shards of some sets, in the order in which the first epoch needs them."""
        jobs = [
            ShardJob(
                shard_name(number), group, self.run.data, self.run.train.seed,
                {name: SideJob(self.folder / name, set_fingerprint(self.base, backend, name)) for name in names},
                self.folder / "tokenizer", backend, self.template, [] if self.template.chat else start_ids(self.tokenizer),
                self.template.stop_ids(self.tokenizer), self.vocab_size > 65536, self.run.model.trust_code, **keys,
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

    def _refuse_emptiness(self, made: Made, index: ShardSetIndex, name: str) -> None:
        """Refuse a set of which nothing is trained, with what its source holds."""
        if sum(index.columns["trained_tokens"]) > 0:
            return
        data, told, remedy = self.run.data, losses.told(index.audit["dropped"]), "Check data.shape, data.columns and data.template"
        if data.validation is None:
            questions = len({key_of(example) for example in examples_of(made.groups, self.run)})
            what = "beginnings of texts" if data.shape == "text" else "questions"
            told = "; ".join([*([told] if told else []), f"distinct {what} in the source: {questions:,}, each of which stands in one set only"])
            remedy += (f", {'lower' if name == 'train' else 'raise'} data.validation_share" if questions > 1 else "") + ", or give data.validation a source of its own"
        detail, first = f" ({told})" if told else "", losses.first(index.audit["dropped"], index.audit)
        raise Refused(f"The {name} set has no row with a trained token{detail}.{first}", where=f"data.{name}", remedy=f"{remedy}.")

    def _index(self, made: Made, draft: Draft, name: str) -> ShardSetIndex:
        """What the index will say."""
        entries = _numbered([ShardEntry.model_validate(part["entry"]) for part in made.parts])
        broken = [place for part in made.parts for place in part["broken"]]
        worth_a_look = {"broken": broken[:20], "special": sum(part.get("special", 0) for part in made.parts), "firsts": made.firsts(entries)}
        audit = {"rows_in": made.rows_in, "dropped": dict(sorted(made.dropped.items())), "duplicates": _duplicates(self.folder / name / "parts", entries),
                 **{kind: found for kind, found in worth_a_look.items() if found}}
        return draft.index(entries, audit)

    def _plan(self, index: ShardSetIndex, name: str) -> Summary:
        """What the plans of all shards add up to, written beside them."""
        return PlanSource(LocalStore(self.folder / name), index, Packing.of(self.run.data), self.folder / name).make()

    def _finish(self, index: ShardSetIndex, name: str) -> None:
        """Write what makes a set of the shards, the index last, and take away what only preparing needed."""
        folder = self.folder / name
        _write_dataset_files(folder, index)
        wanted = {file.name for entry in index.shards for file in entry.files}
        for stale in folder.glob("shard-*"):
            if stale.name not in wanted:
                stale.unlink()
        for stale in folder.glob("rows-*"):
            if stale != plan_folder(folder, Packing.of(self.run.data), index.fingerprint):
                shutil.rmtree(stale)
        write_index(folder, index)


def examples_of(groups: list[Group], run: RunFile) -> Iterator[Any]:
    """All examples of a source, in order, read anew; what cannot be read is told when shards are made."""
    read = reader(run.data)
    for group in groups:
        for part in group:
            for record in records.read(part):
                try:
                    example = read(record) if isinstance(record, dict) else None
                except Unreadable:
                    continue
                if example is not None:
                    yield example


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


def _write_dataset_files(folder: Path, index: ShardSetIndex) -> None:
    """The two files with which `datasets.load_from_disk` opens the set in place."""
    import pyarrow as pa
    from datasets import DatasetInfo, Features

    with pa.memory_map(str(folder / f"{index.shards[0].name}.arrow")) as source:
        features = Features.from_arrow_schema(pa.ipc.open_stream(source).schema)
    files.write_json(folder / "state.json", {
        "_data_files": [{"filename": f"{entry.name}.arrow"} for entry in index.shards], "_fingerprint": index.fingerprint[:16], "_format_columns": None,
        "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None,
    })
    DatasetInfo(features=features).write_to_directory(str(folder))
