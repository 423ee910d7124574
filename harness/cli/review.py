"""`harness review`: what the time of a run went to."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import EXIT_DONE
from harness.units import format_seconds

if TYPE_CHECKING:
    from rich.table import Table

    from harness.review.goodput import Goodput


def run(arguments: argparse.Namespace) -> int:
    """Print where the wall clock went, and what each attempt took to its first step."""
    from harness.review.goodput import goodput

    found = goodput(Path(arguments.run_dir))
    if arguments.json:
        print(json.dumps(found.as_json(), ensure_ascii=False))
        return EXIT_DONE
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(_time(found), _starts(found), sep="\n")
    attempts = "1 attempt" if len(found.starts) == 1 else f"{len(found.starts)} attempts"
    print(f"goodput {found.share:.1%} of {format_seconds(found.wall_s)} in {attempts}")
    return EXIT_DONE


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
