"""What the doctor takes to other hosts: a purpose that does not depend on the machine that asks, and the port of their ssh."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.config.load import load
from harness.launch import operators
from harness.preflight import remote
from harness.preflight.machine import Purpose, builders_of, purpose_of


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: r\ndata: {dir: d}\nmodel: {path: m}\ntrain: {steps: 1}\nengine: {deepspeed: zero1}\n")
    return path


def test_a_purpose_is_that_of_the_run_not_of_this_machine(run_file, monkeypatch):
    told = []
    for present in (0, 8):
        monkeypatch.setattr(operators, "num_gpus", lambda present=present: present)
        told.append(purpose_of(load(run_file), hosts=2))
    assert told[0] == told[1] and builders_of(told[0], gpu=True) == ["FusedAdamBuilder"]


@pytest.mark.parametrize(
    "purpose, gpu, builders",
    [
        (Purpose(optimizer="none"), False, ["ShareMemCommBuilder"]),
        (Purpose(optimizer="cpu"), True, ["CPUAdamBuilder"]),
        (Purpose(optimizer="nvme", nvme_dir="/nvme"), True, ["CPUAdamBuilder", "AsyncIOBuilder"]),
    ],
)
def test_a_machine_knows_what_it_loads_for_a_purpose(purpose, gpu, builders):
    assert builders_of(purpose, gpu=gpu) == builders
    assert "FusedAdamBuilder" in builders_of(Purpose(), gpu=True) and "FusedAdamBuilder" not in builders_of(Purpose(), gpu=False)


def test_ssh_goes_to_the_port_of_the_run_file(tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text(f"""#!/bin/sh\necho "$@" > {tmp_path}/words\nfor last; do :; done\nexec sh -c "$last"\n""")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with remote.Hosts(["h0"], port=2222) as hosts:
        assert len(hosts) == 1 and not hosts.silent
    assert " -p 2222 h0 " in (tmp_path / "words").read_text()


def test_settings_of_the_run_file_may_be_replaced(run_file):
    def doctor(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "harness", "doctor", *words], capture_output=True, text=True)

    told = doctor("--run", str(run_file), "--json", "run_dir=/proc/nowhere")
    assert "/proc/nowhere" in told.stdout and told.returncode == 4, told.stdout + told.stderr
    wrong = doctor("--run", str(run_file), "engine.devise=cpu")
    assert wrong.returncode == 2 and "engine.devise" in wrong.stderr
    alone = doctor("run_dir=/x")
    assert alone.returncode == 2 and "--run" in alone.stderr
