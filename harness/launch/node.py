"""The node starter's command: what `harness launch` runs on a host, the task of a Slurm step, the first process of a pod.

    python -m harness.launch.node --slots 2,2 --node 1 --master h0:29500 RUN.yaml [key.path=value ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from harness.config.load import load
from harness.errors import HarnessError
from harness.launch import operators, verdict
from harness.launch.job import Node
from harness.launch.starter import Starter


def main(argv: Sequence[str] | None = None) -> int:
    """Start this host's ranks, and leave an outcome where they could not."""
    arguments = _parser().parse_args(argv)
    try:
        loaded = load(arguments.run_file, arguments.overrides)
        slots = tuple(int(word) for word in arguments.slots.split(","))
        master, _, port = arguments.master.rpartition(":")
        node = Node(
            (arguments.run_file, *arguments.overrides), slots, arguments.node, master, int(port), operators.environment(ranks=slots[arguments.node]),
            silence_s=loaded.run.launch.silence_seconds,
        )
        started = time.time()
        ended = Starter(node, loaded.run.run_path).run()
        return verdict.settle(ended, loaded.run.run_path, started=started, writes=node.node == 0)
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.launch.node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1", metavar="N[,N...]", help="ranks of every host of the job, in order")
    parser.add_argument("--node", type=int, default=0, metavar="I", help="which of the hosts this is, from 0")
    parser.add_argument("--master", default="127.0.0.1:29500", metavar="HOST:PORT", help="where the ranks meet: a port of the first host")
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
