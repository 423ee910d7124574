"""The node starter's command: what `harness launch` runs on a host, the task of a Slurm step, the first process of a pod.

    python -m harness.launch.node --slots 2,2 --node 1 --meet h0:29500 RUN.yaml [key.path=value ...]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence

from harness.config.load import load
from harness.errors import EXIT_DONE, HarnessError, Refused
from harness.launch import again, interface, operators, verdict
from harness.launch.job import Job, Node
from harness.launch.starter import Starter
from harness.log import say

NUMBERS = ("CROSS_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Where DeepSpeed's launcher or a scheduler says which host of a job this is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start this host's ranks, and leave an outcome where they could not."""
    arguments = _parser().parse_args(argv)
    try:
        loaded = load(arguments.run_file, arguments.overrides)
        slots = tuple(int(word) for word in arguments.slots.split(","))
        number = arguments.node if arguments.node is not None else node_number(slots, os.environ)
        if arguments.job and (why := again.begin(loaded.run.run_path, arguments.job, restarts=arguments.restarts, writes=number == 0)):
            say(why)
            return EXIT_DONE
        master, _, port = arguments.meet.rpartition(":")
        job = Job((arguments.run_file, *arguments.overrides), slots, master, int(port))
        if _is_deepspeeds():
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # it shows its one process the first GPU alone
        values = operators.environment(ranks=slots[number]) | interface.variables(job, number) | loaded.run.launch.hosts.environment
        node = Node(job, number, values, silence_s=loaded.run.launch.silence_seconds)
        started = time.time()
        starter = Starter(node, loaded.run.run_path)
        final = verdict.settle(starter.run(), loaded.run.run_path, started=started, writes=number == 0)
        starter.leave(final)
        return final.code
    except HarnessError as error:
        print(f"harness: {error}", file=sys.stderr, flush=True)
        return error.exit_code


def node_number(slots: Sequence[int], environment: Mapping[str, str]) -> int:
    """Which host of a job this is, by what its scheduler says; another number of hosts than the job's is refused.

    Args:
        slots: ranks of every host of the job.
        environment: of this process.

    Raises:
        Refused: when a job of several hosts cannot know, or has another number of them.
    """
    if len(slots) == 1:
        return 0
    told = next((name for name in NUMBERS if environment.get(name, "").isdigit()), None)
    hosts = environment.get("SLURM_STEP_NUM_NODES", str(len(slots)))
    number = int(environment[told]) if told else len(slots)
    if number >= len(slots) or (told == "SLURM_NODEID" and hosts != str(len(slots))):
        raise Refused(
            f"This is host {number if told else 'of unknown number'} of {hosts}, but the job has {len(slots)} hosts.",
            where=f"--slots; {told or ' and '.join(NUMBERS)}",
            remedy="Start it once on each of the hosts that --slots counts, or say which one this is (--node, from 0).",
        )
    return number


def _is_deepspeeds() -> bool:
    """Whether DeepSpeed's launcher has started this, as if it were a rank."""
    return {"CROSS_RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.launch.node", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1", metavar="N[,N...]", help="ranks of every host of the job, in order")
    parser.add_argument("--node", type=int, metavar="I", help=f"which of the hosts this is, from 0; by default what {' or '.join(NUMBERS)} says")
    parser.add_argument("--meet", "--master", default="127.0.0.1:29500", metavar="HOST:PORT", help="where the ranks meet: a port of the first host")
    parser.add_argument("--job", metavar="NAME", help="of a job whose scheduler starts it again: its starts are counted, and none follows when all is done")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="with --job: starts in a row without a new checkpoint, after the first")
    parser.add_argument("run_file", metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
