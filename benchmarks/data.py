"""What the data loaders cost and keep on the same tokens: this harness's, `datasets` twice, mosaicml-streaming, litdata, and a bare memory map.

Every cell is a fresh process, and the peers take turns: A, B, C, A, B, C. The clock starts after the imports. All data is local and in the page
cache, so nothing here speaks for remote storage. Rows lost and repeated are counted over one epoch that is left at 50 % and resumed once in
another process.

usage: python benchmarks/data.py [--text FILE --column NAME --tokenizer FOLDER | --tokens N] [--rounds N] [--batches N] [--workers N]
                                 [--seed N] [--peers NAME ...] [--environments FOLDER] [--work FOLDER] [--out FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import figures
import numpy as np

PEERS_FOLDER = Path(__file__).resolve().parent / "data_peers"
sys.path.insert(0, str(PEERS_FOLDER))

from environments import LITDATA, MOSAICML, NotMade, Recipe, python_of
from protocol import BATCH, LENGTH, row_hashes

CACHE = Path.home() / ".cache" / "harness" / "benchmarks"
CELL_LIMIT_S, CONVERSION_LIMIT_S = 1800, 7200
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "LITDATA_DISABLE_VERSION_CHECK": "1"}
METRICS = ("tokens_per_s", "cpu_s_per_mtokens", "first_batch_s", "resume_50_s", "resume_99_s", "peak_bytes", "peak_anonymous_bytes")


@dataclass(frozen=True)
class Peer:
    """A loader.

    Attributes:
        script: in data_peers.
        gives: what a batch is.
        recipe: of its environment; None for the harness's own, which holds `datasets` as well.
        data: the peer whose converted rows it reads.
    """

    script: str
    gives: str
    recipe: Recipe | None = None
    data: str = ""


PEERS = {
    "harness": Peer("harness_loader", "ids; marks of labels and pieces"),
    "memory map": Peer("bare_memmap", "ids"),
    "datasets map": Peer("datasets_map", "ids"),
    "datasets iterable": Peer("datasets_iterable", "ids", data="datasets map"),
    "mosaicml": Peer("mosaicml", "ids", MOSAICML),
    "litdata": Peer("litdata_loader", "ids", LITDATA),
}


class Failed(Exception):
    """A process of a peer that did not answer, and the last thing it said."""


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        arguments: of the command line.
        work: where the data is.
        pythons: interpreters of the peers.
        failures: why a peer has no figures, or not all.
        cells: what each process answered, by peer and metric.
    """

    arguments: argparse.Namespace
    work: Path
    pythons: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    cells: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    exactness: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def rows_file(self) -> Path:
        """uint16 [num_rows, 1024]: what every peer reads."""
        return self.work / "rows.npy"

    def folder(self, name: str) -> Path:
        """Where a peer's data is."""
        return self.work / "set" / "train" if name == "harness" else self.work / PEERS[PEERS[name].data or name].script

    def prepare(self) -> None:
        """This harness's set first, since its packed rows are what the others get."""
        given = self.arguments
        source = ["--tokens", given.tokens, "--seed", given.seed]
        if given.text:
            source = ["--text", given.text, "--column", given.column, "--tokenizer", given.tokenizer]
        call(Path(sys.executable), "harness_loader", "prepare", self.work / "set", self.rows_file, *source, limit_s=CONVERSION_LIMIT_S)

    def convert(self, name: str) -> None:
        """The rows in a peer's own format."""
        self.pythons[name] = python_of(PEERS[name].recipe, self.arguments.environments)
        if name == "harness" or self.folder(name).is_dir():
            return
        aside = self.folder(name).with_suffix(".aside")
        aside.mkdir()
        call(self.pythons[name], PEERS[name].script, "convert", self.rows_file, aside, limit_s=CONVERSION_LIMIT_S)
        aside.rename(self.folder(name))

    def read(self, name: str, *, start: int, batches: int, **files: Path) -> dict[str, Any]:
        """One cell: a fresh process."""
        flags = [part for key, value in files.items() for part in (f"--{key.replace('_', '-')}", value)]
        answer = call(self.pythons[name], PEERS[name].script, "read", self.folder(name), "--start-row", start, "--batches", batches,
                      "--seed", self.arguments.seed, "--workers", self.arguments.workers, *flags, limit_s=CELL_LIMIT_S)
        self.versions[name] = answer.pop("versions")
        return answer

    def state(self, name: str, share: int) -> Path:
        """The file with the state that a peer saved after `share` percent of the epoch."""
        return self.work / f"{PEERS[name].script}-{share}.state"

    def cut(self, share: int) -> int:
        """Rows before `share` percent of the epoch, in whole batches."""
        return self.num_rows * share // 100 // BATCH * BATCH

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return len(np.load(self.rows_file, mmap_mode="r"))

    def check_resume(self, name: str, held: Counter[int]) -> None:
        """Save the states at 50 and 99 %; count what one resume at 50 % loses and repeats."""
        hashes = [self.work / f"{PEERS[name].script}-{part}.npy" for part in ("before", "after", "whole")]
        half, whole = self.cut(50), -(-self.num_rows // BATCH) + 1
        self.read(name, start=0, batches=half // BATCH, hashes=hashes[0], save_state=self.state(name, 50))
        self.read(name, start=0, batches=self.cut(99) // BATCH, save_state=self.state(name, 99))
        self.read(name, start=half, batches=whole, hashes=hashes[1], state=self.state(name, 50))
        self.read(name, start=0, batches=whole, hashes=hashes[2])
        before, after, unbroken = (np.load(path) for path in hashes)
        resumed = np.concatenate([before, after])
        self.exactness[name] = losses(held, resumed) | {
            "same_order": bool(np.array_equal(resumed, unbroken)), "without_resume": losses(held, unbroken),
        }

    def measure(self, name: str) -> None:
        """One round of a peer: an epoch, and the next batch after each resume."""
        batches = min(self.arguments.batches or 1 << 62, -(-self.num_rows // BATCH))
        answer = self.read(name, start=0, batches=batches)
        if name in self.exactness:
            for share in (50, 99):
                resumed = self.read(name, start=self.cut(share), batches=1, state=self.state(name, share))
                answer[f"resume_{share}_s"] = resumed["first_batch_s"]
        for metric in METRICS:
            if answer.get(metric) is not None:
                self.cells.setdefault(name, {}).setdefault(metric, []).append(answer[metric])


def call(python: Path, script: str, *arguments: object, limit_s: int) -> dict[str, Any]:
    """Run a peer's script; its last line is the answer.

    Raises:
        Failed: when it fails or takes longer than the limit.
    """
    command = [str(python), str(PEERS_FOLDER / f"{script}.py"), *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=limit_s, env=os.environ | QUIET, check=False)
    except subprocess.TimeoutExpired:
        raise Failed(f"{arguments[0]} took more than {limit_s} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Failed(f"{arguments[0]}: {lines[-1][:300]}")
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return json.loads(last) if last.startswith("{") else {}


def losses(held: Counter[int], seen: np.ndarray) -> dict[str, int]:
    """Rows of the set that were not seen, that were seen too often, and that are not in the set."""
    counted = Counter(seen.tolist())
    unknown = sum(count for row, count in counted.items() if row not in held)
    return {"lost": (held - counted).total(), "repeated": (counted - held).total() - unknown, "unknown": unknown}


def run(bench: Bench, names: list[str]) -> None:
    """Everything, in order; a peer whose resume fails is measured without, any other failure ends it."""
    bench.prepare()
    held = Counter(row_hashes(np.load(bench.rows_file, mmap_mode="r")).tolist())
    left = [name for name in names if attempt(bench, name, bench.convert)]
    for name in left:
        attempt(bench, name, lambda name: bench.check_resume(name, held))
    for _ in range(bench.arguments.rounds):
        left = [name for name in left if attempt(bench, name, bench.measure)]


def attempt(bench: Bench, name: str, stage: Callable[[str], None]) -> bool:
    """Whether a peer got through a stage; why not is kept."""
    try:
        stage(name)
    except (Failed, NotMade) as error:
        bench.failures[name] = str(error)
        return False
    return True


def summary(bench: Bench, names: list[str]) -> dict[str, Any]:
    """All figures, as JSON."""
    rows = np.load(bench.rows_file, mmap_mode="r")
    digest = hashlib.sha256(rows.data).hexdigest()
    return {
        **figures.origin(),
        "data": {"rows": len(rows), "tokens": rows.size, "distinct_rows": len(set(row_hashes(rows).tolist())), "sha256": digest},
        "rounds": bench.arguments.rounds, "workers": bench.arguments.workers, "batch": [BATCH, LENGTH],
        "peers": {name: {
            "gives": PEERS[name].gives, "versions": bench.versions.get(name), "failure": bench.failures.get(name), "exactness": bench.exactness.get(name),
            "medians": {metric: statistics.median(values) for metric, values in bench.cells.get(name, {}).items()}, "cells": bench.cells.get(name, {}),
        } for name in names},
    }


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    data = result["data"]
    title = f"{data['tokens'] / 1e6:,.1f} million tokens in {data['rows']:,} rows, batches of {BATCH} x {LENGTH} int64, {result['workers']} workers"
    table = figures.titled(result, title, "loader")
    for heading in ("Mtokens/s", "CPU s/Mtoken", "first batch ms", "resume 50 % ms", "resume 99 % ms", "peak MiB", "anonymous MiB", "lost", "repeated"):
        table.add_column(heading, justify="right")
    table.add_column("same order")
    table.add_column("a batch gives")
    formats = [(1e6, ",.1f"), (1, ".4f"), *[(1e-3, ",.0f")] * 3, *[(1 << 20, ",.0f")] * 2]
    for name, peer in result["peers"].items():
        medians, exact = peer["medians"], peer["exactness"]
        missing = {f"resume_{share}_s": "no batch" if medians and exact else "-" for share in (50, 99)}
        cells = [f"{medians[metric] / unit:{form}}" if metric in medians else missing.get(metric, "-")
                 for metric, (unit, form) in zip(METRICS, formats, strict=True)]
        cells += [f"{exact['lost']:,}", f"{exact['repeated'] + exact['unknown']:,}", "yes" if exact["same_order"] else "no"] if exact else ["-"] * 3
        table.add_row(name, *cells, peer["gives"])
    console = figures.console(190)
    console.print(table)
    for name, peer in result["peers"].items():
        if peer["failure"]:
            console.print(f"{name}: {peer['failure']}", markup=False)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSON Lines; without it the documents are random")
    parser.add_argument("--column", default="text")
    parser.add_argument("--tokenizer", type=Path, help="a Hugging Face folder")
    parser.add_argument("--tokens", type=int, default=60_000_000, help="of the random documents")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, help="read at most so many a round; by default an epoch")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--environments", type=Path, default=CACHE)
    parser.add_argument("--work", type=Path, help="keep the data here, a folder that does not exist; by default it is deleted")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    if bool(arguments.text) != bool(arguments.tokenizer):
        parser.error("--text and --tokenizer belong together")
    return arguments


def main() -> int:
    """Print a table; write JSON."""
    arguments = parse()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="harness-data-"))
    work.mkdir(parents=True, exist_ok=arguments.work is None)
    bench = Bench(arguments, work)
    try:
        run(bench, arguments.peers)
        result = summary(bench, arguments.peers)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)
    figures.write(arguments.out, result)
    show(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
