"""`harness doctor`: every check of a machine, or of a cluster, with what to type where one fails."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from harness import world
from harness.config.load import load
from harness.errors import EXIT_DONE, CheckFailed, HarnessError, Refused

if TYPE_CHECKING:
    from harness.preflight.cluster import Diagnosis

_COLOURS = {"pass": "green", "warn": "yellow", "fail": "red", "skip": "dim"}


def run(arguments: argparse.Namespace) -> int:
    """Examine, print, and answer with 4 when a check failed; among several ranks the first one speaks."""
    try:
        return _run(arguments)
    except HarnessError as error:
        if world.current().rank == 0:
            raise
        return error.exit_code


def _run(arguments: argparse.Namespace) -> int:
    from harness.preflight import cluster, ranks, remote

    place, loaded = world.current(), load(arguments.run, arguments.overrides) if arguments.run else None
    if arguments.overrides and loaded is None:
        raise Refused("Settings were given, but no run file.", where="command line", remedy="Give the run file that they change with --run.")
    if place.size > 1:
        if arguments.hosts:
            raise Refused(
                "--hosts goes over ssh, but this is one of several ranks already.",
                where="command line",
                remedy="Leave out --hosts, or start it without the launcher.",
            )
        diagnosis = ranks.examine(place, loaded=loaded, build=arguments.build)
    elif arguments.hosts:
        diagnosis = remote.examine(Path(arguments.hosts), loaded=loaded, build=arguments.build)
    else:
        diagnosis = cluster.this_machine(loaded=loaded, build=arguments.build)
    if place.rank == 0:
        _show(diagnosis, as_json=arguments.json)
    if failures := diagnosis.failures():
        raise CheckFailed(f"{failures} of {len(diagnosis.rows())} checks failed.")
    return EXIT_DONE


def _show(diagnosis: Diagnosis, *, as_json: bool) -> None:
    """A table for people, plain lines where nobody looks at a terminal, or JSON for programs."""
    if as_json:
        print(json.dumps(diagnosis.to_json(), indent=2))
        return
    console, several = Console(), len(diagnosis.hosts) > 1
    if not console.is_terminal:
        for hosts, finding in diagnosis.rows():
            print(f"{finding.state}  {f'{hosts}: ' if several else ''}{finding.name}: {finding.what}")
            if finding.remedy:
                print(f"      remedy: {finding.remedy}")
        return
    table = Table("", *(["where"] if several else []), "check", Column("what was seen, and the remedy", overflow="fold"))
    for hosts, finding in diagnosis.rows():
        colour = _COLOURS[finding.state]
        remedy = f"\n-> {finding.remedy}" if finding.remedy else ""
        cells = [Text(hosts)] if several else []
        table.add_row(Text(finding.state, style=colour), *cells, finding.name, Text(finding.what + remedy))
    console.print(table)
