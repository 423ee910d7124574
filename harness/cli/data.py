"""`harness data`: which documents a step trained on, and when a row was or will be trained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table

from harness.config.load import load
from harness.errors import EXIT_DONE, Refused
from harness.formats import ledger

if TYPE_CHECKING:
    from harness.data.provenance import Provenance


def run(arguments: argparse.Namespace) -> int:
    """Answer from the index, the order and the run's own records."""
    from harness.data.passed import Passed
    from harness.data.provenance import Provenance
    from harness.telemetry.read import read_metrics

    run_dir = Path(arguments.run)
    attempts = sorted((run_dir / "attempts").glob("[0-9]*/run.yaml"))
    if not attempts:
        raise Refused(f"{run_dir} holds no run.", where="--run", remedy="Give the folder of a run that has started.")
    events = ledger.read(run_dir)
    starts = [event for event in events if event["kind"] == "start" and "rows" in event]
    if not starts:
        raise Refused(f"{run_dir} has not begun to train.", where="--run", remedy="Give the folder of a run that has started.")
    loaded = load(attempts[-1])
    rows_at = {line["step"]: line["rows"] for line in read_metrics(run_dir) if "train/loss" in line}
    left_out = [event["rows"] for event in events[events.index(starts[-1]) :] if event["kind"] == "rollback"]
    passed = Passed.of([*starts[-1].get("passed", []), *left_out])
    provenance = Provenance(arguments.set, loaded.run, rows_at, fingerprint=starts[-1]["rows"], first_row=starts[-1].get("first_row", 0), passed=passed)
    if arguments.action == "where":
        _where(provenance, arguments)
    else:
        _show(provenance, arguments, trust_code=loaded.run.model.trust_code)
    return EXIT_DONE


def _show(provenance: Provenance, arguments: argparse.Namespace, *, trust_code: bool) -> None:
    from harness.data.sets import tokenizer_of
    from harness.model.configure import load_tokenizer

    folder = tokenizer_of(arguments.set, provenance.table, provenance.run.data)
    tokenizer = load_tokenizer(str(folder), where="SET", trust_code=trust_code)
    table = Table("row", "epoch", Column("from", overflow="fold"), Column("document", no_wrap=True), "tokens", "begins", title=f"step {arguments.step}", title_justify="left")
    for row in provenance.rows_of_step(arguments.step, tokenizer):
        for number, piece in enumerate(row.pieces):
            own = (str(row.row), str(row.epoch)) if number == 0 else ("", "")
            table.add_row(*own, f"{Path(piece.file).name}:{piece.source_row}", f"{piece.shard}:{piece.document}", f"{piece.start} to {piece.stop}", piece.text)
    Console(markup=False, emoji=False).print(table)


def _where(provenance: Provenance, arguments: argparse.Namespace) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    for epoch, position, step in provenance.steps_of_row(arguments.row):
        place = f"position {position:,}, " if position is not None else ""
        told = f"trained in step {step}" if step is not None else "not reached yet" if position is not None else "never reached: the set is used up before"
        told = "passed over: its step was a spike and was taken back" if position is not None and provenance.passed.covers(position) else told
        console.print(f"row {arguments.row}, epoch {epoch}: {place}{told}")
