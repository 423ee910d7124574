"""`harness launch`: start the ranks of a run, pass on what it is asked, and answer with the outcome's code."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from harness.config import rules
from harness.config.load import Loaded, load
from harness.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks where they are wanted, or show how."""
    loaded = load(arguments.run_file, arguments.overrides)
    return {"local": _local, "slurm": _slurm, "kubernetes": _kubernetes}[arguments.on](arguments, loaded)


def _local(arguments: argparse.Namespace, loaded: Loaded) -> int:
    from harness.launch import local
    from harness.supervise import relaunch

    gpus = 0 if loaded.run.engine.device == "cpu" else local.num_gpus()
    rules.check(loaded, ranks=loaded.run.launch.ranks or max(1, gpus), has_gpu=gpus > 0)

    def plan() -> local.LaunchPlan:
        return local.plan(loaded, run_file=arguments.run_file, overrides=arguments.overrides)

    if arguments.print_only:
        print(shlex.join(plan().command))
        return EXIT_DONE
    return relaunch.launch(plan, run_dir=loaded.run.run_path, restarts=loaded.run.launch.restarts).code


def _slurm(arguments: argparse.Namespace, loaded: Loaded) -> int:
    from harness.launch import slurm
    from harness.supervise import slurm as jobs

    plan = slurm.plan(loaded, run_file=arguments.run_file, overrides=arguments.overrides, folder=Path.cwd())
    rules.check(loaded, ranks=sum(plan.slots), has_gpu=plan.uses_gpus, here=False)
    script = slurm.render(plan, loaded.run.launch.slurm, python=sys.executable, folder=Path.cwd())
    if arguments.print_only:
        print(script, end="")
        return EXIT_DONE
    return jobs.wait(jobs.submit(script, plan.run_dir), show_log=arguments.follow)


def _kubernetes(arguments: argparse.Namespace, loaded: Loaded) -> int:
    from harness.launch import kubernetes
    from harness.supervise import kubernetes as jobs

    plan = kubernetes.plan(loaded, overrides=arguments.overrides)
    rules.check(loaded, ranks=sum(plan.slots), has_gpu=plan.uses_gpus, here=False)
    settings = loaded.run.launch.kubernetes
    text = kubernetes.render(plan, settings, run_text=Path(arguments.run_file).read_text(encoding="utf-8"))
    if arguments.print_only:
        print(text, end="")
        return EXIT_DONE
    job = jobs.KubernetesJob(kubernetes.job_name(plan, settings), settings.namespace, settings.kind)
    return jobs.launch(job, text, show_log=arguments.follow)
