"""`harness prepare`: make the shard sets of a run file and show what went in."""

from __future__ import annotations

import argparse
from concurrent.futures import Executor

from rich.console import Console

from harness.config.load import load
from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Prepare, then print the audit; under mpirun all ranks work and the first one speaks."""
    from harness.data import workers

    if workers.mpi_ranks() == 1:
        return _prepare(arguments, None)
    with workers.mpi_executor() as executor:
        return _prepare(arguments, executor) if executor is not None else EXIT_DONE


def _prepare(arguments: argparse.Namespace, executor: Executor | None) -> int:
    from harness.data.prepare import prepare

    audit = prepare(load(arguments.run_file, arguments.overrides).run, executor=executor)
    Console().print(audit.render())
    return EXIT_DONE
