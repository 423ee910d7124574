"""Are the GPUs of this machine there, healthy and free, and does torch see them: asked in processes of their own, for a sick GPU hangs its caller."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.preflight.findings import Finding, failed, passed, skipped, warned
from harness.units import format_bytes

QUERY = "name,driver_version,memory.total,memory.used,ecc.errors.uncorrected.volatile.total"
DRIVER_S, TORCH_S = 30.0, 120.0
_ASK_TORCH = """
import json, math, sys, warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    import torch
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
devices = []
for index in range(count):
    seen = {"name": torch.cuda.get_device_name(index), "sum": None, "error": ""}
    try:
        ones = torch.ones(512, 512, device=f"cuda:{index}", dtype=torch.bfloat16)
        seen["sum"] = float((ones @ ones).float().mean())
    except Exception as error:
        seen["error"] = str(error).splitlines()[0]
    devices.append(seen)
words = " ".join(str(one.message) for one in told if "CUDA" in str(one.message))
print(json.dumps({"cuda": torch.version.cuda, "devices": devices, "told": words}))
"""


@dataclass(frozen=True)
class Driver:
    """What the driver says.

    Attributes:
        devices: files of GPUs in /dev.
        gpus: one a GPU: name, driver, total_bytes, used_bytes, ecc_errors.
        error: why nvidia-smi gave no answer; empty when it did, or when there is none.
    """

    devices: int = 0
    gpus: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def ask_driver() -> Driver:
    """Ask nvidia-smi."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=DRIVER_S
        )
    except FileNotFoundError:
        return Driver(devices)
    except subprocess.TimeoutExpired:
        return Driver(devices, error=f"no answer within {DRIVER_S:.0f} s")
    if done.returncode:
        return Driver(
            devices, error=(done.stdout + done.stderr).strip().splitlines()[0] if (done.stdout + done.stderr).strip() else f"code {done.returncode}"
        )
    return Driver(devices, [_gpu(row) for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row])


def _gpu(row: list[str]) -> dict[str, Any]:
    name, driver, total, used, errors = row
    number = {key: int(text) if text.isdigit() else 0 for key, text in (("total", total), ("used", used), ("errors", errors))}
    return {"name": name, "driver": driver, "total_bytes": number["total"] << 20, "used_bytes": number["used"] << 20, "ecc_errors": number["errors"]}


def driver(seen: Driver) -> Finding:
    """The driver answers, and each GPU is healthy and free."""
    name = "GPU driver"
    if seen.error:
        return failed(
            name,
            f"nvidia-smi: {seen.error}.",
            "Load or mend the driver (dmesg | grep -i nvrm tells); after an update of the driver restart the machine.",
        )
    if not seen.gpus:
        return (
            skipped(name, "no NVIDIA GPU")
            if not seen.devices
            else warned(
                name,
                f"/dev has {seen.devices} NVIDIA GPUs, but there is no nvidia-smi.",
                "apt-get install nvidia-utils, or start the container with --gpus all.",
            )
        )
    if sick := [f"GPU {index} has {gpu['ecc_errors']} uncorrected memory errors" for index, gpu in enumerate(seen.gpus) if gpu["ecc_errors"]]:
        return failed(
            name,
            f"{', '.join(sick)}.",
            "nvidia-smi -q -d ECC,ROW_REMAPPER; reset or replace the GPU, or leave it out: export CUDA_VISIBLE_DEVICES=...",
        )
    if busy := [
        f"GPU {index} holds {format_bytes(gpu['used_bytes'])}" for index, gpu in enumerate(seen.gpus) if gpu["used_bytes"] > 0.1 * gpu["total_bytes"]
    ]:
        return warned(
            name, f"{', '.join(busy)} of another process.", "nvidia-smi --query-compute-apps=pid,used_memory --format=csv   shows which; end it."
        )
    kinds = sorted({gpu["name"] for gpu in seen.gpus})
    if len(kinds) > 1:
        return warned(
            name, f"GPUs of several kinds: {', '.join(kinds)}; all wait for the slowest.", "Leave some out: export CUDA_VISIBLE_DEVICES=..."
        )
    return passed(name, f"{len(seen.gpus)} x {kinds[0]}, driver {seen.gpus[0]['driver']}")


def ask_torch() -> dict[str, Any]:
    """What torch says of the GPUs: cuda, devices, told; or error."""
    try:
        done = subprocess.run([sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=TORCH_S)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {TORCH_S:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": (done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1]}
    return json.loads(lines[-1])


def torch_gpus(seen: dict[str, Any], *, present: int, wanted: bool) -> Finding:
    """torch loads, sees the GPUs that are there, and each one multiplies.

    Args:
        seen: as `ask_torch` answered.
        present: GPUs of this machine, as the driver or /dev say.
        wanted: False when the run asks for the CPU.
    """
    name, visible = "torch", os.environ.get("CUDA_VISIBLE_DEVICES")
    if "error" in seen:
        return failed(name, f"torch cannot be used: {seen['error']}.", "python -c 'import torch'   shows all; pip install --force-reinstall torch")
    devices = seen["devices"]
    if wrong := [f"cuda:{index}: {one['error'] or one['sum']}" for index, one in enumerate(devices) if one["sum"] != 512.0]:
        return failed(
            name,
            f"A matrix product went wrong on {'; '.join(wrong)}.",
            "nvidia-smi -q; reset the GPU or leave it out: export CUDA_VISIBLE_DEVICES=...",
        )
    if devices:
        return passed(name, f"sees {len(devices)} of {max(present, len(devices))} GPUs, CUDA {seen['cuda']}")
    if not wanted or (present == 0 and seen["cuda"] is None):
        return passed(name, "CPU" if seen["cuda"] is None else f"CPU, as asked; built with CUDA {seen['cuda']}")
    if present and seen["cuda"] is None:
        return failed(
            name, f"torch is a CPU build on a machine with {present} GPUs.", "pip install --force-reinstall torch   from an index with CUDA builds"
        )
    if present == 0:
        return warned(
            name,
            f"torch is built with CUDA {seen['cuda']}, but this machine has no GPU: training is on the CPU.",
            "Set engine.device: cpu if that is meant; in a container, start it with --gpus all.",
        )
    why = (
        f"CUDA_VISIBLE_DEVICES={visible}"
        if visible is not None and not visible.replace("-1", "").strip()
        else seen["told"] or "the driver may be too old"
    )
    return failed(
        name,
        f"torch sees none of {present} GPUs: {why}.",
        "unset CUDA_VISIBLE_DEVICES"
        if why.startswith("CUDA_VISIBLE")
        else f"Install a driver for CUDA {seen['cuda']}, or a torch for the driver's (nvidia-smi shows it).",
    )
