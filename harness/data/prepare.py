"""Raw sources -> two sets of token shards; finished work is reused, and the bytes do not depend on the processes."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import files
from harness.config.schema import RunFile
from harness.data import builtin, sources
from harness.data.audit import Audit, sample_rows
from harness.data.bpe import train_bpe
from harness.data.encode import ShardJob, make_shard
from harness.data.rows import RowTable
from harness.data.template import Template
from harness.errors import Refused
from harness.formats.index import VERSION, ShardEntry, ShardSetIndex, read_index, write_index

if TYPE_CHECKING:
    from datasets import Dataset

SHARD_TEXT_BYTES = 64 << 20
SMALL_TEXT_BYTES = 4 << 20
SETS = ("train", "validation")
BACKEND = "tokenizers"


@dataclass
class Split:
    """The examples of one set, in the order of the source, and what was left out of it."""

    examples: list[Any]
    rows_in: int
    dropped: Counter[str]
    duplicates: int


def fingerprint(run: RunFile) -> str:
    """What identifies both sets of a run: sources, tokenizer, template and every option that changes a byte."""
    data = run.data
    parts = [str(VERSION), BACKEND, data.shape, json.dumps(data.columns.model_dump()), json.dumps(data.template.model_dump())]
    parts.append(sources.source_digest(data.train, key="data.train") + str(data.train.max_rows))
    if data.validation is not None:
        parts.append(sources.source_digest(data.validation, key="data.validation") + str(data.validation.max_rows))
    else:
        parts.append(f"share {data.validation_share} seed {run.train.seed}")
    parts.append(f"bpe {data.train_tokenizer.vocab_size}" if data.train_tokenizer else _tokenizer_digest(data.tokenizer or run.model.path))
    return files.digest_text(*parts)


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
    return indexes[0] if all(index.fingerprint == f"{wanted}-{name}" for index, name in zip(indexes, SETS, strict=True) if index) else None


def prepare(run: RunFile, *, progress: bool = True) -> Audit:
    """Make both sets, or find them made.

    Args:
        run: the run file.
        progress: show it.

    Returns:
        the audit, to render.

    Raises:
        Refused: whatever is wrong with a source, the tokenizer or the rows.
    """
    folder = Path(run.data.dir)
    if prepared_index(run) is None:
        _make(run, folder, progress=progress)
    return Audit(folder, {name: RowTable.of_run(run, name) for name in SETS}, sample_rows(folder / "train", count=3))


def _make(run: RunFile, folder: Path, *, progress: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be written: {error.strerror}.", where="data.dir", remedy="Set `data.dir` to another place.") from None
    cache = folder / ".sources"
    try:
        _make_sets(run, folder, cache, progress=progress)
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _make_sets(run: RunFile, folder: Path, cache: Path, *, progress: bool) -> None:
    wanted, data = fingerprint(run), run.data
    train_table = sources.open_source(data.train, data, key="data.train", cache=cache)
    validation_table = sources.open_source(data.validation, data, key="data.validation", cache=cache) if data.validation else None
    splits = _split(run, train_table, validation_table)
    tokenizer = _save_tokenizer(run, folder / "tokenizer", splits["train"].examples)
    template = Template.from_run(run, tokenizer)
    for name in SETS:
        _make_set(folder / name, splits[name], run, tokenizer, template, fingerprint=f"{wanted}-{name}", progress=progress)


def held_out(run: RunFile, key: str) -> bool:
    """Whether the share of the training source that is kept for validation holds the question `key`."""
    return int(files.digest_text(str(run.train.seed), key)[:8], 16) < int(run.data.validation_share * 2**32)


def held_out_questions(run: RunFile, *, count: int) -> list[str]:
    """Some of the built-in questions that a run does not train on."""
    questions = [question for question, answer in builtin.python_questions() if held_out(run, sources.key_of((question, answer)))]
    return questions[:: max(1, len(questions) // count)][:count]


def _split(run: RunFile, train: Dataset, validation: Dataset | None) -> dict[str, Split]:
    """Give each example to one side by its question, so that none stands on both."""
    parts = {name: Split([], 0, Counter(), 0) for name in SETS}
    seen: dict[str, set[str]] = {name: set() for name in SETS}
    def add(name: str, example: Any, key: str) -> None:
        part = parts[name]
        identity = files.digest_text(json.dumps(example, ensure_ascii=False, sort_keys=True))
        part.duplicates += identity in seen[name]
        seen[name].add(identity)
        part.examples.append(example)
        train_keys.add(key) if name == "train" else None

    train_keys: set[str] = set()
    for row in train:
        example = sources.example_of(row, run.data)
        key = sources.key_of(example) if example is not None else ""
        name = "validation" if validation is None and held_out(run, key) else "train"
        parts[name].rows_in += 1
        if example is None:
            parts[name].dropped["a part is empty or missing"] += 1
        else:
            add(name, example, key)
    for row in validation or ():
        part = parts["validation"]
        part.rows_in += 1
        example = sources.example_of(row, run.data)
        if example is None:
            part.dropped["a part is empty or missing"] += 1
        elif (key := sources.key_of(example)) in train_keys:
            part.dropped["its question is in the training set"] += 1
        else:
            add("validation", example, key)
    return parts


def _save_tokenizer(run: RunFile, folder: Path, examples: list[Any]) -> Any:
    from transformers import AutoTokenizer

    data = run.data
    if data.train_tokenizer is not None:
        plain = Template.from_run(run, None) if data.shape != "messages" else Template("messages", "turns")
        texts = ("".join(text for text, _ in plain.segments(example, None)) for example in examples)
        train_bpe(texts, vocab_size=data.train_tokenizer.vocab_size, folder=folder)
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
    tokenizer.save_pretrained(folder)
    return tokenizer


def _make_set(folder: Path, split: Split, run: RunFile, tokenizer: Any, template: Template, *, fingerprint: str, progress: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "index.json").unlink(missing_ok=True)
    vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values(), default=0) + 1)
    jobs = [
        ShardJob(f"shard-{number:05d}", folder, examples, folder.parent / "tokenizer", template, vocab_size > 65536, fingerprint)
        for number, examples in enumerate(_ranges(split.examples))
    ]
    results = _run_jobs(jobs, run.data.num_processes, folder.name, progress=progress)
    entries = [ShardEntry.model_validate(result["entry"]) for result in results]
    dropped = split.dropped + sum((Counter(result["dropped"]) for result in results), Counter())
    _refuse_losses(split, dropped, entries, run, folder.name)
    audit = {"rows_in": split.rows_in, "dropped": dict(sorted(dropped.items())), "duplicates": split.duplicates}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    _write_dataset_files(folder, entries, fingerprint)
    write_index(folder, ShardSetIndex(fingerprint=fingerprint, backend=BACKEND, vocab_size=vocab_size, eos_token_id=tokenizer.eos_token_id,
                                      pad_token_id=pad, template=template.to_dict(), shards=entries, audit=audit))
    wanted = {entry.name for entry in entries}
    for stale in folder.glob("shard-*"):
        if stale.name.split(".")[0] not in wanted:
            stale.unlink()


def _ranges(examples: list[Any]) -> list[list[Any]]:
    """Consecutive examples of at most 64 MiB of text; a longer one is a range of its own."""
    ranges: list[list[Any]] = [[]]
    held = 0
    for example in examples:
        size = sum(len(text.encode()) for text in _texts(example))
        if ranges[-1] and held + size > SHARD_TEXT_BYTES:
            ranges.append([])
            held = 0
        ranges[-1].append(example)
        held += size
    return ranges


def _texts(example: Any) -> list[str]:
    if isinstance(example, str):
        return [example]
    return list(example) if isinstance(example, tuple) else [turn["content"] for turn in example]


def _run_jobs(jobs: list[ShardJob], num_processes: int | None, name: str, *, progress: bool) -> list[dict[str, Any]]:
    from rich.progress import track

    workers = min(len(jobs), num_processes or os.cpu_count() or 1)
    if workers <= 1:
        return [make_shard(job) for job in track(jobs, f"tokenising {name}", disable=not progress)]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(track(pool.map(make_shard, jobs), f"tokenising {name}", total=len(jobs), disable=not progress))


def _refuse_losses(split: Split, dropped: Counter[str], entries: list[ShardEntry], run: RunFile, name: str) -> None:
    causes = ", ".join(f"{count} because {cause}" for cause, count in dropped.most_common())
    if sum(entry.trained_tokens for entry in entries) == 0:
        detail = f" ({causes})" if causes else ""
        raise Refused(f"The {name} set has no row with a trained token{detail}.", where=f"data.{name}",
                      remedy="Check data.shape, data.columns and data.template" + (", or raise data.validation_share." if name == "validation" else "."))
    lost = sum(count for cause, count in dropped.items() if "training set" not in cause)
    if split.rows_in and lost / split.rows_in > run.data.max_dropped_share:
        raise Refused(
            f"{lost} of {split.rows_in} rows of the {name} set would be dropped: {causes}.", where=f"data.{name}",
            remedy="Mend the rows, or raise data.max_dropped_share.",
        )


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
