"""Seconds that DeepSpeed spends at every start for nothing, taken away: what it asks of the processor, and a compiler that it loads."""

from __future__ import annotations

import platform
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any


def hasten() -> None:
    """Make DeepSpeed's start quicker; call it before an optimizer or an engine is built.

    Loading an operator asks py-cpuinfo three times for the processor, which measures its clock for a second each time, and
    building a ZeRO engine imports the optimizer Muon, whose decorators load torch's compiler.
    """
    with suppress(ImportError):
        import cpuinfo

        if not hasattr(cpuinfo.get_cpu_info, "cache_info"):
            cpuinfo.get_cpu_info = cache(_quick(cpuinfo.get_cpu_info))
    _import_muon_uncompiled()


def processor(text: str) -> dict[str, Any] | None:
    """What DeepSpeed reads of py-cpuinfo's answer, from the text of /proc/cpuinfo on x86; None elsewhere."""
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    if not {"vendor_id", "flags"} <= fields.keys():
        return None
    return {"arch": "X86_64", "vendor_id_raw": fields["vendor_id"], "flags": sorted(fields["flags"].split())}


def _quick(thorough: Any) -> Any:
    def answer() -> dict[str, Any]:
        if platform.machine() in ("x86_64", "AMD64"):
            with suppress(OSError):
                if (found := processor(Path("/proc/cpuinfo").read_text(encoding="utf-8"))) is not None:
                    return found
        return thorough()

    return answer


def _import_muon_uncompiled() -> None:
    """Import what DeepSpeed imports to ask whether an optimizer is Muon; no run trains with it, so it need not be compiled."""
    import torch

    if "deepspeed.runtime.zero.muon.original_muon" in sys.modules:
        return
    compile_, torch.compile = torch.compile, _as_it_is
    try:
        with suppress(ImportError):
            import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        torch.compile = compile_


def _as_it_is(function: Any = None, **_: Any) -> Any:
    return function if function is not None else lambda decorated: decorated
