"""`harness verify`: whether a checkpoint holds and is what was saved, read from its files on one CPU."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.errors import EXIT_DONE, CheckFailed


def run(arguments: argparse.Namespace) -> int:
    """Print a table, and answer with 4 when a check did not hold."""
    from harness.checkpoint.verify import verify

    verdict = verify(Path(arguments.run_dir), checkpoint=arguments.checkpoint)
    print("\n".join(verdict.lines()))
    if verdict.problems:
        raise CheckFailed(f"{verdict.folder} is not what was saved:\n  " + "\n  ".join(verdict.problems))
    return EXIT_DONE
