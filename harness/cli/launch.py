"""`harness launch`: start the ranks of a run, pass on what it is asked, and answer with the outcome's code."""

from __future__ import annotations

import argparse
import shlex

from harness.config import rules
from harness.config.load import load
from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks on this machine, or show how."""
    from harness.launch import local
    from harness.supervise import relaunch

    loaded = load(arguments.run_file, arguments.overrides)
    gpus = 0 if loaded.run.engine.device == "cpu" else local.num_gpus()
    rules.check(loaded, ranks=loaded.run.launch.ranks or max(1, gpus), has_gpu=gpus > 0)


    def plan() -> local.LaunchPlan:
        return local.plan(loaded, run_file=arguments.run_file, overrides=arguments.overrides)

    if arguments.print_only:
        print(shlex.join(plan().command))
        return EXIT_DONE
    return relaunch.launch(plan, run_dir=loaded.run.run_path, restarts=loaded.run.launch.restarts).code
