"""A run as a Kubernetes job of two pods, each with the manifest's own words on a host of its own; the cluster around them is a stand-in (`pods.py`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from harness.formats import ledger
from harness.formats.outcome import last_step, read_outcome
from harness.launch import operators
from harness.testing.models import tiny_architecture
from tests.cluster.api import Api
from tests.cluster.pods import Controller
from tests.end_to_end.conftest import QUESTIONS
from tests.end_to_end.faults import assert_same

USER = 1000


@pytest.fixture(scope="module")
def claim(tmp_path_factory) -> Path:
    """What the pods share: the data, and this machine's operators, which an image would hold."""
    folder = tmp_path_factory.mktemp("claim")
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"prompt": question, "completion": answer}) + "\n" for question, answer in QUESTIONS))
    shutil.copytree(operators.folder() / "deepspeed_shm_comm", folder / "operators" / "deepspeed_shm_comm")
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(folder)], check=True)
    return folder


@pytest.fixture(scope="module")
def run_file(claim, tmp_path_factory) -> Path:
    """A tiny GPT-2 in float32 for two pods, which find it in a ConfigMap."""
    values = {
        "run_dir": "/mnt/reference",
        "data": {
            "dir": "/mnt/data", "train": {"path": "/mnt/pairs.jsonl"}, "validation_share": 0.2, "shape": "prompt_completion",
            "sequence_length": 64, "train_tokenizer": {"vocab_size": 320},
        },
        "model": {"architecture": tiny_architecture("gpt2", width=32, dropout=0.1)},
        "train": {"steps": 60, "global_batch_rows": 4, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": "constant"},
        "engine": {"deepspeed": "zero1", "device": "cpu", "timeout_minutes": 1},
        "evaluation": {"at_start": False},
        "launch": {"kubernetes": {
            "image": "this-machine", "python": sys.executable, "pods": 2, "mounts": {"/mnt": "shared"}, "work_dir": "/mnt", "shm_size": "256Mi",
            "user": USER, "env": {"OMP_NUM_THREADS": "1"}, "grace_seconds": 60,
        }},
    }
    path = tmp_path_factory.mktemp("run") / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def api(hosts, claim, repository, tmp_path) -> Iterator[Api]:
    """A cluster of two hosts that takes jobs."""
    image_env = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ["PYTHONPATH"], "TORCH_EXTENSIONS_DIR": "/mnt/operators"}
    image_folders = tuple(Path(folder) for folder in (sys.base_prefix, sys.prefix, repository))
    made = Api(Controller(hosts(2), tmp_path, {"shared": claim}, image_env, image_folders), tmp_path)
    yield made
    made.close()


def _start(api: Api, run_file: Path, told: Path, *words: str) -> subprocess.Popen[bytes]:
    """`harness launch --on kubernetes` on a machine that knows the cluster."""
    environment = os.environ | {"KUBECONFIG": str(api.config), "PATH": f"{api.programs}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "harness", "launch", str(run_file), "--on", "kubernetes", *words]
    with open(told, "wb") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)


@pytest.fixture(scope="module")
def undisturbed(claim) -> Path:
    """The folder of the undisturbed run, which the first test makes."""
    return claim / "reference"


@pytest.mark.slow
def test_two_pods_train(api, run_file, undisturbed, tmp_path):
    with _start(api, run_file, tmp_path / "told") as launch:
        assert launch.wait(200) == 0, api.controller.logs()
    told = (tmp_path / "told").read_text()
    assert "job/reference created" in told and "job reference: Complete." in told
    start, = [event for event in ledger.read(undisturbed) if event["kind"] == "start"]
    assert start["ranks"] == 2 and start["host"] == "reference-0" and read_outcome(undisturbed).code == 0
    assert undisturbed.stat().st_uid == USER


@pytest.mark.slow
def test_an_evicted_pod_saves_and_the_job_goes_on(api, run_file, undisturbed, claim, tmp_path):
    run_dir = claim / "evicted"
    with _start(api, run_file, tmp_path / "told", "--follow", "run_dir=/mnt/evicted") as launch:
        while not api.controller.state:
            assert launch.poll() is None, (tmp_path / "told").read_text()
        api.controller.until(lambda: last_step(run_dir) >= 5)
        api.controller.evict(1)
        assert launch.wait(200) == 0, api.controller.logs()
    assert [(pod.index, pod.code) for pod in sorted(api.controller.pods, key=lambda pod: pod.name)] == [(0, 75), (0, 0), (1, 75), (1, 0)]
    assert api.controller.failures == 0 and len([event for event in ledger.read(run_dir) if event["kind"] == "launch"]) == 2
    told = (tmp_path / "told").read_text()
    assert "steps 0 to 60" in told and "Stopped on request" in told and "to 60" in told.split("Stopped on request")[1]
    assert_same(run_dir, undisturbed)


@pytest.mark.slow
def test_a_run_that_is_refused_fails_the_job_at_once(api, run_file, tmp_path):
    with _start(api, run_file, tmp_path / "told", "run_dir=/mnt/refused", "data.dir=/mnt/others", "data.train.path=/mnt/nothing.jsonl") as launch:
        assert launch.wait(120) == 2, api.controller.logs()
    assert api.controller.state == "Failed" and "job refused: Failed." in (tmp_path / "told").read_text()


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_by_hand_is_not_started_again(api, run_file, claim, tmp_path):
    run_dir = claim / "stopped"
    with _start(api, run_file, tmp_path / "told", "run_dir=/mnt/stopped") as launch:
        while not api.controller.state:
            assert launch.poll() is None, (tmp_path / "told").read_text()
        api.controller.until(lambda: last_step(run_dir) >= 3)
        (run_dir / "control" / "stop").touch()
        assert launch.wait(120) == 0, api.controller.logs()
    assert read_outcome(run_dir).state == "stopped" and last_step(run_dir) < 60
    assert len([event for event in ledger.read(run_dir) if event["kind"] == "launch"]) == 1


def test_a_job_that_was_started_too_often_fails_with_its_reason(api, run_file, claim, tmp_path):
    """No rank is started: the starter itself refuses, from what the run's ledger says of earlier pods."""
    run_dir = claim / "worn"
    run_dir.mkdir()
    for _ in range(4):
        ledger.append(run_dir, "launch", job="k8s-uid-1")
        ledger.append(run_dir, "start", attempt=1)
    subprocess.run(["chown", "-R", f"{USER}:{USER}", str(run_dir)], check=True)
    with _start(api, run_file, tmp_path / "told", "--follow", "launch.kubernetes.pods=1", "run_dir=/mnt/worn") as launch:
        assert launch.wait(60) == 2, api.controller.logs()
    assert api.controller.state == "Failed" and read_outcome(run_dir).state == "refused"
    assert "It ended 4 times in a row without a new checkpoint" in (tmp_path / "told").read_text()


def test_without_kubectl_or_a_cluster_it_is_refused(run_file, tmp_path):
    bare = {"PATH": "/nonexistent", "PYTHONPATH": os.environ["PYTHONPATH"], "HOME": str(tmp_path)}
    for words, told in (([], "kubectl is not on this machine"), (["--follow"], "There is no configuration of a cluster")):
        done = subprocess.run([sys.executable, "-m", "harness", "launch", str(run_file), "--on", "kubernetes", *words], capture_output=True, text=True, env=bare)
        assert done.returncode == 2 and told in done.stderr, done.stderr
