"""The manifests: compared whole with files that are kept, valid for three versions of Kubernetes, JobSet and Kubeflow Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models
from pydantic import BaseModel

from harness.config.deepspeed import read_deepspeed
from harness.config.load import load
from harness.errors import Refused
from harness.launch import kubernetes
from tests.launch.golden import assert_golden
from tests.launch.manifests import check_enums, check_job, check_service

VERSIONS = ("1.35", "1.36", "1.37")
SMALL = [
    "launch.ranks=null", "engine.device=cpu", "run_dir=/runs/tiny", "data.dir=/runs/data", "launch.kubernetes.image=registry.example/harness@sha256:0",
    "launch.kubernetes.pods=2", "launch.kubernetes.mounts={/runs: runs}",
]
LARGE = [
    *SMALL, "engine.device=auto", "launch.kubernetes.pods=16", "launch.kubernetes.ranks_per_pod=8", "launch.kubernetes.name=medical",
    "launch.kubernetes.namespace=research", 'launch.kubernetes.resources={cpu: "96", memory: 900Gi, rdma/ib: "8"}', "launch.kubernetes.python=/opt/harness/bin/python",
    "launch.kubernetes.mounts={/runs: shared/runs, /models: shared/models, /corpus: corpus}", "launch.kubernetes.env={NCCL_IB_HCA: mlx5, PRICE: 5$(A)}",
    "launch.kubernetes.secrets={HF_TOKEN: {name: hub, key: token}}", "launch.kubernetes.pull_secret=registry", "launch.kubernetes.service_account=trainer",
    "launch.kubernetes.node_selector={gpu: h100}", "launch.kubernetes.tolerations=[{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]",
    "launch.kubernetes.shm_size=64Gi", "launch.kubernetes.grace_seconds=300",
]
FORMS = {"small_job": SMALL, **{f"large_{kind}": [*LARGE, f"launch.kubernetes.kind={kind}"] for kind in ("job", "jobset", "trainjob")}}


def _render(repository: Path, overrides: list[str]) -> str:
    path = repository / "launch/runs/medical_qa.yaml"
    loaded = load(path, overrides)
    return kubernetes.render(kubernetes.plan(loaded, overrides=overrides), loaded.run.launch.kubernetes, run_text=path.read_text(encoding="utf-8"))


def _documents(repository: Path, name: str) -> dict[str, dict]:
    return {document["kind"]: document for document in yaml.safe_load_all(_render(repository, FORMS[name]))}


def _job_of(documents: dict[str, dict]) -> dict:
    """The specification of the Indexed Job, wherever it stands."""
    if "Job" in documents:
        return documents["Job"]["spec"]
    jobset = documents["JobSet"]["spec"] if "JobSet" in documents else documents["TrainingRuntime"]["spec"]["template"]["spec"]
    return jobset["replicatedJobs"][0]["template"]["spec"]


@pytest.mark.parametrize("name", FORMS)
def test_manifests(repository, name):
    assert_golden(f"{name}.yaml", _render(repository, FORMS[name]))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FORMS)
def test_schemas_of_kubernetes(repository, name, version):
    """Strict: unknown fields are errors. The Job inside another object is held against the schema of a Job."""
    documents = _documents(repository, name)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": _job_of(documents)}
    plain = [document for kind, document in documents.items() if kind in ("ConfigMap", "Service", "Job")]
    for document in [*plain, job]:
        kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("name", FORMS)
def test_rules_that_no_schema_holds(repository, name):
    documents = _documents(repository, name)
    for document in documents.values():
        check_enums(document)
    check_job(_job_of(documents))
    if "Service" in documents:
        check_service(documents["Service"], documents["Job"])


def test_the_checks_see_faults(repository):
    documents = _documents(repository, "small_job")
    job = documents["Job"]["spec"]
    job["template"]["spec"]["restartPolicy"] = "OnFailure"
    kubernetes_validate.validate(documents["Job"], VERSIONS[-1], strict=True)
    with pytest.raises(AssertionError):
        check_job(job)
    job["completionMode"] = "Indxed"
    with pytest.raises(AssertionError):
        check_enums(documents["Job"])
    job["template"]["spec"]["subDomain"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(documents["Job"], VERSIONS[-1], strict=True)


@pytest.mark.parametrize(("name", "kind", "model"), [
    ("large_jobset", "JobSet", models.JobsetV1alpha2JobSet), ("large_trainjob", "TrainJob", models.TrainerV1alpha1TrainJob),
    ("large_trainjob", "TrainingRuntime", models.TrainerV1alpha1TrainingRuntime),
])
def test_models_of_jobset_and_kubeflow(repository, name, kind, model: type[BaseModel]):
    """Read by the published models and written again, nothing is lost: no field is unknown."""
    document = _documents(repository, name)[kind]
    assert model.from_dict(document).to_dict() == document


def test_the_first_pod_is_where_the_ranks_meet(repository):
    """By the names that each controller gives its pods."""
    for name, master in (("large_job", "medical-0.medical"), ("large_jobset", "medical-node-0-0.medical"), ("large_trainjob", "medical-node-0-0.medical")):
        words = _job_of(_documents(repository, name))["template"]["spec"]["containers"][0]["command"]
        assert words[words.index("--meet") + 1] == f"{master}:29500"


def test_words_with_dollars_are_not_kubernetes_to_read(repository):
    overrides = [*SMALL, "evaluation.prompts=[\"$(HOME) $$\"]"]
    words = yaml.safe_load_all(_render(repository, overrides))
    command = [one for one in words if one["kind"] == "Job"][0]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert "evaluation.prompts=[\"$$(HOME) $$$$\"]" in command and "k8s-$(HARNESS_JOB)" in command


@pytest.mark.parametrize(("override", "told"), [
    ("launch.kubernetes.image=null", "no image"), ("launch.kubernetes.name=Medical_QA", "not a name"), ("launch.kubernetes.name=7b", "begin with a letter"),
    ("launch.kubernetes.namespace=-x", "not a name"), ("run_dir=runs/x", "no mount holds"), ("data.dir=/elsewhere", "no mount holds"),
    ("launch.kubernetes.mounts={/runs: Claim}", "not a name"), ("launch.kubernetes.mounts={runs: claim}", "no mount"), ("launch.kubernetes.mounts={/tmp/x: claim}", "its own"),
    ("launch.kubernetes.mounts={/runs: claim/../..}", "no mount"), ("launch.kubernetes.env={A-B: x}", "no name of a variable"), ("launch.kubernetes.shm_size=much", "no quantity"),
    ("launch.kubernetes.secrets={T: {name: A, key: b}}", "not a name"), ("launch.kubernetes.tolerations=[{keys: a}]", "toleration"), ("launch.kubernetes.work_dir=here", "absolute"),
])
def test_what_the_cluster_would_refuse_is_refused(repository, override, told):
    with pytest.raises(Refused, match=told):
        _render(repository, [*SMALL, override])


def test_a_deepspeed_configuration_of_ones_own_travels_beside_the_run_file(repository, tmp_path):
    """What the pod finds, put where it finds it, is what the run was given here."""
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}\n')
    words = ["launch/runs/medical_qa.yaml", *SMALL, f"engine.deepspeed={mine}", "train.micro_batch=1"]
    command = [sys.executable, "-m", "harness", "launch", *words, "--on", "kubernetes", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, check=False)
    assert done.returncode == 0, done.stderr
    documents = {document["kind"]: document for document in yaml.safe_load_all(done.stdout)}
    kubernetes_validate.validate(documents["ConfigMap"], VERSIONS[-1], strict=True)
    container = documents["Job"]["spec"]["template"]["spec"]["containers"][0]
    (folder,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    for name, text in documents["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(text)
    told = [word.replace(folder, str(tmp_path)) for word in container["command"]]
    found = load(told[told.index(f"{tmp_path}/run.yaml")], told[told.index(f"{tmp_path}/run.yaml") + 1 :])
    assert str(mine) not in told and found.run.train.micro_batch == 1
    config, path = read_deepspeed(found)
    assert path == tmp_path / "deepspeed.json" and config == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}


def test_one_that_ships_stays_in_the_image(repository):
    documents = {document["kind"]: document for document in yaml.safe_load_all(_render(repository, [*SMALL, "engine.deepspeed=zero2"]))}
    assert list(documents["ConfigMap"]["data"]) == ["run.yaml"]
    assert "engine.deepspeed=zero2" in documents["Job"]["spec"]["template"]["spec"]["containers"][0]["command"]


@pytest.mark.parametrize(("folder", "engine", "refused"), [
    ("/nvme", "zero3_offload_nvme", True), ("/tmp/nvme", "zero3_offload_nvme", False), ("/runs/nvme", "zero3_offload_nvme", False), ("/nvme", "zero3", False),
])
def test_nvme_needs_a_place_in_the_pods(repository, folder, engine, refused):
    words = [*SMALL, f"engine.deepspeed={engine}", f"engine.nvme_dir={folder}"]
    if refused:
        with pytest.raises(Refused, match="read-only"):
            _render(repository, words)
    else:
        assert _render(repository, words)


def test_print_shows_it_and_does_nothing_else(repository, tmp_path):
    command = [sys.executable, "-m", "harness", "launch", "launch/runs/medical_qa.yaml", *SMALL, "--on", "kubernetes", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert_golden("small_job.yaml", done.stdout)
