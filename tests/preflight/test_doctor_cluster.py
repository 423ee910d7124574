"""`harness doctor --hosts` on hosts in namespaces, and under mpirun: good ones pass in silence, each planted fault is found by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.preflight import cluster, ranks
from harness.preflight.findings import Finding, Report
from tests.cluster.hosts import Cluster, missing

DOCTOR = (sys.executable, "-m", "harness", "doctor")
BUSY = ("memory bandwidth", "equal memory bandwidth", "host memory", "disk")
"""What may be true of a small, busy machine."""
LATE_CLOCK = "import time\n_now = time.time\ntime.time = lambda: _now() - 60\n"


def _doctor(hosts: Cluster, *words: object, env: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    done = hosts.run(0, *DOCTOR, "--json", *words, env=os.environ | (env or {}), timeout=240)
    assert done.stdout.startswith("{"), done.stderr
    return done.returncode, json.loads(done.stdout)


def _loud(told: dict[str, Any]) -> list[dict[str, Any]]:
    found = [*told["together"], *(finding for machine in told["machines"] for finding in machine["findings"])]
    return [finding for finding in found if finding["state"] in ("warn", "fail") and finding["name"] not in BUSY]


def _together(told: dict[str, Any], name: str) -> dict[str, Any]:
    return next(finding for finding in told["together"] if finding["name"] == name)


def test_a_good_cluster_passes_in_silence(hosts):
    code, told = _doctor(hosts(3), "--hosts", hosts(3).hostfile)
    assert code == 0 and not _loud(told), _loud(told)
    assert told["hosts"] == ["h0", "h1", "h2"] and [machine["host"] for machine in told["machines"]] == told["hosts"]
    assert {finding["name"] for finding in told["together"]} >= {"hosts", "equal versions", "equal code", "clocks", "connections", "shared folder"}


@pytest.fixture(scope="module")
def sick(tmp_path_factory):
    """A cluster of four with a fault in each place, and what was found there."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("sick")
    run_dir, plants, root = folder / "run", folder / "plants", Path(cluster.__file__).parents[1]
    run_dir.mkdir()
    plants.mkdir()
    (folder / "cluster").mkdir()
    (folder / "run.yaml").write_text(
        json.dumps({"run_dir": str(run_dir), "data": {"dir": "data"}, "model": {"path": "gpt2"}, "train": {"steps": 1, "global_batch_rows": 4}})
    )
    (folder / "units.py").write_text((root / "units.py").read_text() + "\n# changed\n")
    four = Cluster(folder / "cluster", 4)
    try:
        four.hostfile.write_text("h0 slots=1\nh1 slots=1\nh2 slots=2\nh3 slots=1\nh9 slots=1\n")
        four.write_hosts(1, four.read_hosts(1).replace("10.77.0.11 h1", "127.0.1.1 h1"))
        four.own_folder(1, run_dir)
        four.own_folder(1, plants)
        four.run(1, "bash", "-c", f"echo '{LATE_CLOCK}' > {plants}/sitecustomize.py")
        four.own_folder(2, plants)
        four.run(
            2,
            "bash",
            "-c",
            f"mkdir {plants}/tokenizers-0.0.1.dist-info; printf 'Metadata-Version: 2.1\\nName: tokenizers\\nVersion: 0.0.1\\n' > {plants}/tokenizers-0.0.1.dist-info/METADATA",
        )
        assert four.run(2, "mount", "--bind", folder / "units.py", root / "units.py").returncode == 0
        assert four.run(2, "ip", "route", "add", "prohibit", "10.77.0.11/32").returncode == 0
        four.run(2, "mount", "-o", "remount,size=1m", "/dev/shm")
        four.link(3, up=False)
        path = f"{plants}:{os.environ['PYTHONPATH']}"
        yield _doctor(four, "--hosts", four.hostfile, "--run", folder / "run.yaml", env={"PYTHONPATH": path})
    finally:
        four.down()


def test_the_code_says_that_checks_failed(sick):
    code, told = sick
    assert code == 4 and told["state"] == "fail" and len(told["hosts"]) == 5
    assert [machine["host"] for machine in told["machines"]] == ["h0", "h1", "h2"], "those that answer are examined"


def test_hosts_that_cannot_be_reached(sick):
    silent = [finding for finding in sick[1]["together"] if finding["name"] == "hosts"]
    assert [finding["what"].split()[0] for finding in silent] == ["h3", "h9"]
    assert "timed out" in silent[0]["what"] or "No route" in silent[0]["what"]
    assert "resolve" in silent[1]["what"] and all(f"ssh {name}" in finding["remedy"] for name, finding in zip(("h3", "h9"), silent, strict=True))


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("equal code", "fail", ["h2 runs"]),
        ("equal versions", "fail", ["h2 has tokenizers 0.0.1", "pip install tokenizers=="]),
        ("clocks", "warn", ["h1 is 60.", "behind", "chronyc makestep"]),
        ("connections", "fail", ["h2 -> h1: ", "firewall"]),
        ("shared folder", "warn", ["another folder on h1", "run_dir"]),
    ],
)
def test_what_differs_between_hosts(sick, name, state, words):
    finding = _together(sick[1], name)
    assert finding["state"] == state and all(word in finding["what"] + finding["remedy"] for word in words), finding


@pytest.mark.parametrize(
    ("host", "name", "words"), [("h1", "own name", ["127.0.1.1", "GLOO_SOCKET_IFNAME=eth0"]), ("h2", "shared memory", ["1.0 MiB", "remount"])]
)
def test_what_is_wrong_with_one_host(sick, host, name, words):
    states = {machine["host"]: finding for machine in sick[1]["machines"] for finding in machine["findings"] if finding["name"] == name}
    assert [other for other, finding in states.items() if finding["state"] in ("fail", "warn")] == [host], states
    assert all(word in states[host]["what"] + states[host]["remedy"] for word in words), states[host]


def test_nothing_of_the_doctor_stays(sick, tmp_path_factory):
    assert not [path for path in tmp_path_factory.getbasetemp().rglob(".harness-doctor-*")]


def test_a_hostfile_that_cannot_be_read(tmp_path):
    for text, told in (("h0 slots=2\nh1 slot=2\n", "hostfile:2"), ("h0 slots=2\nh0 slots=2\n", "names h0 a second time"), ("", "names no host")):
        (tmp_path / "hostfile").write_text(text)
        done = subprocess.run([*DOCTOR, "--hosts", str(tmp_path / "hostfile")], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and told in done.stderr and "remedy" in done.stderr, done.stderr


def _report(host: str, **facts: Any) -> Report:
    usual: dict[str, Any] = {"versions": {"torch": "2.13.0"}, "code": "c", "gpus": ["H100"] * 8, "speeds": {}, "hostname": host}
    return Report(host, [], usual | facts)


def _states(reports: list[Report]) -> dict[str, Finding]:
    return {finding.name: finding for finding in cluster.compare(reports)}


def test_gpus_names_and_speeds_that_differ():
    odd = _states([_report("h0"), _report("h1", gpus=["A100"] * 8), _report("h2", hostname="h0")])
    assert odd["equal GPUs"].state == "warn" and "h1 has A100" in odd["equal GPUs"].what
    assert odd["host names"].state == "fail" and "h0" in odd["host names"].what
    assert _states([_report("h0"), _report("h1", gpus=[]), _report("h2")])["equal GPUs"].state == "fail"
    slow = _states([_report(f"h{n}", speeds={"nvme_read": speed}) for n, speed in enumerate((3e9, 3.2e9, 1e9, 2.9e9))])
    assert slow["equal NVMe reading"].state == "warn" and "h2" in slow["equal NVMe reading"].what


def test_rows_name_the_hosts_that_a_finding_holds_for():
    wrong, fine = Finding("disk", "fail", "full", "df"), Finding("disk", "pass", "much")
    reports = [Report(f"h{n}", [wrong if n % 2 else fine]) for n in range(12)]
    assert cluster.Diagnosis([], reports).rows() == [("h1, h3, h5, h7 and 2 more", wrong)]
    assert cluster.Diagnosis([], [Report("h0", [fine]), Report("h1", [fine])]).rows() == [("h0, h1", fine)]


@pytest.mark.parametrize("count", [2, 3, 5, 8, 32, 40])
def test_every_pair_is_tried_and_nobody_twice_at_a_time(count):
    seen = []
    for pairs in ranks.rounds(list(range(count))):
        members = [who for pair in pairs for who in pair]
        assert len(set(members)) == len(members)
        seen += pairs
    assert len(set(seen)) == len(seen) == (count * (count - 1) // 2 if count <= ranks.MOST_PLACES else count - 1)


def test_slow_links_are_named():
    speeds = {(a, b): 1e9 for a, b in (("h0", "h1"), ("h0", "h3"), ("h1", "h3"))}
    assert ranks.judge_links(speeds).state == "pass" and ranks.judge_links({}).state == "skip"
    host = ranks.judge_links(speeds | {(f"h{n}", "h2"): 1e8 for n in (0, 1, 3)})
    assert host.state == "warn" and "h2 at best" in host.what and "<->" not in host.what
    cable = ranks.judge_links(speeds | {("h0", "h3"): 1e8})
    assert cable.state == "warn" and "h0 <-> h3" in cable.what and "at best" not in cable.what


MPI = {  # the last two for more ranks than cores, in versions 4 and 5
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun (Debian: apt-get install openmpi-bin)")


@needs_mpi
def test_ranks_of_mpirun_meet_and_measure():
    done = subprocess.run(
        ["mpirun", "-n", "2", *DOCTOR, "--json"], capture_output=True, text=True, timeout=240, env=os.environ | MPI, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    loud = [finding for finding in _loud(told) if finding["name"] != "leftovers of dead runs"]  # those of other tests
    assert not loud, loud
    assert "2 ranks" in _together(told, "meeting")["what"] and "/s a link" in _together(told, "all-reduce")["what"]
    assert _together(told, "links")["state"] == "pass" and len(told["machines"]) == 1


@needs_mpi
@pytest.mark.slow
def test_a_slow_cable_is_named(hosts, tmp_path):
    three = hosts(3, fresh=True)
    shaped = three.run(2, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "64kb", "latency", "200ms")
    if shaped.returncode:
        pytest.skip(f"this kernel cannot slow a cable down: {shaped.stderr.strip()}")
    done = three.run(
        0,
        "mpirun",
        "--hostfile",
        three.hostfile,
        "-n",
        "3",
        "--mca",
        "btl_tcp_if_include",
        "eth0",
        "-x",
        "PATH",
        "-x",
        "PYTHONPATH",
        *DOCTOR,
        "--json",
        env=os.environ | MPI,
        timeout=400,
    )
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert done.returncode == 0 and len(told["machines"]) == 3, done.stderr
    links = _together(told, "links")
    assert links["state"] == "warn" and "h2 at best" in links["what"] and "ethtool" in links["remedy"], links
