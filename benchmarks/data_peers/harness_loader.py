"""This harness: its shard set, its rows, its loader. All that the benchmark knows of their interface is in this file.

Besides the protocol: harness_loader.py prepare FOLDER ROWS_NPY (--text FILE --column NAME --tokenizer FOLDER | --tokens N --seed S)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import pyarrow  # noqa: F401  the loader imports it when it opens a shard
from protocol import BATCH, LENGTH, Reader, Request, serve

from harness.config.schema import RunFile
from harness.data.documents import Documents
from harness.data.encode import ShardJob, write_shard
from harness.data.loader import TokenReader, TrainLoader
from harness.data.prepare import prepare as prepare_run
from harness.data.packing import Packing
from harness.data.rows import RowTable
from harness.data.template import Template
from harness.formats.index import Shards, ShardSetIndex, write_index

VOCABULARY, SHARD_TOKENS, MEDIAN_LENGTH, DRAWN, DUMP_ROWS = 50_257, 8 << 20, 900, 256, 1024


def _run_file(folder: Path, **data: object) -> RunFile:
    return RunFile.model_validate({
        "run_dir": "unused", "model": {"architecture": {"model_type": "gpt2"}}, "train": {"steps": 1, "global_batch_rows": BATCH},
        "data": {"dir": str(folder), "train": {"path": "unused"}, "sequence_length": LENGTH} | data,
    })


def _table(folder: Path) -> RowTable:
    return RowTable.build(folder, Packing(LENGTH, "best_fit", "cut"))


class Loader(Reader):
    """A thread reads ahead. Tokens come as uint16 with marks for labels and positions; widened here, in training by the device.

    Resumes at a row number.
    """

    def __init__(self, request: Request):
        table, self.row = _table(request.folder), request.state or 0
        order = table.order(seed=request.seed, window_shards=16)
        self.loader = TrainLoader(table, order, dp_rank=0, dp_size=1, micro_batch=BATCH, global_rows=BATCH, start=self.row, total_rows=table.num_rows)

    def batches(self) -> Iterator[np.ndarray]:
        for batch in self.loader:
            self.row += batch.rows
            yield batch.micro_batches[0].input_ids[: batch.rows]

    def state(self) -> int:
        return self.row

    def close(self) -> None:
        self.loader.close()


def prepare(arguments: argparse.Namespace) -> None:
    """Make the set in FOLDER/train, and dump its rows."""
    if arguments.text:
        source = {"path": str(arguments.text), "format": "jsonl"}
        run = _run_file(arguments.folder, train=source, columns={"text": arguments.column}, tokenizer=str(arguments.tokenizer))
        prepare_run(run, progress=False)
    else:
        write_synthetic(arguments.folder / "train", tokens=arguments.tokens, seed=arguments.seed)
    dump(arguments.folder / "train", arguments.rows)


def write_synthetic(folder: Path, *, tokens: int, seed: int) -> None:
    """A set of documents of random lengths (log-normal, as text has them) and random ids, all trained."""
    folder.mkdir(parents=True)
    rng, template, data, fingerprint = np.random.default_rng(seed), Template("text", "plain"), _run_file(folder).data, f"synthetic {tokens} {seed}"
    entries, made = [], 0
    while made < tokens:
        documents = _random_documents(rng, min(SHARD_TOKENS, tokens - made))
        job = ShardJob(f"shard-{len(entries):05d}", (), data, seed, {}, folder, "none", template, [], [0], wide=False)
        entries.append(write_shard(folder, job, fingerprint, documents, []))
        made += len(documents.flat)
    write_index(folder, ShardSetIndex(fingerprint=fingerprint, backend="none", vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0,
                                      template=template.to_dict(), tokenizer=[], columns=Shards.of(entries).columns, audit={}))


def _random_documents(rng: np.random.Generator, tokens: int) -> Documents:
    """At least so many tokens; an id of 0 stands in padding only."""
    sizes = np.zeros(0, np.int32)
    while sizes.sum(dtype=np.int64) < tokens:
        sizes = np.append(sizes, np.clip(rng.lognormal(np.log(MEDIAN_LENGTH), 1.3, DRAWN), 8, 100_000).astype(np.int32))
    sizes = sizes[: np.searchsorted(np.cumsum(sizes, dtype=np.int64), tokens) + 1]
    count = len(sizes)
    spans = np.column_stack([np.arange(count, dtype=np.int32), np.zeros(count, np.int32), sizes])
    flat = rng.integers(1, VOCABULARY, int(sizes.sum()), dtype=np.uint16)
    return Documents(flat, sizes, spans, np.arange(count, dtype=np.uint32), np.arange(count, dtype=np.uint64))


def dump(folder: Path, path: Path) -> None:
    """uint16 [num_rows, 1024]: the packed rows of a set, in their own order."""
    table = _table(folder)
    if table.index.vocab_size > 1 << 16:
        raise ValueError("the peers get uint16 tokens, and this tokenizer has more ids")
    reader = TokenReader(table)
    rows = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=(table.num_rows, LENGTH))
    for first in range(0, table.num_rows, DUMP_ROWS):
        chosen = np.arange(first, min(first + DUMP_ROWS, table.num_rows))
        rows[chosen] = reader.batch(table.ids(chosen), first_row=0).input_ids
    rows.flush()


def _no_conversion(rows: Path, folder: Path) -> None:
    raise NotImplementedError("`prepare` makes the set that the rows come from")


def _prepare_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    for name in ("folder", "rows", "--text", "--tokenizer"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--column", default="text")
    for name in ("--tokens", "--seed"):
        parser.add_argument(name, type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["prepare"]:
        prepare(_prepare_arguments())
    else:
        serve(_no_conversion, Loader, versions=("numpy",))
