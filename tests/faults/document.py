"""The table of the fault matrix, launch/FAULTS.md: its text is made of the cases, its times of what their tests measured."""

from __future__ import annotations

import re
from pathlib import Path

from tests.faults.cases import CASES

PATH = Path(__file__).resolve().parents[2] / "launch" / "FAULTS.md"
TIMES = ("noticed", "ended", "whole")
HEAD = """# What was done to runs, and what they did

Each row is a test in `tests/faults/`, run by `tests/run.sh --all`; rows with a star by `tests/run.sh`, too. A run of a tiny GPT-2 with dropout on
two ranks, in fp32, is struck, ends or is started again, and goes on: every loss and every evaluation must then be that of the undisturbed run,
bit for bit. After each no process, zombie or orphan, and no name in /dev/shm may be left.

Seconds, measured on two shared cores: *noticed* from the strike to the first word of it (for what stands still the bound of 8 s is part of it),
*ended* from the strike until all ranks are gone and the outcome is written, *whole* for the case, which is mostly the start of interpreters.
`UPDATE_FAULTS=1 bash tests/run.sh --all tests/faults` measures anew and writes this table.

| case | struck | what follows | noticed | ended | whole |
| --- | --- | --- | ---: | ---: | ---: |
"""
_measured: dict[str, dict[str, float]] = {}
_failed: set[str] = set()


def remember(name: str, seconds: dict[str, float]) -> None:
    """Keep what a test measured, until the session ends."""
    _measured[name] = seconds


def forget(name: str) -> None:
    """What it measured does not count."""
    _failed.add(name)


def times(text: str) -> dict[str, dict[str, str]]:
    """The times of every row of the table as it stands."""
    rows = re.findall(r"^\| `([^`]+)`.*\| ([^|]*) \| ([^|]*) \| ([^|]*) \|$", text, re.MULTILINE)
    return {name: dict(zip(TIMES, found, strict=True)) for name, *found in rows}


def render(known: dict[str, dict[str, str]]) -> str:
    """The document with those times."""
    lines = []
    for case in CASES:
        cells = " | ".join(known.get(case.name, {}).get(what, "") for what in TIMES)
        lines.append(f"| `{case.name}`{' *' if case.plain else ''} | {case.struck} | {case.follows} | {cells} |\n")
    return HEAD + "".join(lines)


def update() -> None:
    """Put what this session measured beside what the table knows already."""
    known = times(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    for name, seconds in _measured.items():
        if name in _failed:
            continue
        known[name] = {what: f"{seconds[what]:.1f}" if what in seconds else "" for what in TIMES}
    PATH.write_text(render(known), encoding="utf-8")
