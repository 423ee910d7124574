"""Is the software of this machine fit to train: versions, operators and what they are compiled with, locks of dead builds. No torch is loaded."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sysconfig
import time
from pathlib import Path

from packaging.requirements import Requirement

from harness.errors import Failure, Refused
from harness.launch import locks, operators
from harness.preflight.findings import Finding, failed, passed, skipped, warned

SHOWN = ("torch", "deepspeed", "transformers")
COMPARED = (*SHOWN, "harness", "accelerate", "tokenizers", "datasets", "numpy", "mpi4py")


def requirements() -> list[Requirement]:
    """What this package asks of others, from its own metadata; empty where it is not installed."""
    try:
        stated = importlib.metadata.requires("harness") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [one for one in map(Requirement, stated) if one.marker is None or one.marker.evaluate({"extra": ""})]


def installed(name: str) -> str | None:
    """The version of a package that an import would find first, without importing it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(wanted: list[Requirement]) -> Finding:
    """Every package is there, in a version of the range that was tested."""
    name, wrong = "versions", []
    if not wanted:
        return skipped(name, "harness is not installed as a package, so its requirements are unknown (pip install -e .)")
    for one in wanted:
        found = installed(one.name)
        if found is None:
            wrong.append((one, "is missing"))
        elif not one.specifier.contains(found, prereleases=True):
            wrong.append((one, f"is {found}, not {one.specifier}"))
    if wrong:
        remedy = "pip install " + " ".join(f"'{one.name}{one.specifier}'" for one, _ in wrong)
        return failed(name, "; ".join(f"{one.name} {what}" for one, what in wrong) + ".", remedy)
    return passed(name, ", ".join(f"{name} {installed(name)}" for name in SHOWN))


def compiler(*, built: bool) -> Finding:
    """What DeepSpeed's operators are compiled with: a C++ compiler, ninja and Python's headers."""
    name, path = "compiler", operators.environment()["PATH"]
    missing = [(program, package) for program, package in (("c++", "g++"), ("ninja", "ninja-build")) if shutil.which(program, path=path) is None]
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(("Python.h", f"python{sysconfig.get_python_version()}-dev"))
    if not missing:
        return passed(name, "c++, ninja and Python's headers")
    what = f"There is no {', no '.join(what for what, _ in missing)} on this machine"
    remedy = f"apt-get install {' '.join(package for _, package in missing)}"
    if built:
        return warned(name, f"{what}; DeepSpeed's operators are compiled already, but nothing more can be.", remedy)
    return failed(name, f"{what}, so DeepSpeed's operators cannot be compiled.", remedy)


def libaio(*, nvme: bool) -> Finding:
    """The headers and library that NVMe offload is compiled with."""
    name = "libaio"
    if operators.is_built("AsyncIOBuilder"):
        return passed(name, "DeepSpeed's NVMe operator is compiled")
    tried = _preprocess("#include <libaio.h>\n")
    if tried:
        return passed(name, "headers are here")
    if nvme:
        return failed(name, "libaio's headers are missing, and the run offloads to NVMe.", "apt-get install libaio-dev   (Fedora: libaio-devel)")
    return skipped(name, "no headers; only NVMe offload needs them (apt-get install libaio-dev)")


def _preprocess(text: str) -> bool:
    """Whether there is a C++ compiler that finds what `text` includes."""
    program = shutil.which("c++")
    if program is None:
        return False
    return subprocess.run([program, "-E", "-x", "c++", "-"], input=text, text=True, capture_output=True, timeout=60).returncode == 0


def cuda_toolkit(torch_cuda: str | None, *, gpus: int, built: bool) -> Finding:
    """A CUDA compiler of the same major version as torch's: DeepSpeed's GPU operators are compiled with it.

    Args:
        torch_cuda: the version of CUDA that torch was built with; None for a CPU build.
        gpus: of this machine.
        built: whether those operators are compiled already.
    """
    name = "CUDA toolkit"
    if not gpus or torch_cuda is None:
        return skipped(name, "no GPU to compile for")
    found = nvcc_version()
    if found is not None and found.split(".")[0] == torch_cuda.split(".")[0]:
        return passed(name, f"nvcc {found}, torch has CUDA {torch_cuda}")
    what = f"nvcc is {found}" if found else "There is no nvcc"
    remedy = f"Install the CUDA {torch_cuda} toolkit and export CUDA_HOME=/usr/local/cuda-{torch_cuda}."
    return (warned if built else failed)(name, f"{what}, but torch was built with CUDA {torch_cuda}.", remedy)


def nvcc_version() -> str | None:
    """The release of the CUDA compiler that DeepSpeed would take: that of CUDA_HOME, else on the PATH, else /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    program = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        shown = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"release (\d+\.\d+)", shown)
    return match.group(1) if match else None


def compiled(names: list[str], *, build: bool) -> Finding:
    """DeepSpeed's operators that a run would load.

    Args:
        names: builders.
        build: compile now what is missing.
    """
    name = "operators"
    try:
        operators.refuse_foreign_processor(names)
        if build:
            operators.build(names, speak=True)
    except Refused as error:
        return failed(name, error.problem, error.remedy)
    except Failure as error:
        return failed(name, str(error), "Mend what the compiler says, then: harness doctor --build")
    missing = [label for builder in names if not operators.is_built(builder) for label in operators.FOLDERS[builder]]
    if missing:
        return passed(name, f"{', '.join(missing)}: compiled at the first launch, a minute or more each (now: harness doctor --build)")
    return passed(name, "came compiled with DeepSpeed" if all(map(operators.came_built, names)) else f"compiled, in {operators.folder()}")


def build_locks() -> Finding:
    """Locks that a killed build of an operator left behind: whatever loads the operator waits for ever, silently."""
    name, folder = "build locks", operators.folder()
    held = {lock: locks.owners(lock) for lock in sorted(folder.glob("*/lock")) if _age_s(lock) > locks.UNOWNED_S}
    stale = [str(lock) for lock, owners in held.items() if not owners]
    if stale:
        return warned(
            name,
            f"A killed build left {', '.join(stale)}: other programs that load this operator wait for ever.",
            f"rm {' '.join(stale)}   (`harness launch` and `harness doctor --build` do it, too)",
        )
    busy = [f"{lock.parent.name} by process {owners[0]}" for lock, owners in held.items()]
    return passed(name, f"being built: {', '.join(busy)}" if busy else "none")


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # taken away meanwhile
        return 0.0
