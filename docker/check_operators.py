"""Do DeepSpeed's operators in this image load as they are, and run on every processor that it is for?

usage: python docker/check_operators.py BUILDER [BUILDER ...]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

from deepspeed.accelerator import get_accelerator

DISPATCHES_ITSELF = "deepspeed_shm_comm"  # asks the processor at each start which of its kernels may run


def main(names: list[str]) -> int:
    """Load each; 1 when one was not compiled beforehand, or holds 512-bit instructions."""
    faults = []
    for name in names:
        module = get_accelerator().create_op_builder(name).load(verbose=False)
        place = Path(module.__file__ or "")
        print(f"{name}: {place}, {place.stat().st_size / 2**20:.1f} MiB")
        faults += _faults(module, place)
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


def _faults(module: ModuleType, place: Path) -> list[str]:
    faults = []
    if not place.is_relative_to(sys.prefix):
        faults.append(f"{module.__name__} was compiled just now, not with the image: {place}")
    code = subprocess.run(["objdump", "--disassemble", str(place)], check=True, capture_output=True, text=True).stdout
    if "%zmm" in code and DISPATCHES_ITSELF not in module.__name__:
        faults.append(f"{module.__name__} holds 512-bit instructions, which many processors lack")
    return faults


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
