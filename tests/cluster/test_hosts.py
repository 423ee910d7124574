"""The hosts that other tests run on are hosts: names, ssh, cables, crashes; and nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.cluster.hosts import Cluster


def _everything() -> set[str]:
    """Mounts and network devices of this machine."""
    return set(Path("/proc/mounts").read_text().splitlines()) | set(os.listdir("/sys/class/net"))


def test_hosts_are_apart_and_reach_each_other(hosts):
    cluster = hosts(2)
    assert [cluster.run(number, "hostname").stdout.strip() for number in range(2)] == ["h0", "h1"]
    over = cluster.run(0, "ssh", "h1", "hostname; hostname -I; ls -A /dev/shm; cat /etc/hosts")
    assert over.stdout.split()[:2] == ["h1", "10.77.0.11"] and "127.0.1.1" not in over.stdout, over
    assert cluster.run(1, "ls", "-A", "/dev/shm").stdout == ""
    cluster.write_hosts(1, cluster.read_hosts(1) + "10.77.0.10 other\n")
    assert cluster.run(1, "ssh", "-o", "HostKeyAlias=h0", "other", "hostname").stdout == "h0\n"


def test_a_host_may_have_a_disk_of_its_own(hosts, tmp_path):
    cluster = hosts(2)
    cluster.own_folder(1, tmp_path, size="1m")
    assert cluster.run(0, "touch", tmp_path / "here").returncode == 0
    assert (tmp_path / "here").exists() and cluster.run(1, "ls", tmp_path).stdout == ""


def test_a_pulled_cable_is_silence(hosts):
    cluster = hosts(2)
    cluster.link(1, up=False)
    try:
        assert cluster.run(0, "ssh", "-o", "ConnectTimeout=1", "h1", "true").returncode == 255
    finally:
        cluster.link(1, up=True)
    assert cluster.run(0, "ssh", "h1", "true").returncode == 0


def test_commands_get_signals_and_die_with_their_starter(hosts):
    cluster = hosts(2)
    told = cluster.start(0, "bash", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done", stdout=subprocess.PIPE)
    assert told.stdout.readline() == "up\n"
    cluster.inner(told).send_signal(signal.SIGTERM)
    assert told.wait(10) == 7
    told.stdout.close()
    killed = cluster.start(0, "sleep", "60")
    child = cluster.inner(killed)
    assert [process.name() for process in cluster.processes(0)] == ["sleep"]
    killed.kill()
    killed.wait()
    psutil.wait_procs([child], timeout=5)
    assert not cluster.processes(0)


@pytest.mark.usefixtures("hosts")
def test_nothing_stays(tmp_path):
    before = _everything()
    cluster = Cluster(tmp_path, 2)
    spaces = {os.readlink(f"/proc/{pid}/ns/pid") for pid in cluster._inits}
    left = cluster.start(0, "ssh", "h1", "sleep 600")
    cluster.crash(1)
    cluster.down()
    left.wait(10)
    alive = [process for process in psutil.pids() if os.path.exists(f"/proc/{process}/ns/pid") and _space(process) in spaces]
    assert not alive and _everything() == before


def _space(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""
