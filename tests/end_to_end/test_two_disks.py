"""Two hosts with disks of their own for the run's folder, through `harness train` on each: resumed from the newest step that both hold."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import harness
from tests.end_to_end.faults import events, losses

PORT = 29517


def train(cluster, run_file: Path, *words: str) -> list[str]:
    """One rank a host, with its own mounts and name; what each printed, once both have ended well."""
    ranks = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": cluster.address(0),
                            "MASTER_PORT": str(PORT)}
        command = [sys.executable, "-m", "harness", "train", run_file, *words]
        ranks.append(cluster.start(rank, *command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    told = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(told)
    return told


@pytest.mark.slow
def test_one_host_a_checkpoint_behind(hosts, run_file, tmp_path):
    cluster, run_dir = hosts(2), tmp_path / "run"
    run_dir.mkdir()
    cluster.own_folder(1, run_dir)
    assert harness("prepare", run_file).code == 0
    told = train(cluster, run_file, "engine.deepspeed=zero3")
    assert f"{run_dir} is on 2 disks: h0; h1. Each keeps the checkpoint files of its own ranks." in told[0], told[0]
    whole = losses(run_dir)
    assert len(whole) == 8

    def listed(host: int, path: Path) -> set[str]:
        return set(cluster.run(host, "ls", path).stdout.split())

    for host in range(2):
        assert {"step-000004", "step-000008"} <= listed(host, run_dir / "checkpoints")
        assert listed(host, run_dir / "checkpoints" / "step-000008") == {f"disk-{host}", "manifest.json", f"rank-{host:05d}-000.safetensors"}
    assert "metrics.jsonl" not in listed(1, run_dir) and "rank-00001.log" in listed(1, run_dir / "attempts" / "0001" / "logs")
    assert cluster.run(1, "rm", "-r", run_dir / "checkpoints" / "step-000008").returncode == 0

    told = train(cluster, run_file, "engine.deepspeed=zero3")
    reason = "step-000008 was not saved on all disks: h1 lacks it"
    assert f"Checkpoint passed over: {reason}" in told[0] and "Resuming from step-000004" in told[0] and "brought" not in told[0], told[0]
    assert [event["reason"] for event in events(run_dir, "skip")] == [reason]
    assert losses(run_dir) == whole, "bit for bit"

    for verb in (["verify", run_dir], ["export", run_dir, "--to", tmp_path / "folder"]):
        refused = harness(*verb)
        assert refused.code == 2 and "1 of the 2 files of this checkpoint are on the disks of other hosts: h1." in refused.output, refused.output
    away = tmp_path / "away"
    assert cluster.run(1, "cp", "-r", run_dir / "checkpoints", away).returncode == 0
    assert cluster.run(0, "cp", "-r", f"{away}/step-000008/.", run_dir / "checkpoints" / "step-000008").returncode == 0
    assert harness("verify", run_dir).code == 0 and harness("export", run_dir, "--to", tmp_path / "folder").code == 0
