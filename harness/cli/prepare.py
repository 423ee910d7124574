"""`harness prepare`: make the shard sets of a run file and show what went in."""

from __future__ import annotations

import argparse

from rich.console import Console

from harness.config.load import load
from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Prepare, then print the audit."""
    from harness.data.prepare import prepare

    loaded = load(arguments.run_file, arguments.overrides)
    audit = prepare(loaded.run)
    Console().print(audit.render())
    return EXIT_DONE
