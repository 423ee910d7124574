"""DeepSpeed's compiled operators: built once per environment, behind a lock that a killed build cannot leave behind."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.errors import Failure
from harness.log import say
from harness.units import format_seconds

FOLDERS = {"ShareMemCommBuilder": "deepspeed_shm_comm", "CPUAdamBuilder": "cpu_adam", "AsyncIOBuilder": "async_io", "FusedAdamBuilder": "fused_adam"}
_BUILD = """
import sys
from deepspeed.accelerator import get_accelerator
builder = get_accelerator().create_op_builder(sys.argv[1])
builder.load(verbose=False)
"""


def folder() -> Path:
    """Where this environment's operators are: TORCH_EXTENSIONS_DIR, or a folder of the environment, or the user's cache."""
    if given := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(given)
    name = f"torch-{_version('torch')}-deepspeed-{_version('deepspeed')}"
    base = Path(sys.prefix) / "share" / "harness" / "operators"
    if not os.access(sys.prefix, os.W_OK):
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "harness" / "operators" / Path(sys.prefix).name
    return base / name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def environment() -> dict[str, str]:
    """What every rank's environment must hold: the operators' folder, this environment's programs first, threads, accelerator."""
    programs = str(Path(sys.prefix) / "bin")
    path = os.environ.get("PATH", "")
    values = {
        "TORCH_EXTENSIONS_DIR": str(folder()),
        "PATH": path if path.split(":")[0] == programs else f"{programs}:{path}",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "true"),
    }
    if num_gpus() == 0:
        values["DS_ACCELERATOR"] = os.environ.get("DS_ACCELERATOR", "cpu")
    return values


def num_gpus() -> int:
    """The NVIDIA GPUs that this process may use, counted without loading torch."""
    present = len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) or len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # DeepSpeed's launcher sets it on machines without a GPU, too
    if visible is None:
        return present
    return min(present, len([name for name in visible.split(",") if name.strip() and name.strip() != "-1"]))


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
    """
    missing = [name for name in names if not _built(name)]
    if not missing:
        return
    folder().mkdir(parents=True, exist_ok=True)
    with _locked(folder() / ".harness-build.lock", speak=speak):
        for name in [name for name in missing if not _built(name)]:
            stale = folder() / FOLDERS[name] / "lock"
            stale.unlink(missing_ok=True)  # left by a killed build: whoever builds through us holds our lock
            _build(name, speak=speak)


def _built(name: str) -> bool:
    place = folder() / FOLDERS[name]
    return any(place.glob("*.so")) and not (place / "lock").exists()


@contextmanager
def _locked(path: Path, *, speak: bool) -> Iterator[None]:
    """Hold an advisory lock, which the kernel releases when its holder dies."""
    with open(path, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if speak:
                say("Another process is building DeepSpeed's operators; waiting for it.")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _build(name: str, *, speak: bool) -> None:
    label, started = FOLDERS[name], time.monotonic()
    if speak:
        say(f"Compiling DeepSpeed's operator {label} (once per environment; a minute or so) ...")
    child = subprocess.Popen(
        [sys.executable, "-c", _BUILD, name], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment()
    )
    try:
        output = _watch(child, label, started, speak=speak)
    except BaseException:
        child.kill()
        child.wait()
        (folder() / label / "lock").unlink(missing_ok=True)
        raise
    if child.returncode:
        tail = "\n".join(output.strip().splitlines()[-15:])
        hint = "\nasync_io needs libaio's headers: install libaio-dev (Debian) or libaio-devel." if "aio" in label else ""
        raise Failure(f"DeepSpeed's operator {label} could not be built:\n{tail}{hint}")
    if speak:
        say(f"  {label} built in {format_seconds(time.monotonic() - started)}")


def _watch(child: subprocess.Popen[str], label: str, started: float, *, speak: bool) -> str:
    while True:
        try:
            return child.communicate(timeout=30)[0]
        except subprocess.TimeoutExpired:
            if speak:
                say(f"  still compiling {label}: {format_seconds(time.monotonic() - started)}")
