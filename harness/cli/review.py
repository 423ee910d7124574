"""`harness review`: what a run learned, how fast it was, and what its time and memory went to; several runs side by side."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness import files
from harness.errors import EXIT_CHECK_FAILED, EXIT_DONE
from harness.units import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from harness.review.goodput import Goodput
    from harness.review.summary import Summary


def run(arguments: argparse.Namespace) -> int:
    """Print tables, write the page that is asked for, and judge the conditions."""
    from harness.review import limits
    from harness.review.summary import summarize

    conditions = [limits.parse(text, num_runs=len(arguments.run_dirs)) for text in arguments.fail_if]
    summaries = [summarize(Path(folder)) for folder in arguments.run_dirs]
    if arguments.html:
        from harness.review.page import render

        files.write_text(Path(arguments.html), render(summaries))
    if arguments.json:
        whole = summaries[0].as_json() if len(summaries) == 1 else {"runs": [one.as_json() for one in summaries]}
        print(json.dumps(whole, ensure_ascii=False, default=str))
    else:
        _print(summaries)
        if arguments.html:
            print(f"page: {arguments.html}")
    failures = [told for condition in conditions for told in condition.failures(summaries)]
    for told in failures:
        print(told, file=sys.stderr)
    return EXIT_CHECK_FAILED if failures else EXIT_DONE


def _print(summaries: list[Summary]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False)
    if len(summaries) == 1:
        (one,) = summaries
        console.print(_facts(summaries), _time(one.time), _starts(one.time), sep="\n")
    else:
        console.print(_facts(summaries), _differences(summaries), sep="\n")
    for one in summaries:
        for step, seconds, where, spent_s in one.slowest():
            print(f"{one.name}: step {step} took {format_seconds(seconds)}, {format_seconds(spent_s)} of it in {where}")
    for one in summaries:
        attempts = "1 attempt" if len(one.time.starts) == 1 else f"{len(one.time.starts)} attempts"
        name = f"{one.name}: " if len(summaries) > 1 else ""
        print(f"{name}goodput {one.time.share:.1%} of {format_seconds(one.time.wall_s)} in {attempts}")


def _facts(summaries: list[Summary]) -> Table:
    """A row a number."""
    from harness.review.summary import comparison

    head, *rows = comparison(summaries)
    table = _table(*head)
    for row in rows:
        table.add_row(*row)
    return table


def _differences(summaries: list[Summary]) -> Table:
    from harness.review.summary import differences

    table = _table("settings that differ", *(one.name for one in summaries))
    for key, values in differences(summaries):
        table.add_row(key, *("" if value is None else str(value) for value in values))
    return table


def _time(found: Goodput) -> Table:
    table = _table("where the time went", "seconds", "share")
    rows = [*((name, seconds) for name, seconds in found.seconds.items() if seconds), ("unaccounted", found.unaccounted_s)]
    for name, seconds in rows:
        table.add_row(name, f"{seconds:,.1f}", f"{seconds / max(found.wall_s, 1e-9):.1%}")
    table.add_row("wall clock", f"{found.wall_s:,.1f}", "100.0%")
    return table


def _starts(found: Goodput) -> Table:
    """One row an attempt."""
    columns = list(dict.fromkeys(name for start in found.starts for name in start.phases))
    table = _table("attempt, seconds to its first step", *columns, "in all", "ended")
    for start in found.starts:
        cells = [f"{start.phases[name]:.1f}" if name in start.phases else "" for name in columns]
        table.add_row(str(start.attempt or "before it had a number"), *cells, f"{start.first_step_s:.1f}" if start.first_step_s else "", start.state or "untold")
    return table


def _table(first: str, *others: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(first, box=box.SIMPLE_HEAD, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table
