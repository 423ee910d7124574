"""Whether every host of a run answers, and has the same software, the same code and the same run file: asked before each start.

On a host it is `python -m harness.launch.roll_call RUN.yaml`, which prints what that host has.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import harness
from harness.files import digest_file, digest_text
from harness.launch.operators import num_gpus

PACKAGES = ("torch", "deepspeed", "transformers", "numpy", "safetensors")
LIMIT_S = 60.0


def facts(run_file: str) -> dict[str, Any]:
    """What this host has, as JSON."""
    return {
        "python": ".".join(map(str, sys.version_info[:3])), "versions": {name: _version(name) for name in PACKAGES}, "code": code_digest(),
        "run file": digest_file(Path(run_file)) if Path(run_file).is_file() else None, "gpus": num_gpus(),
    }


def code_digest() -> str:
    """A digest of this package's own files, the same wherever they are."""
    root = Path(harness.__file__).parent
    files = sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json"))
    return digest_text(*(part for path in files for part in (path.relative_to(root).as_posix(), digest_file(path))))[:16]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def ask(hosts: Sequence[str], run_file: str, *, ssh: Sequence[str]) -> dict[str, dict[str, Any] | str]:
    """What each host has, or why it does not say.

    Args:
        hosts: names.
        run_file: its path, the same on all hosts.
        ssh: the words before a host's name.
    """
    here = ("localhost", "127.0.0.1", socket.gethostname())
    words = f"cd {shlex.quote(os.getcwd())} && PYTHONPATH={shlex.quote(os.environ.get('PYTHONPATH', ''))} "
    words += shlex.join([sys.executable, "-m", "harness.launch.roll_call", run_file])
    with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(lambda host: _ask(["sh", "-c", words] if host in here else [*ssh, host, words]), hosts), strict=True))


def _ask(command: list[str]) -> dict[str, Any] | str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL, check=False)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"it did not answer within {LIMIT_S:.0f} s"
    except OSError as error:
        return f"{command[0]} cannot be started here: {error.strerror}"
    except (ValueError, IndexError):
        return (done.stderr.strip().splitlines() or ["it does not answer"])[-1]


def problems(told: Mapping[str, dict[str, Any] | str], own: dict[str, Any], *, slots: Mapping[str, int], needs_gpus: bool) -> dict[str, str]:
    """What is wrong with each host, compared with this one; hosts that pass are left out.

    Args:
        told: what `ask` has found.
        own: `facts` of this host.
        slots: ranks of each host.
        needs_gpus: each rank needs a GPU.
    """
    found = {host: _problem(answer, own, slots=slots[host], needs_gpus=needs_gpus) for host, answer in told.items()}
    return {host: problem for host, problem in found.items() if problem}


def _problem(answer: dict[str, Any] | str, own: dict[str, Any], *, slots: int, needs_gpus: bool) -> str:
    if isinstance(answer, str):
        return answer
    for name, here in {"python": own["python"], **own["versions"]}.items():
        if (there := {"python": answer["python"], **answer["versions"]}.get(name)) != here:
            return f"it has {name} {there}, this host {here}"
    if answer["code"] != own["code"]:
        return "its code of the harness differs from that of this host"
    if answer["run file"] != own["run file"]:
        return "it has no such run file" if answer["run file"] is None else "its run file differs from that of this host"
    if needs_gpus and slots > answer["gpus"]:
        return f"the hostfile gives it {slots} slots, but it has {answer['gpus']} GPUs"
    return ""


if __name__ == "__main__":
    print(json.dumps(facts(sys.argv[1])))
