"""`harness launch`: start the ranks of a run where it says, pass on what they are asked, and answer with the outcome's code."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import rules
from harness.config.load import Loaded, load
from harness.errors import EXIT_DONE

if TYPE_CHECKING:
    from harness.launch.run import LaunchPlan


def run(arguments: argparse.Namespace) -> int:
    """Start the ranks where they are wanted, or show how."""
    loaded = load(arguments.run_file, arguments.overrides)
    return {"slurm": _slurm, "kubernetes": _kubernetes}.get(arguments.on, _from_here)(arguments, loaded)


def _from_here(arguments: argparse.Namespace, loaded: Loaded) -> int:
    """On this machine, or on hosts that it reaches: this process stays until all is over."""
    from harness.formats.running import refuse_occupied
    from harness.preflight import machine
    from harness.supervise import relaunch
    from harness.train.attempt import check_same_run

    if arguments.print_only:
        _show(_plan(loaded, arguments))
        return EXIT_DONE
    refuse_occupied(loaded.run.run_path)
    check_same_run(loaded)
    if arguments.on == "local":
        machine.refuse_unfit(loaded)
    return relaunch.launch(lambda: _plan(loaded, arguments), run_dir=loaded.run.run_path, restarts=loaded.run.launch.restarts).code


def _slurm(arguments: argparse.Namespace, loaded: Loaded) -> int:
    from harness.launch import slurm
    from harness.supervise import slurm as jobs
    from harness.train.attempt import check_same_run

    plan = slurm.plan(loaded, run_file=arguments.run_file, overrides=arguments.overrides, folder=Path.cwd())
    rules.check(loaded, ranks=sum(plan.slots), has_gpu=plan.uses_gpus, here=False)
    script = slurm.render(plan, loaded.run.launch.slurm, python=sys.executable, folder=Path.cwd())
    if arguments.print_only:
        print(script, end="")
        return EXIT_DONE
    check_same_run(loaded)
    return jobs.wait(jobs.submit(script, Path(plan.run_dir)), show_log=arguments.follow)


def _kubernetes(arguments: argparse.Namespace, loaded: Loaded) -> int:
    from harness.launch import kubernetes
    from harness.supervise import kubernetes as jobs

    plan = kubernetes.plan(loaded, overrides=arguments.overrides)
    rules.check(loaded, ranks=sum(plan.slots), has_gpu=plan.uses_gpus, here=False)
    settings = loaded.run.launch.kubernetes
    run_text = Path(arguments.run_file).read_text(encoding="utf-8")
    text = kubernetes.render(plan, settings, run_text=run_text, deepspeed_text=kubernetes.own_deepspeed(loaded))
    if arguments.print_only:
        print(text, end="")
        return EXIT_DONE
    job = jobs.KubernetesJob(kubernetes.job_name(plan, settings), settings.namespace, settings.kind)
    return jobs.launch(job, text, show_log=arguments.follow)


def _plan(loaded: Loaded, arguments: argparse.Namespace) -> LaunchPlan:
    """The launch as a value, refused before anything starts when its ranks cannot train this run."""
    from harness.launch import hosts, local, mpi

    words = {"run_file": arguments.run_file, "overrides": arguments.overrides}
    if arguments.on == "local":
        gpus = 0 if loaded.run.engine.device == "cpu" else local.num_gpus()
        rules.check(loaded, ranks=local.num_ranks(loaded), has_gpu=gpus > 0)
        return local.plan(loaded, **words)
    chosen = hosts.choose(loaded)
    if not arguments.print_only:
        chosen = hosts.check(loaded, chosen, run_file=arguments.run_file)
    rules.check(loaded, ranks=sum(chosen.values()), has_gpu=loaded.run.engine.device != "cpu")
    return (hosts if arguments.on == "hosts" else mpi).plan(loaded, chosen, **words)


def _show(plan: LaunchPlan) -> None:
    """The commands, and what they read, as they would be but for the values of secrets."""
    for path, text in plan.texts.items():
        print(f"# {path}\n{text}")
    for name, text in {**{str(path): text for path, text in plan.private.items()}, "the standard input of each command": plan.stdin}.items():
        if text:
            print(f"# {name}\n" + "".join(_masked(line) for line in text.splitlines(keepends=True)))
    for name, value in plan.environment.items():
        print("export " + _masked(f"{name}={shlex.quote(value)}"))
    for command in plan.commands:
        print(shlex.join(command))


def _masked(line: str) -> str:
    """`NAME=VALUE` without the value, where the name says that it is a secret."""
    return re.sub(r"(?i)^(\w*(?:TOKEN(?!IZER)|KEY|SECRET|PASSWORD|CREDENTIAL)\w*=).*", r"\1***", line)
