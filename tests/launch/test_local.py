"""`harness launch --on local`: the words of the command, and the port."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from harness.launch import local


def test_the_command():
    words = local.render(ranks=2, port=20123, run_file="run.yaml", overrides=["train.steps=3", "run_dir=a b"])
    assert words == (sys.executable, *"-m harness.launch.node --slots 2 --meet 127.0.0.1:20123 run.yaml train.steps=3".split(), "run_dir=a b")


def test_ports_are_free_differ_and_lie_below_the_ephemeral_range():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [local.free_port() for _ in range(20)]
    assert len(set(ports)) > 15
    assert all(local.FIRST_PORT <= port < first for port in ports)
    with socket.socket() as probe:
        probe.bind(("", ports[0]))


def test_a_taken_port_is_passed_over(monkeypatch):
    with socket.socket() as taken, socket.socket() as free:
        taken.bind(("", 0))
        taken.listen()
        free.bind(("", 0))
        wanted = free.getsockname()[1]
        free.close()
        choices = [taken.getsockname()[1], wanted]
        monkeypatch.setattr(local.random.SystemRandom, "sample", lambda self, population, k: choices)
        assert local.free_port() == wanted
