"""`harness doctor` on one machine: a good one passes in silence; each planted fault is found by name, with a remedy.

Faults are planted for real: limits of a child, small disks and other /etc/hosts in a mount namespace, packages ahead on the path.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

from harness.preflight import host, shared_memory
from harness.preflight.findings import Finding


@cache
def _no_namespaces() -> str:
    if os.geteuid() != 0:
        return "mounts in a namespace need root"
    return (
        ""
        if subprocess.run(["unshare", "--mount", "--uts", "true"], capture_output=True).returncode == 0
        else "this machine gives no mount namespaces"
    )


@dataclass
class Machine:
    """A process with something wrong around it.

    Attributes:
        mounts: shell lines to carry out first, in a mount and UTS namespace of its own.
        limits: (which, soft and hard) of setrlimit.
        environment: variables that differ.
        start: words in front of the command.
    """

    mounts: str = ""
    limits: list[tuple[int, int]] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    start: list[str] = field(default_factory=list)

    def run(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run a command there."""
        command = [*self.start, *map(str, words)]
        if self.mounts:
            if reason := _no_namespaces():
                pytest.skip(reason)
            command = ["unshare", "--mount", "--uts", "bash", "-ec", f'{self.mounts}\nexec "$@"', "-", *command]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=180, env=os.environ | self.environment, preexec_fn=self._limit, stdin=subprocess.DEVNULL
        )

    def _limit(self) -> None:
        for which, value in self.limits:
            resource.setrlimit(which, (value, value))

    def find(self, expression: str) -> Finding:
        """What a check finds there; the expression sees the modules of harness.preflight."""
        code = f"import json\nfrom pathlib import Path\nfrom harness.preflight import gpus, host, shared_memory, software, speed\nprint(json.dumps(vars({expression})))"
        done = self.run(sys.executable, "-c", code)
        assert done.returncode == 0, done.stderr
        return Finding(**json.loads(done.stdout.splitlines()[-1]))


def _program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _package(folder: Path, name: str, version: str) -> None:
    place = folder / f"{name}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def _broken(finding: Finding, *words: str, state: str = "fail") -> None:
    """It has that state, names what is wrong, and says what to type."""
    assert finding.state == state, finding
    assert all(word in finding.what + finding.remedy for word in words) and finding.remedy, finding


def test_this_machine_passes_in_silence():
    machine = Machine() if _no_namespaces() else Machine("mount -t tmpfs tmpfs /dev/shm")  # where other tests' dead runs leave nothing
    done = machine.run(sys.executable, "-m", "harness", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    (report,) = told["machines"]
    assert told["version"] == 1 and told["state"] in ("pass", "warn") and len(report["findings"]) >= 18
    names = [finding["name"] for finding in report["findings"]]
    assert len(set(names)) == len(names)
    loud = [
        finding
        for finding in report["findings"]
        if finding["state"] == "warn" and finding["name"] not in ("memory bandwidth", "host memory", "disk", "torch")
    ]
    assert not loud, loud  # those four may be true of a small, busy machine


def test_people_read_lines_and_the_code_says_that_a_check_failed():
    done = Machine(limits=[(resource.RLIMIT_NOFILE, 128)]).run(sys.executable, "-m", "harness", "doctor")
    assert done.returncode == 4, done.stdout + done.stderr
    assert "fail  open files: A process may open 128 files" in done.stdout and "      remedy: " in done.stdout
    assert "1 of " in done.stderr and "checks failed" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("limit", "state"), [(128, "fail"), (512, "warn"), (1024, "pass")])
def test_few_open_files(limit, state):
    finding = Machine(limits=[(resource.RLIMIT_NOFILE, limit)]).find("host.open_files()")
    assert finding.state == state and (state == "pass" or "nofile" in finding.remedy)


def _without_the_right_to_lock() -> list[str]:
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root is above the limit, and there is no setpriv to take that away")
    return ["setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock"]


def test_little_memory_may_be_locked():
    machine = Machine(limits=[(resource.RLIMIT_MEMLOCK, 64 << 10)], start=_without_the_right_to_lock())
    _broken(machine.find("host.locked_memory(nvme=True)"), "64.0 KiB", "NVMe offload", "ulimit -l unlimited", state="warn")
    assert machine.find("host.judge_locked_memory(65536, exempt=False, needed_by=[])").state == "pass"


def test_small_shared_memory():
    machine = Machine("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    _broken(machine.find("shared_memory.room(ranks=2, gpu=False)"), "64.0 MiB", "132.0 MiB", "mount -o remount", "--shm-size")
    _broken(Machine("mount -t tmpfs -o size=512m tmpfs /dev/shm").find("shared_memory.room(ranks=8, gpu=True)"), "NCCL", state="warn")


def test_leftovers_of_a_dead_run_but_not_those_of_a_living_one(tmp_path):
    names = ("deepspeed_allreduce_buffer_0_h0_29500_0", "deepspeed_allreduce_buffer_0_h0_29500_1", "somebody-elses")
    old = time.time() - 1000
    for name in names:
        (tmp_path / name).write_bytes(bytes(1 << 20))
        os.utime(tmp_path / name, (old, old))
    hold = "import mmap, sys\nwith open(sys.argv[1], 'r+b') as f:\n  m = mmap.mmap(f.fileno(), 0)\nprint('up', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / names[0])], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline()
        finding = shared_memory.leftovers(tmp_path)
    _broken(finding, names[1], "1.0 MiB", "rm ", state="warn")
    assert names[0] not in finding.what and "somebody" not in finding.what
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).unlink()
    assert shared_memory.leftovers(tmp_path).state == "pass"


def test_a_lock_of_a_dead_build(tmp_path):
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    machine = Machine(environment={"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert machine.find("software.build_locks()").state == "pass", "a lock so young may be that of a build"
    os.utime(lock, (time.time() - 60,) * 2)
    _broken(machine.find("software.build_locks()"), str(lock), f"rm {lock}", "--build", state="warn")
    with open(lock):
        assert f"by process {os.getpid()}" in machine.find("software.build_locks()").what


def test_no_compiler(tmp_path):
    machine = Machine(environment={"PATH": str(tmp_path)})
    _broken(machine.find("software.compiler(built=False)"), "no c++", "apt-get install g++")
    _broken(machine.find("software.compiler(built=True)"), "compiled already", state="warn")


def test_no_headers_of_libaio(tmp_path):
    if shutil.which("c++") is None:
        pytest.skip("there is no compiler whose headers could be taken away")
    _program(tmp_path / "c++", f'exec {shutil.which("c++")} -nostdinc "$@"')
    machine = Machine(environment={"PATH": f"{tmp_path}:{os.environ['PATH']}", "TORCH_EXTENSIONS_DIR": str(tmp_path)})
    _broken(machine.find("software.libaio(nvme=True)"), "libaio-dev")
    assert machine.find("software.libaio(nvme=False)").state == "skip"


@pytest.mark.slow
def test_a_compiler_that_fails(tmp_path):
    _program(tmp_path / "c++", "echo planted: out of registers >&2; exit 1")
    machine = Machine(
        environment={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CXX": str(tmp_path / "c++"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "operators")}
    )
    _broken(machine.find("software.compiled(['CPUAdamBuilder'], build=True)"), "cpu_adam could not be built", "--build")


def test_a_wrong_version(tmp_path):
    _package(tmp_path, "torch", "1.13.1")
    machine = Machine(environment={"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"})
    _broken(machine.find("software.versions(software.requirements())"), "torch is 1.13.1", "pip install 'torch", "2.14")


def test_a_missing_package():
    finding = Machine().find("software.versions([software.Requirement('absent-package-of-a-test>=3'), software.Requirement('psutil')])")
    _broken(finding, "absent-package-of-a-test is missing", "pip install 'absent-package-of-a-test>=3'")
    assert "psutil" not in finding.what


def test_a_torch_that_does_not_load(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')\n")
    finding = Machine(environment={"PYTHONPATH": str(tmp_path)}).run(sys.executable, "-c", "import torch")
    assert finding.returncode == 1
    machine = Machine(environment={"PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"})
    _broken(machine.find("gpus.torch_gpus(gpus.ask_torch(), present=0, wanted=True)"), "libcudart.so.13", "pip install")


GPU = "NVIDIA H100 80GB HBM3, 580.65.06, 81559, {used}, {errors}"


@pytest.mark.parametrize(
    ("script", "state", "words"),
    [
        (f"echo '{GPU.format(used=4, errors=0)}'; echo '{GPU.format(used=4, errors=0)}'", "pass", ["2 x NVIDIA H100"]),
        (f"echo '{GPU.format(used=4, errors=0)}'; echo '{GPU.format(used=4, errors=3)}'", "fail", ["GPU 1", "3 uncorrected", "nvidia-smi -q"]),
        (f"echo '{GPU.format(used=70000, errors=0)}'", "warn", ["GPU 0 holds 68.4 GiB", "query-compute-apps"]),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9", "fail", ["could not communicate", "dmesg"]),
    ],
)
def test_what_the_driver_says(tmp_path, script, state, words):
    _program(tmp_path / "nvidia-smi", script)
    finding = Machine(environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"}).find("gpus.driver(gpus.ask_driver())")
    assert finding.state == state and all(word in finding.what + finding.remedy for word in words), finding


def test_gpus_that_torch_does_not_see():
    built_for_cpu = Machine().find("gpus.torch_gpus({'cuda': None, 'devices': [], 'told': ''}, present=8, wanted=True)")
    _broken(built_for_cpu, "CPU build", "8 GPUs")
    hidden = Machine(environment={"CUDA_VISIBLE_DEVICES": ""}).find(
        "gpus.torch_gpus({'cuda': '13.0', 'devices': [], 'told': ''}, present=8, wanted=True)"
    )
    _broken(hidden, "sees none of 8", "unset CUDA_VISIBLE_DEVICES")


def test_a_cuda_toolkit_of_another_version(tmp_path):
    (tmp_path / "bin").mkdir()
    _program(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    machine = Machine(environment={"CUDA_HOME": str(tmp_path)})
    _broken(machine.find("software.cuda_toolkit('13.0', gpus=1, built=False)"), "nvcc is 12.4", "CUDA 13.0", "CUDA_HOME=")
    assert machine.find("software.cuda_toolkit('12.8', gpus=1, built=False)").state == "pass"


DEBIAN = 'hostname planted; printf "127.0.0.1 localhost\\n127.0.1.1 planted\\n" > {0}/hosts; mount --bind {0}/hosts /etc/hosts'


def test_a_name_that_leads_to_loopback(tmp_path):
    machine = Machine(DEBIAN.format(tmp_path))
    _broken(machine.find("host.own_name(hosts=2)"), "planted is 127.0.1.1", "GLOO_SOCKET_IFNAME=", "/etc/hosts", state="warn")
    assert machine.find("host.own_name(hosts=1)").state == "pass"
    machine.environment["GLOO_SOCKET_IFNAME"] = "absent7"
    _broken(machine.find("host.own_name(hosts=2)"), "absent7", "export GLOO_SOCKET_IFNAME=")


def test_an_environment_file_that_the_launcher_dies_of(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n# threads\n")
    machine = Machine(environment={"HOME": str(tmp_path)})
    _broken(machine.find("host.environment_file()"), ".deepspeed_env:2", "sed -i 2d")
    (tmp_path / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=lo\n")
    assert machine.find("host.environment_file()").state == "pass"
    assert machine.find("host.own_name(hosts=1)").what.endswith("gloo uses lo")


@pytest.mark.parametrize(("size", "state"), [("1m", "fail"), ("1g", "warn")])
def test_a_full_disk(tmp_path, size, state):
    finding = Machine(f"mount -t tmpfs -o size={size} tmpfs {tmp_path}").find(f"host.disk(Path('{tmp_path}/runs/new'))")
    _broken(finding, "free", "df -h", state=state)


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    _broken(host.disk(tmp_path / "file" / "run"), "is a file", "run_dir")
    read_only = Machine(f"mount -t tmpfs -o ro tmpfs {tmp_path}").find(f"host.disk(Path('{tmp_path}/run'))")
    _broken(read_only, "cannot be written", "run_dir")


def test_the_nvme_folder(tmp_path):
    find: Callable[..., Finding] = lambda machine, folder: machine.find(f"speed.nvme({str(folder)!r}, speeds={{}})")  # noqa: E731
    _broken(find(Machine(), tmp_path / "absent"), "no folder", "mkdir -p", "engine.nvme_dir")
    _broken(find(Machine(f"mount -t tmpfs -o ro tmpfs {tmp_path}"), tmp_path), "cannot be written", "engine.nvme_dir")
    _broken(find(Machine(f"mount -t tmpfs -o size=8m tmpfs {tmp_path}"), tmp_path), "No space left", "df -h")
    _broken(find(Machine(f"mount -t tmpfs tmpfs {tmp_path}"), tmp_path), "on tmpfs", state="warn")
    good = find(Machine(), tmp_path)
    assert "written" in good.what and good.state in ("pass", "warn") and not list(tmp_path.iterdir())


def test_a_control_group_with_little_memory(tmp_path):
    group = Path("/sys/fs/cgroup/memory/harness-doctor-test")
    machine = Machine(mounts="")
    if os.geteuid() == 0 and group.parent.is_dir():
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(1 << 30))
        except OSError:
            pytest.skip("this machine gives no memory control group")
        machine.start = ["bash", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "-"]
        try:
            _broken(machine.find("host.memory()"), "control group allows 1.0 GiB", "--memory", state="warn")
        finally:
            group.rmdir()
        return
    (tmp_path / "a" / "b").mkdir(parents=True)  # a version 2 tree: the limit stands above the group
    (tmp_path / "a" / "memory.max").write_text("1073741824\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    (tmp_path / "groups").write_text("0::/a/b\n")
    assert host.cgroup_limit(tmp_path, tmp_path / "groups") == 1 << 30


def _run_file(folder: Path, **more: object) -> Path:
    values = {
        "run_dir": str(folder / "run"),
        "data": {"dir": str(folder / "data"), "train": {"builtin": "python-qa"}, "train_tokenizer": {}},
        "model": {"architecture": {"model_type": "gpt2"}},
        "train": {"steps": 1, "global_batch_rows": 2},
        "launch": {"ranks": 2},
    }
    (folder / "run.yaml").write_text(json.dumps(values | more))
    return folder / "run.yaml"


def test_launch_warns_of_little_memory_to_lock_where_the_run_offloads_to_nvme(tmp_path):
    """Left alone, DeepSpeed ends in a segmentation fault."""
    path = _run_file(tmp_path, engine={"deepspeed": "zero3_offload_nvme", "nvme_dir": str(tmp_path / "nvme")})
    limits = [(resource.RLIMIT_NOFILE, 128), (resource.RLIMIT_MEMLOCK, 64 << 10)]
    done = Machine(limits=limits, start=_without_the_right_to_lock()).run(sys.executable, "-m", "harness", "launch", path)
    told = done.stdout + done.stderr
    assert done.returncode == 2 and "warning: locked memory: Only 64.0 KiB may be locked, and NVMe offload locks" in told, told


def test_launch_refuses_a_machine_that_would_break_the_run(tmp_path):
    done = Machine(limits=[(resource.RLIMIT_NOFILE, 128)]).run(sys.executable, "-m", "harness", "launch", _run_file(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "open files: A process may open 128 files" in done.stderr and "remedy:" in done.stderr and not (tmp_path / "run").exists()


def test_the_quick_checks_are_quick_and_light(tmp_path):
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {"run_dir": str(tmp_path / "run"), "data": {"dir": "data"}, "model": {"path": "gpt2"}, "train": {"steps": 1, "global_batch_rows": 2}}
        )
    )
    code = f"""
import sys, time
from harness.config.load import load
loaded = load({str(tmp_path / "run.yaml")!r})
from harness.preflight import machine
began = time.perf_counter()
found = machine.quick(loaded)
print(time.perf_counter() - began, [one.state for one in found], [name for name in ("torch", "deepspeed", "numpy") if name in sys.modules])
"""
    done = Machine().run(sys.executable, "-c", code)
    assert done.stdout.endswith("['pass', 'pass', 'pass', 'pass', 'pass'] []\n") and float(done.stdout.split()[0]) < 0.5, done
