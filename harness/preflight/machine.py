"""Is this machine fit to train: all checks of it, and the few that `harness launch` makes before anything is loaded."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from pathlib import Path

from harness import cgroup
from harness.config.deepspeed import offload_device, read_deepspeed
from harness.config.load import Loaded
from harness.errors import Refused
from harness.launch import operators
from harness.launch.roll_call import code_digest
from harness.log import say
from harness.preflight import gpus, host, shared_memory, software, speed
from harness.preflight.findings import Finding, Report


@dataclass(frozen=True)
class Purpose:
    """What the machine shall do; the default is what one knows without a run file.

    Attributes:
        run_dir: where the run would write; the current folder when unknown.
        nvme_dir: where it would offload to; None for nowhere.
        ranks: on this machine; 0: one a GPU, and one a core up to two without GPUs.
        hosts: that train together.
        cpu: whether it asks for no GPU.
        optimizer: where it keeps the optimizer's state: none, cpu or nvme; None when unknown: then the operators of every offload are looked at.
    """

    run_dir: str = "."
    nvme_dir: str | None = None
    ranks: int = 0
    hosts: int = 1
    cpu: bool = False
    optimizer: str | None = None


def purpose_of(loaded: Loaded, *, hosts: int = 1) -> Purpose:
    """The purpose that a run file states, whatever this machine has: it may be that of others."""
    run = loaded.run
    config, _ = read_deepspeed(loaded)
    optimizer, parameters = (offload_device(config, what) for what in ("optimizer", "param"))
    nvme = "nvme" in (optimizer, parameters)
    ranks = -(-(run.launch.ranks or 0) // hosts)
    return Purpose(str(run.run_path.absolute()), run.engine.nvme_dir if nvme else None, ranks, hosts, run.engine.device == "cpu", optimizer)


def examine(purpose: Purpose, *, build: bool = False) -> Report:
    """Make every check of this machine; takes seconds, most of them for loading torch in a process of its own.

    Args:
        purpose: what it shall do.
        build: compile the operators that are missing.
    """
    report, speeds = Report(socket.gethostname()), dict[str, float]()
    driver = gpus.ask_driver()
    present = max(len(driver.gpus), operators.num_gpus())
    seen = gpus.ask_torch()
    gpu = present > 0 and not purpose.cpu
    builders = builders_of(purpose, gpu=gpu)
    built = all(operators.is_built(name) for name in builders)
    report.findings = [
        software.versions(software.requirements()),
        gpus.driver(driver),
        gpus.torch_gpus(seen, present=present, wanted=not purpose.cpu),
        software.build_locks(),
        software.compiler(built=built),
        software.libaio(nvme=purpose.nvme_dir is not None),
        software.cuda_toolkit(seen.get("cuda"), gpus=present if gpu else 0, built=built),
        software.compiled(builders, build=build),
        *_quick(purpose, gpu=gpu),
        shared_memory.leftovers(),
        host.memory(),
        host.environment_file(),
        speed.memory(speeds=speeds),
        speed.nvme(purpose.nvme_dir, speeds=speeds),
    ]
    report.facts = {
        "versions": {name: software.installed(name) for name in software.COMPARED}
        | {"python": platform.python_version(), "CUDA of torch": seen.get("cuda")},
        "code": code_digest(),
        "gpus": [gpu["name"] for gpu in driver.gpus],
        "driver": sorted({gpu["driver"] for gpu in driver.gpus}),
        "speeds": speeds,
    }
    return report


def quick(loaded: Loaded, *, hosts: int = 1) -> list[Finding]:
    """What would certainly break a run on this machine, in milliseconds and without torch.

    Args:
        loaded: the run file.
        hosts: that train together.
    """
    gpu = loaded.run.engine.device != "cpu" and operators.num_gpus() > 0
    return _quick(purpose_of(loaded, hosts=hosts), gpu=gpu)


def refuse_unfit(loaded: Loaded, *, hosts: int = 1) -> None:
    """Say what `quick` warns of.

    Raises:
        Refused: with what it found broken.
    """
    findings = quick(loaded, hosts=hosts)
    for finding in findings:
        if finding.state == "warn":
            say(f"warning: {finding.name}: {finding.what}\n  remedy: {finding.remedy}")
    if broken := [finding for finding in findings if finding.state == "fail"]:
        raise Refused(
            "\n".join(f"{one.name}: {one.what}" for one in broken),
            where=f"this machine, {socket.gethostname()}",
            remedy="\n          ".join(one.remedy for one in broken),
        )


def _quick(purpose: Purpose, *, gpu: bool) -> list[Finding]:
    ranks = purpose.ranks or (operators.num_gpus() if gpu else min(2, cgroup.cores()))
    return [
        shared_memory.room(ranks=ranks, gpu=gpu),
        host.open_files(),
        host.own_name(hosts=purpose.hosts),
        host.disk(Path(purpose.run_dir)),
        host.locked_memory(nvme=purpose.nvme_dir is not None),
    ]


def builders_of(purpose: Purpose, *, gpu: bool) -> list[str]:
    """The builders of the operators that a machine loads.

    Args:
        purpose: what it shall do.
        gpu: whether it does so on GPUs.
    """
    if purpose.optimizer is not None:
        return operators.needed(optimizer_offload=purpose.optimizer, nvme=purpose.nvme_dir is not None, gpu=gpu)
    names = [name for name in operators.FOLDERS if (name == "FusedAdamBuilder") <= gpu and (name == "ShareMemCommBuilder") <= (not gpu)]
    return [name for name in names if name != "AsyncIOBuilder" or operators.is_built(name)]
