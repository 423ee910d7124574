"""What it costs to begin, and to resume anywhere, in a set of 100 million rows: from opening its index to the first batch.

The index is synthetic: one shard of random tokens is made, and stands under as many names as the rows need.
usage: python benchmarks/index.py [--rows 100000000] [--rounds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent / "data_peers"))

from rich.console import Console
from rich.table import Table

PLACES = (0.0, 0.01, 0.5, 0.99)
SHARD_TOKENS, LENGTH, BATCH = 4 << 20, 1024, 32


def make(folder: Path, rows: int) -> int:
    """Write the set; returns how many rows it has."""
    import numpy as np
    from harness_loader import VOCABULARY, _random_documents, _run_file, write_shard

    from harness.data.encode import ShardJob
    from harness.data.packing import Packing, Plan, plan_folder
    from harness.data.plans import SUMMARY, Summary
    from harness.data.template import Template
    from harness.formats.index import ShardFile, ShardSetIndex, Shards, shard_name, write_index

    folder.mkdir()
    template, packing = Template("text", "plain"), Packing(LENGTH, "best_fit", "cut")
    job = ShardJob(shard_name(0), (), _run_file(folder).data, 0, {}, folder, "none", template, [], [0], wide=False)
    entry = write_shard(folder, job, "synthetic", _random_documents(np.random.default_rng(0), SHARD_TOKENS), [])
    plans = plan_folder(folder, packing, "synthetic")
    plan = Plan.open(plans / f"{entry.name}.npy")
    count = -(-rows // plan.num_rows)
    columns = Shards.of([entry]).columns
    repeated = {key: columns[key] * count for key in ("rows", "tokens", "trained_tokens", "sources")}
    repeated["files"] = {suffix: {key: values * count for key, values in file.items()} for suffix, file in columns["files"].items()}
    for number in range(1, count):
        (folder / f"{shard_name(number)}.arrow").symlink_to(f"{entry.name}.arrow")
        (plans / f"{shard_name(number)}.npy").symlink_to(f"{entry.name}.npy")
    one = Summary.of([plan], [ShardFile.of(plans / f"{entry.name}.npy")])
    many = Summary(one.rows * count, one.filled * count, one.trained * count, 0, 0, one.sizes * count, one.digests * count)
    (plans / SUMMARY).write_text(many.as_json())
    write_index(folder, ShardSetIndex(fingerprint="synthetic", backend="none", vocab_size=VOCABULARY, eos_token_id=0, pad_token_id=0,
                                      template=template.to_dict(), tokenizer=[], columns=columns | repeated, audit={}))
    return plan.num_rows * count


def measure(folder: Path, start: int) -> None:
    """Print the seconds from opening the index to the first batch at row `start`; imports are off the clock."""
    import numpy  # noqa: F401
    import pyarrow  # noqa: F401

    from harness.data.loader import TrainLoader
    from harness.data.packing import Packing
    from harness.data.rows import RowTable

    began = time.perf_counter()
    table = RowTable.build(folder, Packing(LENGTH, "best_fit", "cut"))
    opened = time.perf_counter()
    loader = TrainLoader(table, table.order(seed=1, window_shards=16), dp_rank=0, dp_size=1, micro_batch=BATCH, global_rows=BATCH, start=start)
    next(iter(loader))
    print(json.dumps({"open_s": opened - began, "batch_s": time.perf_counter() - opened}))
    loader.close()


def main() -> int:
    """Print a table; write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), int(arguments.measure[1]))
        return 0
    with tempfile.TemporaryDirectory(prefix="harness-index-") as scratch:
        folder = Path(scratch) / "set"
        rows = make(folder, arguments.rows)
        cells: dict[float, list[dict[str, float]]] = {place: [] for place in PLACES}
        for _ in range(arguments.rounds):
            for place in PLACES:
                command = [sys.executable, __file__, "--measure", str(folder), str(int(place * rows))]
                cells[place].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        size = (folder / "index.json").stat().st_size
    table = Table("begin at", "open the index", "to the first batch", "together", title=f"{rows:,} rows, an index of {size / 1e6:.1f} MB; medians of {arguments.rounds}", title_justify="left")
    result: dict[str, object] = {"rows": rows, "index_bytes": size}
    for place, found in cells.items():
        opened, batch = (statistics.median(cell[key] for cell in found) for key in ("open_s", "batch_s"))
        together = statistics.median(cell["open_s"] + cell["batch_s"] for cell in found)
        table.add_row(f"{place:.0%}", f"{opened:.3f} s", f"{batch:.3f} s", f"{together:.3f} s")
        result[f"{place:.0%}"] = {"open_s": opened, "batch_s": batch, "together_s": together}
    Console().print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
