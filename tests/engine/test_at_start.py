"""What is answered in DeepSpeed's place at a start is what it would have found itself."""

from __future__ import annotations

import subprocess
import sys

from harness.engine.at_start import processor

CHECK = """
import sys, torch, cpuinfo
thorough, compile_ = cpuinfo.get_cpu_info(), torch.compile
from deepspeed.ops.op_builder import CPUAdamBuilder
flags = CPUAdamBuilder().cxx_args()
from harness.engine.at_start import hasten
hasten(); hasten()
quick = cpuinfo.get_cpu_info()
assert cpuinfo.get_cpu_info() is quick
assert all(quick[name] == thorough[name] for name in ("arch", "vendor_id_raw") if name in thorough), (quick, thorough)
assert CPUAdamBuilder().cxx_args() == flags, "an operator that is built is not built anew"
assert torch.compile is compile_ and "deepspeed.runtime.zero.muon.original_muon" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
"""


def test_the_answers_are_the_same():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_processor_that_is_not_known_is_asked_thoroughly():
    known = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx2 avx\n\nprocessor\t: 1\nvendor_id\t: other\n"
    assert processor(known) == {"arch": "X86_64", "vendor_id_raw": "GenuineIntel", "flags": ["avx", "avx2", "fpu"]}
    assert processor("processor\t: 0\nFeatures\t: fp asimd\n") is None
