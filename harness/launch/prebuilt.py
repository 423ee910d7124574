"""Operators that came compiled with DeepSpeed, as in the images of `docker/`: which there are, and whether this processor can run them."""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

from harness.errors import Refused

NEED = "HARNESS_OPERATORS_NEED"


def holds(labels: tuple[str, ...], *, accelerator: str) -> bool:
    """Whether DeepSpeed will load all of these without compiling: it does so for the accelerator that it was built for alone.

    Args:
        labels: DeepSpeed's names of operators, such as cpu_adam.
        accelerator: cpu or cuda.
    """
    facts = _facts()
    installed = facts.get("installed_ops", {})
    return facts.get("accelerator_name") == accelerator and all(installed.get(label) for label in labels)


def refuse_foreign_processor() -> None:
    """Compare the processor with what the operators were compiled for: on another one they would end the process with SIGILL.

    Raises:
        Refused: this one lacks an instruction set that HARNESS_OPERATORS_NEED names.
    """
    missing = sorted(set(os.environ.get(NEED, "").split()) - processor_flags())
    if missing:
        raise Refused(
            f"DeepSpeed's operators in this image use instructions that this processor lacks: {', '.join(missing)}.",
            where=f"the image ({NEED})",
            remedy="Use a machine with a newer processor (Intel since 2013, AMD since 2015), or show the virtual machine its host's processor.",
        )


def processor_flags() -> set[str]:
    """The instruction sets of this machine, as Linux names them."""
    return set(flag_line().partition(":")[2].split())


def flag_line() -> str:
    """The line of /proc/cpuinfo that tells the instruction sets; where there is none, the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def _facts() -> dict[str, Any]:
    """What DeepSpeed's installation wrote down about itself, read without importing it."""
    found = importlib.util.find_spec("deepspeed")
    if found is None or not found.origin:
        return {}
    try:
        text = (Path(found.origin).parent / "git_version_info_installed.py").read_text(encoding="utf-8")
    except OSError:
        return {}
    assignments = [node for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments if isinstance(node.targets[0], ast.Name)}
