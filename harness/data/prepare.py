"""Raw sources -> two sets of token shards; finished work is kept, and the bytes do not depend on who made them."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from harness import cgroup, collector, files
from harness.config.schema import Data, RunFile
from harness.data import backends, builtin, dates, leads, losses, sources, workers
from harness.data.audit import Audit, sample_rows
from harness.data.bpe import train_bpe
from harness.data.encode import held_out
from harness.data.examples import VERSION as READING_VERSION
from harness.data.examples import key_of
from harness.data.maker import SETS, Group, Maker, examples_of, set_fingerprint
from harness.data.rows import RowTable
from harness.data.template import VERSION as TEMPLATE_VERSION
from harness.data.template import Template
from harness.errors import Failure, HarnessError, Refused, first_line
from harness.formats.index import NAME as INDEX
from harness.formats.index import VERSION, ShardFile, ShardSetIndex, read_index
from harness.log import say

SHARD_TEXT_BYTES = 16 << 20
"""About so much text goes into a shard; few enough bytes that training can start on the first ones, and that a window of them fits into memory."""
ALONE_BYTES = 256 << 20
"""Less text than this is done sooner by threads of this process than processes start."""

TEXT_VERSION = 2
"""Of how text files become documents."""


def fingerprint(run: RunFile) -> str:
    """What identifies both sets of a run: sources, tokenizer, template and every option that changes a byte, but for the backend."""
    data, known = run.data, Path(run.data.dir) / ".digests.json"
    parts = [str(VERSION), str(TEMPLATE_VERSION), str(READING_VERSION), data.shape, json.dumps(data.columns.model_dump()), json.dumps(data.template.model_dump()), data.broken_rows, str(SHARD_TEXT_BYTES)]
    parts.append(sources.source_digest(data.train, key="data.train", known=known) + str(data.train.max_rows))
    if data.validation is not None:
        parts.append(sources.source_digest(data.validation, key="data.validation", known=known) + str(data.validation.max_rows))
    else:
        parts.append(f"share {data.validation_share} seed {run.train.seed}")
    parts.append(f"bpe {data.train_tokenizer.vocab_size}" if data.train_tokenizer else _tokenizer_digest(data.tokenizer or run.model.path))
    if any(sources.reads_text(source, key=f"data.{name}") for name, source in (("train", data.train), ("validation", data.validation)) if source is not None):
        parts.append(f"text {TEXT_VERSION}")
    parts += _of_prepared(Path(data.dir) / "tokenizer", data)
    return files.digest_text(*parts)


def _of_prepared(tokenizer: Path, data: Data) -> list[str]:
    """What changes a byte under some tokenizers only, of which one from the hub is known once it is there."""
    found = [f"leads {leads.VERSION}"] if leads.may_be_needed(tokenizer) else []
    if data.shape == "messages":
        found += [f"date {data.date}"] * (data.date is not None) + ["open date"] * dates.are_open(tokenizer)
    return found


def _tokenizer_digest(name: str | None) -> str:
    folder = Path(str(name))
    if not folder.is_dir():
        return f"hub {name}"
    names = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".txt", ".model", ".jinja") and p.name not in ("config.json", "generation_config.json", "harness.json"))
    names += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    return files.digest_text(*(f"{p.relative_to(folder)} {files.digest_file(p)}" for p in names))


def prepared_index(run: RunFile) -> ShardSetIndex | None:
    """The index of the training set when both sets and their tokenizer are there and fit the run file; None when they must be made."""
    indexes = [read_index(Path(run.data.dir) / name) for name in SETS]
    if any(index is None for index in indexes) or not all(_holds(Path(run.data.dir) / "tokenizer" / file.name, file) for file in indexes[0].tokenizer):
        return None
    wanted = fingerprint(run)
    fits = all(index.fingerprint == set_fingerprint(wanted, index.backend, name) for index, name in zip(indexes, SETS, strict=True) if index)
    return indexes[0] if fits else None


def _holds(path: Path, file: ShardFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes


def prepare(run: RunFile, *, progress: bool = True, executor: Executor | None = None) -> Audit:
    """Make both sets, or find them made.

    Args:
        run: the run file.
        progress: show it.
        executor: workers that share this file system, such as the ranks of an MPI job; by default processes of this machine.

    Returns:
        the audit, to render.

    Raises:
        Refused: whatever is wrong with a source, the tokenizer or the rows, also those of sets that are there.
    """
    folder = Path(run.data.dir)
    tokenizer = None
    if prepared_index(run) is None or (_parts(folder) and os.access(folder, os.W_OK)):
        with _alone(folder), _room(folder):
            if prepared_index(run) is None:
                tokenizer = _make(run, folder, progress=progress, executor=executor)
            _tidy(folder)
    tables = {name: RowTable.of_run(run, name) for name in SETS}
    for name, table in tables.items():
        losses.refuse(run.data, name, table.index, table.summary)
    return Audit(folder, tables, sample_rows(folder / "train", tokenizer, count=3, trust_code=run.model.trust_code))


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


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Refuse a folder that cannot be written, or not any more."""
    try:
        yield
    except HarnessError:
        raise
    except Exception as error:
        number = _error_number(error)
        if number is None or number not in files.UNWRITABLE:
            raise
        raise Refused(f"{folder} cannot be written: {os.strerror(number)}.", where="data.dir",
                      remedy="Make room there, or set `data.dir` to another place; finished shards are kept.") from None


def _error_number(error: Exception) -> int | None:
    """That of the system; numpy says only how much was written, and tokenizers tell the number in the text."""
    if isinstance(error, OSError):
        return errno.ENOSPC if error.errno is None and "requested and" in str(error) else error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None


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
    text_bytes = sum(part.size for group in [*train, *(validation or ())] for part in group)
    with (
        nullcontext(executor) if executor is not None else _local_executor(data, text_bytes, len(train)) as pool,
        nullcontext() if data.shape == "messages" else collector.off(),  # rows and tokenizers have no cycles
    ):
        tokenizer = _save_tokenizer(run, folder / "tokenizer", cache, train)
        if isinstance(pool, workers.Pool):
            pool.everywhere(backends.warm, folder / "tokenizer")
        backend = backends.choose(folder / "tokenizer")
        maker = Maker(run, folder, tokenizer, pool, fingerprint=fingerprint(run), progress=progress)
        try:
            maker.make(train, validation, backend)
        except backends.Differs as difference:
            say(f"fastokens and tokenizers read {str(difference)[:60]!r} differently; all is made anew with tokenizers.")
            maker.make(train, validation, backends.ORACLE)
        except BrokenProcessPool:
            raise Failure("A process that prepares the data was killed, often for want of memory; start again, and finished shards are kept "
                          "(fewer processes: data.num_processes).") from None
    return tokenizer


def _local_executor(data: Data, text_bytes: int, num_shards: int) -> AbstractContextManager[Executor | None]:
    """What is soonest done: threads for little text, processes for much, one after the other for chat templates, which know no threads."""
    processes = min(data.num_processes or (1 if text_bytes <= ALONE_BYTES else cgroup.cores()), num_shards)
    if processes > 1:
        return workers.local_processes(processes)
    return nullcontext() if data.shape == "messages" or num_shards == 1 else workers.local_threads()


def held_out_questions(run: RunFile, *, count: int) -> list[str]:
    """Some of the built-in questions that a run does not train on."""
    questions = [q for q, answer in builtin.python_questions() if held_out(run.train.seed, run.data.validation_share, key_of((q, answer)))]
    return questions[:: max(1, len(questions) // count)][:count]


def _save_tokenizer(run: RunFile, folder: Path, cache: Path, train: list[Group]) -> Any:
    """Put the tokenizer in the place of what is there, and take away the indexes that go with another: only when there is one."""
    from transformers import AutoTokenizer

    name = run.data.tokenizer or run.model.path
    made = _train_tokenizer(run, cache / "tokenizer", train) if run.data.train_tokenizer is not None else None
    tokenizer = None if made else _load_tokenizer(run, name)
    for which in SETS:
        (folder.parent / which / INDEX).unlink(missing_ok=True)
    if made or not (folder.exists() and Path(name).exists() and folder.samefile(name)):
        shutil.rmtree(folder, ignore_errors=True)  # what an earlier tokenizer had, such as a chat template, is not this one's
    if made:
        made.rename(folder)
        return AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_tokenizer(run: RunFile, folder: Path, train: list[Group]) -> Path:
    data = run.data
    plain = Template.from_run(run, None) if data.shape != "messages" else Template("messages", "turns")
    shutil.rmtree(folder, ignore_errors=True)
    trained = (example for example in examples_of(train, run) if data.validation or not held_out(run.train.seed, data.validation_share, key_of(example)))
    train_bpe(("".join(text for text, _ in plain.segments(example, None)) for example in trained), vocab_size=data.train_tokenizer.vocab_size, folder=folder)
    return folder


def _load_tokenizer(run: RunFile, name: str | None) -> Any:
    from transformers import AutoTokenizer

    where = "data.tokenizer" if run.data.tokenizer else "model.path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=run.model.trust_code)
    except Exception as error:
        raise Refused(f"There is no tokenizer in {name!r}: {first_line(error)}", where=where,
                      remedy="Name a Hugging Face folder with a tokenizer, or train one with data.train_tokenizer.") from None
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one of nothing where there is only a model's configuration
        raise Refused(f"There is no tokenizer in {name!r}.", where=where,
                      remedy="Set data.tokenizer to a folder that has one, such as the base model's, or train one with data.train_tokenizer.")
    if not tokenizer.is_fast:
        raise Refused(f"The tokenizer of {name!r} is not a fast one.", where=where, remedy="Use a tokenizer that has a tokenizer.json.")
    if tokenizer.eos_token_id is None:
        raise Refused(f"The tokenizer of {name!r} has no end-of-text token, so answers could never stop.", where=where, remedy="Set its eos_token.")
    if run.data.shape == "messages":
        dates.pin(tokenizer, run.data.date, where=where)
    return tokenizer
