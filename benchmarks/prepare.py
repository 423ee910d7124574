"""How fast raw JSON Lines become a prepared set: `harness prepare`, beside the tokenizer alone on the same cores, and beside `datasets.map`.

Every cell is a fresh process, and they take turns: A, B, C, A, B, C. The clock of a cell starts when its imports are done. The file is in the page
cache. Of `prepare` everything counts: the digest of the file, tokenizers, reading, JSON, tokenising, writing, planning. Of the tokenizer alone only
its calls count: texts and tokenizer are loaded before; the better of one thread a process and one process with all threads is what the others are
compared to. The bare loop is the least that a program in Python can do: it reads lines and JSON, tokenises, and writes tokens to a file; its tokenizer
is loaded before too. Throughput is in MB (10^6 UTF-8 bytes) of the text columns a second; CPU seconds are those of a process and its children on the
clock.

usage: python benchmarks/prepare.py --text FILE [--column NAME | --prompt NAME --completion NAME] --tokenizer FOLDER [--rounds N]
                                    [--sequence-length N] [--map-bytes N] [--cells NAME ...] [--work FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import figures

sys.path.insert(0, str(figures.ROOT))

CELL_LIMIT_S = 1800
BATCH_BYTES = 4 << 20
BATCH_ROWS, MICRO_BATCH = 32, 32
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
THREADS = ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
"""What tokenizers read; a cell finds none of it set, as most users have it. fastokens has threads of its own and heeds the first alone."""
Answer = dict[str, Any]


def texts_of(arguments: argparse.Namespace, path: Path, share: int = 0, shares: int = 1) -> list[str]:
    """The text columns of every row of a file, one text after the other, or those of one of several shares of as many bytes."""
    import orjson

    texts, held = [], [0] * shares
    with open(path, "rb") as stream:
        for line in stream:
            place = held.index(min(held))
            held[place] += len(line)
            if place == share:
                row = orjson.loads(line)
                texts += [row[name] for name in columns(arguments)]
    return texts


def columns(arguments: argparse.Namespace) -> list[str]:
    """Names of the text columns."""
    return [arguments.prompt, arguments.completion] if arguments.prompt else [arguments.column]


def size_of(texts: list[str]) -> int:
    """UTF-8 bytes."""
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def batches_of(texts: list[str]) -> Iterator[list[str]]:
    """As much text at a time as the harness gives it; more is slower."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= BATCH_BYTES:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def tokenise(arguments: argparse.Namespace, share: int, shares: int, barrier: Any, answers: Any) -> None:
    """One process of the tokenizer alone; puts (start, end, bytes, CPU seconds, tokens) into a queue."""
    from fastokens import Tokenizer

    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    batches = list(batches_of(texts_of(arguments, arguments.text, share, shares)))
    tokenizer.encode_batch_flat(["warm up, so that threads and tables are there"] * 64)
    if barrier is not None:
        barrier.wait()
    start, cpu = time.monotonic(), time.process_time()
    tokens = sum(len(tokenizer.encode_batch_flat(batch)[0]) // 4 for batch in batches)
    end, cpu = time.monotonic(), time.process_time() - cpu
    answers.put((start, end, sum(map(size_of, batches)), cpu, tokens))


def read_and_write(arguments: argparse.Namespace, share: int, shares: int, barrier: Any, answers: Any) -> None:
    """One process of the bare loop, on its share of the file; puts what `tokenise` puts."""
    import numpy as np
    import orjson
    from fastokens import Tokenizer

    tokenizer, names = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json")), columns(arguments)
    place, stop = (arguments.text.stat().st_size * part // shares for part in (share, share + 1))
    texts, held, tokens = [], 0, 0
    tokenizer.encode_batch_flat(["warm up, so that threads and tables are there"] * 64)
    barrier.wait()
    start, cpu = time.monotonic(), time.process_time()
    with open(arguments.text, "rb", buffering=1 << 20) as stream, open(arguments.work / f"bare-{share}", "wb") as sink:
        stream.seek(max(0, place - 1))
        place += len(stream.readline()) - 1 if place else 0
        while place < stop:
            line = stream.readline()
            place, held = place + len(line), held + len(line)
            row = orjson.loads(line)
            texts += [row[name] for name in names]
            if held >= BATCH_BYTES or place >= stop:
                ids = np.frombuffer(tokenizer.encode_batch_flat(texts)[0], np.uint32)
                ids.astype(np.uint16).tofile(sink)
                texts, held, tokens = [], 0, tokens + len(ids)
    end, cpu = time.monotonic(), time.process_time() - cpu
    answers.put((start, end, 0, cpu, tokens))


def alone(arguments: argparse.Namespace, processes: int, target: Callable[..., None] = tokenise) -> Answer:
    """The tokenizer alone, or the bare loop, in so many processes, from a common start to the last one's end."""
    os.environ.update(dict.fromkeys(THREADS[:2], str(figures.cores() // processes)))  # read by a child when it starts
    context = get_context("spawn")
    barrier, answers = context.Barrier(processes), context.Queue()
    started = [context.Process(target=target, args=(arguments, share, processes, barrier, answers)) for share in range(processes)]
    for process in started:
        process.start()
    parts = [answers.get(timeout=CELL_LIMIT_S) for _ in started]
    for process in started:
        process.join()
    starts, ends, sizes, cpu, tokens = zip(*parts, strict=True)
    measured = {"bytes": sum(sizes)} if any(sizes) else {}  # else all of the file
    return {"seconds": max(ends) - min(starts), "cpu_s": sum(cpu), "tokens": sum(tokens)} | measured


def prepare(arguments: argparse.Namespace, processes: int | None) -> Answer:
    """`prepare` from the raw file to both finished sets, then the first batch of the training set."""
    begun = time.monotonic()
    import datasets  # noqa: F401  `prepare` imports it when it is needed
    import pyarrow  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    from harness.config.schema import RunFile
    from harness.data.loader import TrainLoader
    from harness.data.prepare import SETS
    from harness.data.prepare import prepare as prepare_run
    from harness.data.rows import RowTable

    shape: dict[str, Any] = {"shape": "text", "columns": {"text": arguments.column}}
    if arguments.prompt:
        shape = {"shape": "prompt_completion", "columns": {"prompt": arguments.prompt, "completion": arguments.completion},
                 "template": {"name": "bare", "prompt": "{prompt}", "completion": "{completion}"}}
    run = RunFile.model_validate({
        "run_dir": "unused", "model": {"architecture": {"model_type": "gpt2"}}, "train": {"steps": 1, "global_batch_rows": BATCH_ROWS},
        "data": {"dir": str(arguments.work / "set"), "train": {"path": str(arguments.text), "format": "jsonl"}, "tokenizer": str(arguments.tokenizer),
                 "sequence_length": arguments.sequence_length, "num_processes": processes} | shape,
    })
    start, cpu = time.monotonic(), cpu_seconds()
    prepare_run(run, progress=False)
    prepared, cpu = time.monotonic(), cpu_seconds() - cpu
    table = RowTable.of_run(run, "train")
    order = table.order(seed=run.train.seed, window_shards=run.data.window_shards)
    loader = TrainLoader(table, order, dp_rank=0, dp_size=1, micro_batch=MICRO_BATCH, global_rows=BATCH_ROWS)
    next(iter(loader))
    first = time.monotonic()
    loader.close()
    tokens = sum(entry.tokens for name in SETS for entry in RowTable.of_run(run, name).index.shards)
    return {"seconds": prepared - start, "cpu_s": cpu, "first_batch_s": first - start, "imports_s": start - begun, "tokens": tokens,
            "backend": table.index.backend}


def map_datasets(arguments: argparse.Namespace) -> Answer:
    """`load_dataset` and `map` with the tokenizer of transformers, on a part of the file, to its Arrow files."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    names, part = columns(arguments), arguments.work / "part.jsonl"
    size = size_of(texts_of(arguments, part))
    start, cpu = time.monotonic(), cpu_seconds()
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    tokenizer.model_max_length = sys.maxsize
    rows = load_dataset("json", data_files=str(part), split="train", cache_dir=str(arguments.work / "cache"))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores already
    rows.map(lambda batch: {name: tokenizer(batch[name])["input_ids"] for name in names}, batched=True, num_proc=2, remove_columns=rows.column_names)
    return {"seconds": time.monotonic() - start, "bytes": size, "cpu_s": cpu_seconds() - cpu}


CELLS: dict[str, Callable[[argparse.Namespace], Answer]] = {
    "tokenizer alone, processes": lambda arguments: alone(arguments, figures.cores()),
    "tokenizer alone, threads": lambda arguments: alone(arguments, 1),
    "bare loop, processes": lambda arguments: alone(arguments, figures.cores(), read_and_write),
    "harness": lambda arguments: prepare(arguments, None),
    "harness, 1 process": lambda arguments: prepare(arguments, 1),
    "harness, 2 processes": lambda arguments: prepare(arguments, 2),
    "datasets.map, 2 processes": map_datasets,
}
ALONE = tuple(CELLS)[:2]
MAP = tuple(CELLS)[-1]


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def write_part(arguments: argparse.Namespace, work: Path) -> None:
    """Lines from all over the file, evenly, about `--map-bytes` of them."""
    share = min(1.0, arguments.map_bytes / arguments.text.stat().st_size)
    with open(arguments.text, "rb") as stream, open(work / "part.jsonl", "wb") as part:
        part.writelines(line for number, line in enumerate(stream) if int((number + 1) * share) > int(number * share))


def measure(cell: str, work: Path) -> Answer:
    """One cell: a fresh process in a folder that is emptied after it.

    Raises:
        SystemExit: when it fails, with what it said last.
    """
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", cell, "--work", str(work)]
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | QUIET
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=CELL_LIMIT_S, env=environment, check=False)
    for left in ("set", "cache"):
        shutil.rmtree(work / left, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{cell}: {(done.stderr.strip().splitlines() or [f'exit status {done.returncode}'])[-1][:300]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(arguments: argparse.Namespace, size: int, cells: dict[str, list[Answer]]) -> dict[str, Any]:
    """All figures, as JSON."""
    medians = {}
    for name, answers in cells.items():
        numbers = {key: statistics.median(answer[key] for answer in answers) for key, value in answers[0].items() if not isinstance(value, str)}
        medians[name] = numbers | {"mb_per_s": numbers.get("bytes", size) / 1e6 / numbers["seconds"]}
    best = max((medians[name]["mb_per_s"] for name in ALONE if name in medians), default=None)
    for numbers in medians.values():
        numbers["to_alone"] = numbers["mb_per_s"] / best if best else None
        numbers["to_map"] = numbers["mb_per_s"] / medians[MAP]["mb_per_s"] if MAP in medians else None
    return {**figures.origin(), "bytes": size, "file_bytes": arguments.text.stat().st_size, "sequence_length": arguments.sequence_length, "rounds": arguments.rounds,
            "medians": medians, "cells": cells}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = figures.titled(result, f"{result['bytes'] / 1e6:,.1f} MB of text in {result['file_bytes'] / 1e6:,.1f} MB of JSON Lines")
    shown = {"MB/s": ("mb_per_s", ".1f"), "of the tokenizer": ("to_alone", ".2f"), "of datasets.map": ("to_map", ".1f"),
             "seconds": ("seconds", ".2f"), "CPU seconds": ("cpu_s", ".2f"),
             "to the first batch s": ("first_batch_s", ".2f"), "imports before s": ("imports_s", ".2f")}
    for heading in shown:
        table.add_column(heading, justify="right")
    for name, numbers in result["medians"].items():
        table.add_row(name, *("-" if numbers.get(key) is None else f"{numbers[key]:{form}}" for key, form in shown.values()))
    figures.console(150).print(table)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="JSON Lines")
    parser.add_argument("--column", default="text", help="of texts")
    parser.add_argument("--prompt", help="column of pairs")
    parser.add_argument("--completion", help="column of pairs")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--map-bytes", type=int, default=20_000_000, help="of the file, for datasets.map")
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--work", type=Path, help="a folder on the disk to measure on; by default a temporary one")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    parser.add_argument("--cell", choices=CELLS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if bool(arguments.prompt) != bool(arguments.completion):
        parser.error("--prompt and --completion belong together")
    return arguments


def main() -> int:
    """Print a table; write JSON."""
    arguments = parse()
    if arguments.cell:
        print(json.dumps(CELLS[arguments.cell](arguments)))
        return 0
    work = Path(tempfile.mkdtemp(prefix="harness-prepare-", dir=arguments.work))
    cells: dict[str, list[Answer]] = {name: [] for name in arguments.cells}
    try:
        write_part(arguments, work)
        size = size_of(texts_of(arguments, arguments.text))
        for _ in range(arguments.rounds):
            for name, answers in cells.items():
                answers.append(measure(name, work))
        result = summary(arguments, size, cells)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    figures.write(arguments.out, result)
    show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
