"""A run as a Kubernetes job: the manifests as data, and as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import yaml

from harness.config.deepspeed import read_deepspeed
from harness.config.load import Loaded
from harness.config.schema import Kubernetes
from harness.errors import EXIT_ANOMALY, EXIT_CHECK_FAILED, EXIT_REFUSED, EXIT_RESUME_ME
from harness.launch import pods
from harness.launch import plan as plans
from harness.launch.plan import JobPlan

Manifest = dict[str, Any]
DEEPSPEED_FILE = "deepspeed.json"
PORT = 29500
"""Every pod has addresses of its own, so that any will do."""
FAILURES_A_POD = 10
"""Ends with a code that is nobody's. A run that fails again and again is ended by its starter; this ends pods that never reach it."""


def plan(loaded: Loaded, *, overrides: Sequence[str]) -> JobPlan:
    """The plan of the run under Kubernetes.

    Raises:
        Refused: for settings that the cluster would refuse, or that would lose the run.
    """
    settings = loaded.run.launch.kubernetes
    pods.check(loaded)
    if own_deepspeed(loaded) is not None:
        others = [word for word in overrides if not word.startswith("engine.deepspeed=")]
        overrides = [*others, f"engine.deepspeed={pods.CONFIG_DIR / DEEPSPEED_FILE}"]
    return plans.plan(
        loaded, hosts=settings.pods, ranks_per_host=settings.ranks_per_pod, grace_s=settings.grace_seconds,
        run_file=str(pods.CONFIG_DIR / "run.yaml"), run_dir=PurePosixPath(settings.work_dir) / loaded.run.run_dir, overrides=overrides,
    )


def own_deepspeed(loaded: Loaded) -> str | None:
    """The text of a DeepSpeed configuration that does not ship with the harness; it travels beside the run file.

    Raises:
        Refused: when it is missing here, or wrong.
    """
    _, path = read_deepspeed(loaded)
    return path.read_text(encoding="utf-8") if loaded.run.engine.deepspeed.endswith(".json") else None


def render(plan: JobPlan, settings: Kubernetes, *, run_text: str, deepspeed_text: str | None = None) -> str:
    """The manifests as YAML.

    Args:
        plan: what is started.
        settings: of the job; they were checked by `plan`.
        run_text: the run file, which the pods find in a ConfigMap.
        deepspeed_text: `own_deepspeed`, which they find beside it.
    """
    texts = {"run.yaml": run_text} | ({DEEPSPEED_FILE: deepspeed_text} if deepspeed_text is not None else {})
    documents = manifests(plan, settings, texts=texts)
    head = "# Written by `harness launch --on kubernetes`: one node starter a pod, its process 1. A pod that ends with 75 is made again and resumes.\n"
    return head + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=150)


def manifests(plan: JobPlan, settings: Kubernetes, *, texts: dict[str, str]) -> list[Manifest]:
    """The objects in the order in which they are made, the job last; `texts` by name of their file are what the ConfigMap holds."""
    name = job_name(plan, settings)
    meta = {"name": name, "namespace": settings.namespace, "labels": {"app.kubernetes.io/name": "harness", "app.kubernetes.io/instance": name}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": texts}
    if settings.kind == "job":
        service_spec = {
            "clusterIP": "None", "publishNotReadyAddresses": True, "selector": dict(meta["labels"]), "ports": [{"name": "ranks", "port": PORT}],
        }
        service = {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service_spec}
        return [config, service, {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": _job(plan, settings, meta)}]
    jobset = _jobset(plan, settings, meta)
    if settings.kind == "jobset":
        return [config, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": meta, "spec": jobset}]
    group = "trainer.kubeflow.org"
    runtime = {"mlPolicy": {"numNodes": settings.pods}, "template": {"spec": jobset}}
    job = {"runtimeRef": {"apiGroup": group, "kind": "TrainingRuntime", "name": name}, "trainer": {"numNodes": settings.pods}}
    return [
        config, {"apiVersion": f"{group}/v1alpha1", "kind": "TrainingRuntime", "metadata": meta, "spec": runtime},
        {"apiVersion": f"{group}/v1alpha1", "kind": "TrainJob", "metadata": meta, "spec": job},
    ]


def job_name(plan: JobPlan, settings: Kubernetes) -> str:
    """Of the job, its service and its other objects."""
    return settings.name or plans.as_label(plan.run_dir.name, longest=pods.LONGEST_NAME)


def _job(plan: JobPlan, settings: Kubernetes, meta: Manifest) -> Manifest:
    """The specification of an Indexed Job, whose pods are replaced together and only once they are gone."""
    container = "node" if settings.kind == "trainjob" else "harness"
    master = f"{meta['name']}-0" if settings.kind == "job" else f"{meta['name']}-node-0-0"
    pod = pods.specification(plan, settings, config=meta["name"], container=container, master=f"{master}.{meta['name']}:{PORT}")
    if settings.kind == "job":
        pod = {"subdomain": meta["name"], **pod}
    return {
        "completionMode": "Indexed", "completions": settings.pods, "parallelism": settings.pods,
        "backoffLimit": FAILURES_A_POD * settings.pods, "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            {"action": "FailJob", "onExitCodes": _codes(container, EXIT_REFUSED, EXIT_ANOMALY, EXIT_CHECK_FAILED)},
            {"action": "Ignore", "onExitCodes": _codes(container, EXIT_RESUME_ME)},
        ]},
        "template": {"metadata": {"labels": dict(meta["labels"])}, "spec": pod},
    }


def _codes(container: str, *codes: int) -> Manifest:
    return {"containerName": container, "operator": "In", "values": list(codes)}


def _jobset(plan: JobPlan, settings: Kubernetes, meta: Manifest) -> Manifest:
    """The specification of a JobSet of one such job; JobSet makes the service."""
    template: Manifest = {"spec": _job(plan, settings, meta)}
    if settings.kind == "trainjob":
        template = {"metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}, **template}
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True}, "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}],
    }


class _Dumper(yaml.SafeDumper):
    """Writes each object out, and texts of several lines as they are."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
