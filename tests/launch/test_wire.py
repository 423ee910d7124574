"""Starters of two hosts, here two processes of one: what befalls a rank or a host ends the job on both, with its name."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

from harness.errors import Failure
from harness.formats.outcome import read_outcome
from harness.launch import local, verdict, wire
from harness.launch import run as launches
from harness.launch.job import Job
from tests.launch import fake_ranks
from tests.launch.test_starter import HOST, all_gone, ups, when


@contextmanager
def two_hosts(folder, manner, *, silence_s=60.0):
    """One rank on each of two hosts; gives their starters once both ranks are up."""
    port = local.free_port()
    plans = [fake_ranks.plan(folder, manner, silence_s=silence_s, slots="1,1", node=node, port=port) for node in range(2)]
    children = [subprocess.Popen(plan.commands[0], start_new_session=True) for plan in plans]
    deadline = time.monotonic() + 30
    while not ups(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(2.5)  # a look or two, so that they have heard of each other
    try:
        yield children
    finally:
        for child in children:
            child.kill()
            child.wait()


def end(children, seconds: float) -> list[int]:
    started = time.monotonic()
    codes = [child.wait(timeout=30) for child in children]
    assert time.monotonic() - started < seconds
    return codes


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_on_both_hosts(tmp_path, rank):
    with two_hosts(tmp_path, "ignore") as children:
        os.kill(ups(tmp_path)[rank]["pid"], signal.SIGKILL)
        assert end(children, 6) == [75, 75] and all_gone(tmp_path)
    assert f"Rank {rank} on {HOST} was ended by SIGKILL" in read_outcome(tmp_path).reason


def test_a_rank_that_stands_still_on_the_other_host_is_named(tmp_path):
    with two_hosts(tmp_path, "ignore", silence_s=2.0) as children:
        os.kill(ups(tmp_path)[1]["pid"], signal.SIGSTOP)
        assert end(children, 10) == [75, 75] and all_gone(tmp_path)
    assert f"Rank 1 on {HOST} stood still (stopped)" in read_outcome(tmp_path).reason
    assert "state T" in (tmp_path / "attempts" / "0001" / "logs" / "stacks-00001-kernel.txt").read_text()


@pytest.mark.parametrize("lost", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_host_that_is_lost_is_named(tmp_path, lost):
    """Its starter stands still and its rank is gone, as when its cable is cut."""
    with two_hosts(tmp_path, "ignore") as children:
        children[lost].send_signal(signal.SIGSTOP)
        other = children[1 - lost]
        assert other.wait(timeout=15) == 75
        os.kill(ups(tmp_path)[lost]["pid"], signal.SIGKILL)
    if lost == 1:
        assert f"Host {HOST} (rank 1) is lost: nothing was heard of its starter" in read_outcome(tmp_path).reason


def test_ranks_that_end_well_on_one_host_after_the_other_are_no_loss(tmp_path):
    with two_hosts(tmp_path, "work") as children:
        for child in children:
            child.send_signal(signal.SIGTERM)
            time.sleep(1)
        assert end(children, 10) == [75, 75]
    assert read_outcome(tmp_path).state == "stopped"


def test_what_launched_the_job_hears_how_it_ended_although_it_does_not_see_the_folder_of_the_run(tmp_path):
    port = local.free_port()
    plans = [fake_ranks.plan(tmp_path, "ignore", slots="1,1", node=node, port=port) for node in range(2)]
    kill = when(lambda: ups(tmp_path), lambda: (time.sleep(2.5), os.kill(ups(tmp_path)[1]["pid"], signal.SIGKILL)))
    job = Job((str(tmp_path), "ignore"), (1, 1), port=port)
    told = launches.run(launches.LaunchPlan(tuple(plan.commands[0] for plan in plans), tmp_path / "elsewhere", job=job))
    kill.join()
    assert (told.state, told.code, told.attempt) == ("lost", 75, 1) and told.reason.startswith(f"Rank 1 on {HOST} was ended by SIGKILL"), told


def test_a_host_with_a_disk_of_its_own_does_not_fail_a_job_that_is_done(tmp_path):
    assert verdict.settle(verdict.Ended(False, None), tmp_path, started=time.time(), writes=False).code == 0


def test_strangers_and_starters_of_another_job_are_not_let_in():
    port = local.free_port()
    jobs = {word: Job((word,), (1, 1), port=port) for word in "abc"}
    first = wire.Wire(0, jobs["a"])
    stranger = socket.create_connection(("127.0.0.1", port + 1))
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n[1]\n\xff\xfe\n")
    other, own = (wire.Wire(1, jobs[word]) for word in "ba")
    other.receive()
    own.receive()
    other.send({"kind": "ended", "end": {}})
    own.send({"kind": "beats"})
    time.sleep(0.2)
    assert [message["kind"] for _, message in first.receive() + first.receive()] == ["beats"]
    with pytest.raises(Failure, match=f"port {port + 1}"):
        wire.Wire(0, jobs["c"])
    for one in (own, other, first, stranger):
        one.close()


@pytest.mark.parametrize("master", ["127.0.0.1", "::1"])
def test_starters_meet_over_either_ip(master):
    if ":" in master and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    job = Job((), (1, 1), master, local.free_port())
    first, own = (wire.Wire(node, job) for node in range(2))
    own.receive()
    own.send({"kind": "beats"})
    time.sleep(0.2)
    assert [message["kind"] for _, message in first.receive() + first.receive()] == ["beats"]
    first.close()
    own.close()


def test_a_broken_connection_is_made_anew(monkeypatch):
    monkeypatch.setattr(wire, "_RETRY_S", 0.1)
    job = Job((), (1, 1), port=local.free_port())
    first, own = (wire.Wire(node, job) for node in range(2))
    for _ in range(2):
        deadline, got = time.monotonic() + 5, []
        while not got and time.monotonic() < deadline:
            own.receive()
            own.send({"kind": "beats"})
            got = first.receive()
            time.sleep(0.05)
        assert got
        own._links[0]._socket.shutdown(socket.SHUT_RDWR)
    first.close()
    own.close()
