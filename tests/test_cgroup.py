"""How many cores a process may use under the quotas of the groups around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from harness import cgroup
from harness.launch import operators

V1 = "sys/fs/cgroup/cpu"


@pytest.mark.parametrize(
    "group, files, cores",
    [
        ("0::/pod/leaf\n", {"sys/fs/cgroup/pod/cpu.max": "150000 100000\n", "sys/fs/cgroup/pod/leaf/cpu.max": "max 100000\n"}, 2),
        ("0::/pod\n", {"sys/fs/cgroup/cpu.max": "10000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ("4:cpu,cpuacct:/docker/abc\n5:memory:/x\n", {f"{V1}/cpu.cfs_quota_us": "400000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 4),
        ("4:cpu:/\n", {f"{V1}/cpu.cfs_quota_us": "-1\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpu:/\n", {f"{V1}/cpu.cfs_quota_us": "6400000\n", f"{V1}/cpu.cfs_period_us": "100000\n"}, 8),
        ("", {}, 8),
    ],
)
def test_cores_under_quotas(tmp_path, monkeypatch, group, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    for path, text in {"proc/self/cgroup": group, **files}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert cgroup.cores(tmp_path) == cores


def test_ranks_have_threads_for_their_quota_alone(tmp_path, monkeypatch):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("400000 100000\n")
    cores = cgroup.cores
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(cgroup, "cores", lambda root=Path("/"): cores(tmp_path))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert operators.environment(ranks=2)["OMP_NUM_THREADS"] == "2"
