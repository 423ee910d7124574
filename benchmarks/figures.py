"""What every benchmark says of itself: the machine, the commit, a table to look at and a file with all figures."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def origin() -> dict[str, Any]:
    """The command line, the commit and the machine; the processor as the kernel names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {"command": sys.argv, "commit": commit, "machine": {"cpu": cpu, "cores": cores(), "python": platform.python_version()}}


def titled(result: dict[str, Any], title: str, first: str = "") -> Any:
    """A rich table with a first column; the title ends in rounds, machine and commit."""
    from rich import box
    from rich.table import Table

    machine = result["machine"]
    whole = f"{title}; medians of {result['rounds']}; {machine['cpu']}, {machine['cores']} cores; {result['commit'][:7]}"
    return Table(first, title=whole, title_justify="left", box=box.HEAVY_HEAD if sys.stdout.isatty() else None)


def console(width: int) -> Any:
    """A rich console; so wide where it is no terminal."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=width)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """All figures as JSON, where a file is asked for."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
