"""`harness prepare`: make the shard sets of a run file and show what went in."""

from __future__ import annotations

import argparse
from concurrent.futures import Executor

from rich.console import Console

from harness.config import rules
from harness.config.load import load
from harness.errors import EXIT_DONE, Refused


def run(arguments: argparse.Namespace) -> int:
    """Prepare, then print the audit; under mpirun all ranks work and the first one speaks."""
    from harness.data import workers

    if workers.mpi_ranks() == 1:
        return _prepare(arguments, None)
    with workers.mpi_executor() as executor:
        return _prepare(arguments, executor) if executor is not None else EXIT_DONE


def _prepare(arguments: argparse.Namespace, executor: Executor | None) -> int:
    from harness.data import in_use
    from harness.data.prepare import prepare, prepared_index

    loaded = load(arguments.run_file, arguments.overrides)
    for key in ("train", "dir"):
        if getattr(loaded.run.data, key) is None:
            given = f"data.sets ({loaded.origin('data.sets')})" if loaded.run.data.sets else f"data ({loaded.origin('data')})"
            raise Refused(f"There is nothing to prepare: `data.{key}` is not set.", where=given, remedy="Set `data.train` to raw sources and `data.dir` to a folder.")
    rules.check_data(loaded)
    if prepared_index(loaded.run) is None:
        in_use.refuse_replacing(loaded.run.data, where=f"data.dir ({loaded.origin('data.dir')})")
    audit = prepare(loaded.run, executor=executor)
    console = Console(markup=False, emoji=False)
    console.print(audit.render(console))
    return EXIT_DONE
