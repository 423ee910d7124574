"""`harness export`: a Hugging Face folder from a checkpoint, without the ranks that trained it."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Export and say where."""
    from harness.checkpoint.export import export

    folder = export(Path(arguments.run_dir), Path(arguments.to), checkpoint=arguments.checkpoint, dtype=arguments.dtype)
    print(f"exported {arguments.run_dir} to {folder}")
    return EXIT_DONE
