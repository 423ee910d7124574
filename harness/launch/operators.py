"""DeepSpeed's compiled operators: built once per environment, behind a lock that a killed build cannot leave behind."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import cgroup
from harness.errors import Failure
from harness.launch import locks, prebuilt
from harness.log import say
from harness.units import format_seconds

FOLDERS = {  # of each builder, in the order in which it loads them
    "ShareMemCommBuilder": ("deepspeed_shm_comm",),
    "CPUAdamBuilder": ("cpu_adam",),
    "AsyncIOBuilder": ("pin_memory", "async_io"),
    "FusedAdamBuilder": ("fused_adam",),
}
HINTS = {
    "AsyncIOBuilder": "It needs libaio's headers: install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora).",
    "FusedAdamBuilder": "It needs the CUDA toolkit (nvcc) of the version that torch was built with, and CUDA_HOME naming it.",
}
PROGRESS_S = 15.0
_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder(sys.argv[1]).load(verbose=False)
"""


def folder() -> Path:
    """Where this environment's operators are: TORCH_EXTENSIONS_DIR, or a folder of the environment, or the user's cache.

    The name holds what the code depends on: the versions, and the processor, for whose instructions it is compiled.
    Those that came with DeepSpeed (`prebuilt`) are not here.
    """
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    name = f"torch-{_version('torch')}-deepspeed-{_version('deepspeed')}-{_processor()}"
    if os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "share" / "harness" / "operators" / name
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "harness" / "operators" / f"{name}-{_digest(sys.prefix)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _processor() -> str:
    """The instruction set of this machine, as a short name."""
    return f"{platform.machine()}-{_digest(prebuilt.flag_line())}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def environment(*, ranks: int = 0) -> dict[str, str]:
    """What every rank must find: the operators' folder, this environment's programs first, threads, the accelerator.

    Args:
        ranks: on this host, to share its cores among; 0 when unknown: then a rank has one thread.
    """
    programs = str(Path(sys.prefix) / "bin")
    path = os.environ.get("PATH", "")
    threads = max(1, cgroup.cores() // ranks) if ranks else 1
    values = {
        "TORCH_EXTENSIONS_DIR": str(folder()),
        "PATH": path if path.split(":")[0] == programs else f"{programs}:{path}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
    }
    if num_gpus() == 0:
        values["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    if targets := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        values["TORCH_CUDA_ARCH_LIST"] = re.sub(r"(\d+\.\d+)[af]", r"\1", targets)  # DeepSpeed 0.19.8 cannot read 9.0a (builder.py, l. 710)
    return values


def num_gpus() -> int:
    """The NVIDIA GPUs that this process may use, counted without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # DeepSpeed's launcher sets it on machines without a GPU, too
    present = _present_gpus()
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))


def _present_gpus() -> int:
    """GPUs of this host; a container may see the device files alone, or the driver's folder alone, or more of one."""
    places = (("/dev", "nvidia[0-9]*"), ("/proc/driver/nvidia/gpus", "*"))
    counts = [len(list(Path(place).glob(pattern))) for place, pattern in places]
    return min((count for count in counts if count), default=0)


def needed(*, optimizer_offload: str, nvme: bool, gpu: bool) -> list[str]:
    """The builders that a run loads.

    Args:
        optimizer_offload: none, cpu or nvme.
        nvme: whether anything is offloaded to NVMe.
        gpu: whether it trains on a GPU.
    """
    names = [] if gpu else ["ShareMemCommBuilder"]
    if optimizer_offload != "none":
        names.append("CPUAdamBuilder")
    elif gpu:
        names.append("FusedAdamBuilder")
    return [*names, "AsyncIOBuilder"] if nvme else names


def build(names: list[str], *, speak: bool) -> None:
    """Build what is missing; other processes that need it wait for it.

    Args:
        names: DeepSpeed's builders.
        speak: announce and show progress.

    Raises:
        Failure: with the compiler's last words.
        Refused: they came compiled, for another processor.
    """
    tell = say if speak else _silent
    refuse_foreign_processor(names)
    if all(is_built(name) for name in names):
        return
    folder().mkdir(parents=True, exist_ok=True)
    waiting = "Another process is building DeepSpeed's operators; waiting for it ..."
    with locks.exclusive(folder() / ".building", notice=lambda: tell(waiting)) as held:
        for name in names:
            stale = [_clear(folder() / label / "lock", tell) for label in FOLDERS[name]]
            if any(stale) or not is_built(name):
                _compile(name, held, tell)


def refuse_foreign_processor(names: list[str]) -> None:
    """Refuse operators that came compiled, and for other processors than this one.

    Raises:
        Refused: with what this processor lacks.
    """
    if any(came_built(name) for name in names):
        prebuilt.refuse_foreign_processor()


def _silent(text: str) -> None:
    """Say nothing."""


def _clear(lock: Path, tell: Callable[[str], None]) -> bool:
    name = lock.parent.name
    stale = locks.clear(
        lock, notice=lambda pids: tell(f"Waiting for process {pids[0]}, which builds or loads {name} ...")
    )
    if stale:
        tell(f"Removed the lock that a killed build of {name} left behind.")
    return stale


def is_built(name: str) -> bool:
    """Whether a builder's operators are compiled, here or with DeepSpeed."""
    places = [folder() / label for label in FOLDERS[name]]
    return came_built(name) or all(any(place.glob("*.so")) and not (place / "lock").exists() for place in places)


def came_built(name: str) -> bool:
    """Whether a builder's operators came compiled with DeepSpeed, for the accelerator that is used."""
    accelerator = os.environ.get("DS_ACCELERATOR") or ("cuda" if num_gpus() else "cpu")
    return prebuilt.holds(FOLDERS[name], accelerator=accelerator)


def _compile(name: str, held: int, tell: Callable[[str], None]) -> None:
    """Build in a process that inherits our lock: it stays taken even if we are killed and the compiler is not."""
    label, started = FOLDERS[name][-1], time.monotonic()
    tell(f"Compiling DeepSpeed's operator {label} (once per environment; a minute or more) ...")
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            [sys.executable, "-c", _BUILD, name],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | environment() | _headers(),
            pass_fds=(held,),
            start_new_session=True,
        )
        try:
            _watch(child, name, started, tell)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            for place in FOLDERS[name]:
                (folder() / place / "lock").unlink(missing_ok=True)
            raise
        if child.returncode:
            output.seek(0)
            tail = "\n".join(output.read().strip().splitlines()[-15:])
            raise Failure(
                "\n".join(filter(None, (f"DeepSpeed's operator {label} could not be built:", tail, HINTS.get(name))))
            )
    tell(f"  {label} is ready after {format_seconds(time.monotonic() - started)}")


def _headers() -> dict[str, str]:
    """Where a CUDA toolkit of the compiler alone lacks its libraries' headers, those that came with torch serve; its own go first."""
    found = importlib.util.find_spec("nvidia")
    places = [str(path) for place in (found and found.submodule_search_locations) or () for path in sorted(Path(place).glob("*/include"))]
    given = os.environ.get("CPLUS_INCLUDE_PATH", "")  # searched after everything that the build names itself
    return {"CPLUS_INCLUDE_PATH": os.pathsep.join(filter(None, (given, *places)))} if places else {}


def _watch(child: subprocess.Popen[bytes], name: str, started: float, tell: Callable[[str], None]) -> None:
    while True:
        try:
            child.wait(timeout=PROGRESS_S)
            return
        except subprocess.TimeoutExpired:
            tell(f"  still compiling {_progress(name)}: {format_seconds(time.monotonic() - started)}")


def _progress(name: str) -> str:
    """The folder that is being built and how many of its files are compiled, as far as ninja's own files tell."""
    active = [folder() / label for label in FOLDERS[name] if (folder() / label / "build.ninja").exists()]
    if not active:
        return FOLDERS[name][0]
    rules = (active[-1] / "build.ninja").read_text(encoding="utf-8").splitlines()
    objects = sum(line.startswith("build ") and ".o:" in line for line in rules)
    return f"{active[-1].name} ({len(list(active[-1].glob('*.o')))} of {objects} files)"
