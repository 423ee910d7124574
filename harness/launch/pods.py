"""What runs in one pod of a Kubernetes job: its specification as data, and what of the settings cannot be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

from harness.config.deepspeed import offload_device, read_deepspeed
from harness.config.load import Loaded
from harness.config.schema import Kubernetes
from harness.errors import Refused
from harness.launch import plan as plans
from harness.launch.plan import JobPlan

CONFIG_DIR = PurePosixPath("/etc/harness")
LONGEST_NAME = 40
"""Host names of pods are made from it, and end at 63 signs."""
_OWN = {str(CONFIG_DIR): "config", "/tmp": "tmp", "/dev/shm": "shm"}
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i?)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
_TOLERATION = {"key", "operator", "value", "effect", "tolerationSeconds"}


def specification(plan: JobPlan, settings: Kubernetes, *, config: str, container: str, master: str) -> dict[str, Any]:
    """The specification of a pod: the starter as process 1, without rights, on a file system that only its volumes can change.

    Args:
        plan: what is started.
        settings: of the job.
        config: name of the ConfigMap with the run file.
        container: name of the container.
        master: `HOST:PORT` where the ranks meet.
    """
    command = plan.starter(python=settings.python, master=master, job="k8s-JOB")
    words = [word.replace("$", "$$") for word in command]  # Kubernetes reads $(NAME) and $$
    words[words.index("k8s-JOB")] = "k8s-$(HARNESS_JOB)"
    account = {"serviceAccountName": settings.service_account} if settings.service_account else {"automountServiceAccountToken": False}
    optional = {
        "imagePullSecrets": [{"name": settings.pull_secret}] if settings.pull_secret else None,
        "nodeSelector": settings.node_selector or None, "tolerations": settings.tolerations or None,
    }
    volumes, mounts = _volumes(settings, config)
    return {
        "restartPolicy": "Never", "terminationGracePeriodSeconds": plan.grace_s, "enableServiceLinks": False, **account,
        **{key: value for key, value in optional.items() if value},
        "securityContext": {
            "runAsNonRoot": True, "runAsUser": settings.user, "runAsGroup": settings.user, "fsGroup": settings.user,
            "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{
            "name": container, "image": settings.image, "workingDir": settings.work_dir, "command": words, "env": _environment(settings),
            "resources": _resources(plan, settings),
            "securityContext": {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
            "terminationMessagePolicy": "FallbackToLogsOnError", "volumeMounts": mounts,
        }],
        "volumes": volumes,
    }


def _environment(settings: Kubernetes) -> list[dict[str, Any]]:
    job = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/controller-uid']"}}
    secrets = [{"name": name, "valueFrom": {"secretKeyRef": {"name": one.name, "key": one.key}}} for name, one in settings.secrets.items()]
    plain = [{"name": name, "value": value.replace("$", "$$")} for name, value in ({"HOME": "/tmp"} | settings.env).items()]
    return [{"name": "HARNESS_JOB", "valueFrom": job}, *plain, *secrets]


def _resources(plan: JobPlan, settings: Kubernetes) -> dict[str, Any]:
    gpus = {settings.gpu_resource: str(settings.ranks_per_pod)} if plan.uses_gpus else {}
    wanted = settings.resources | gpus
    return {"requests": dict(wanted), "limits": dict(wanted)} if wanted else {}


def _volumes(settings: Kubernetes, config: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": config}}, {"name": "tmp", "emptyDir": {}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm_size}},
    ]
    mounts: list[dict[str, Any]] = [{"name": name, "mountPath": path} | ({"readOnly": True} if name == "config" else {}) for path, name in _OWN.items()]
    names: dict[str, str] = {}
    for path, source in settings.mounts.items():
        claim, _, folder = source.partition("/")
        if claim not in names:
            names[claim] = f"claim-{len(names)}"
            volumes.append({"name": names[claim], "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": names[claim], "mountPath": path, **({"subPath": folder} if folder else {})})
    return volumes, mounts


def check(loaded: Loaded) -> None:
    """Refuse what the cluster would refuse, and a run whose folder would be gone with its pod.

    Raises:
        Refused: with the first one.
    """
    settings = loaded.run.launch.kubernetes
    if not settings.image or re.search(r"\s", settings.image):
        raise Refused("There is no image for the pods.", where=_at("image"), remedy="Set launch.kubernetes.image to one that holds the harness.")
    _names(settings, settings.name or plans.as_label(PurePosixPath(loaded.run.run_dir).name, longest=LONGEST_NAME))
    _variables(settings)
    for key, size in {"shm_size": settings.shm_size, **{f"resources.{name}": held for name, held in settings.resources.items()}}.items():
        if not _QUANTITY.fullmatch(size):
            raise Refused(f"`{size}` is no quantity.", where=_at(key), remedy="Write a number with Mi, Gi or m, in quotes.")
    for toleration in settings.tolerations:
        if strange := set(toleration) - _TOLERATION:
            problem, remedy = f"`{min(strange)}` is not part of a toleration.", f"Use {', '.join(sorted(_TOLERATION))}."
            raise Refused(problem, where=_at("tolerations"), remedy=remedy)
    _mounts(settings)
    _kept(loaded, settings)


def _names(settings: Kubernetes, name: str) -> None:
    plans.label(name, where=_at("name"), longest=LONGEST_NAME)
    if not name[0].isalpha():
        problem = f"The name `{name}` does not begin with a letter, as that of a service must."
        raise Refused(problem, where=_at("name"), remedy="Set launch.kubernetes.name.")
    plans.label(settings.namespace, where=_at("namespace"))
    for key, held in (("pull_secret", settings.pull_secret), ("service_account", settings.service_account)):
        if held is not None:
            _subdomain(held, key)


def _variables(settings: Kubernetes) -> None:
    for variable in [*settings.env, *settings.secrets]:
        if not _VARIABLE.fullmatch(variable) or (variable in settings.env and variable in settings.secrets):
            problem = f"`{variable}` is no name of a variable, or is given twice."
            raise Refused(problem, where=f"{_at('env')}; {_at('secrets')}", remedy="Rename it.")
    for secret in settings.secrets.values():
        _subdomain(secret.name, "secrets")


def _mounts(settings: Kubernetes) -> None:
    for path, source in settings.mounts.items():
        parts = PurePosixPath(path)
        claim, _, folder = source.partition("/")
        _subdomain(claim, "mounts")
        if not _is_plain(path) or path == "/" or ".." in PurePosixPath(folder).parts or folder.startswith("/"):
            raise Refused(f"`{path}: {source}` is no mount.", where=_at("mounts"), remedy="Write /path/in/the/pod: CLAIM or CLAIM/FOLDER.")
        if any(parts == PurePosixPath(own) or PurePosixPath(own) in parts.parents for own in _OWN):
            raise Refused(f"`{path}` is where the job mounts a volume of its own.", where=_at("mounts"), remedy="Use another path.")
    if not _is_plain(settings.work_dir):
        raise Refused(f"`{settings.work_dir}` is not an absolute path.", where=_at("work_dir"), remedy="Write it from /.")


def _kept(loaded: Loaded, settings: Kubernetes) -> None:
    """What a run writes must outlive the pods, and what it swaps must have a place in them."""
    folders = {"run_dir": loaded.run.run_dir}
    if loaded.run.data.dir is not None and "://" not in loaded.run.data.dir:
        folders["data.dir"] = loaded.run.data.dir
    for key, folder in folders.items():
        whole = PurePosixPath(settings.work_dir) / folder
        if not _below(whole, settings.mounts):
            raise Refused(
                f"`{key}` is {whole} in the pods, which no mount holds: it would be gone with them.",
                where=f"{key} ({loaded.origin(key)}); {_at('mounts')}",
                remedy="Mount a claim that all pods share (ReadWriteMany) there, such as launch.kubernetes.mounts={/runs: my-claim}, and set it below.",
            )
    config, _ = read_deepspeed(loaded)
    if loaded.run.engine.nvme_dir is None or "nvme" not in (offload_device(config, "optimizer"), offload_device(config, "param")):
        return
    swap = PurePosixPath(settings.work_dir) / loaded.run.engine.nvme_dir
    if not _below(swap, ["/tmp", *settings.mounts]):
        raise Refused(
            f"`engine.nvme_dir` is {swap} in the pods, which is read-only there: no mount holds it.",
            where=f"engine.nvme_dir ({loaded.origin('engine.nvme_dir')}); {_at('mounts')}",
            remedy="Set it below /tmp, which is on the node's own disk, or mount a claim there.",
        )


def _below(folder: PurePosixPath, places: Iterable[str]) -> bool:
    return any(PurePosixPath(place) in (folder, *folder.parents) for place in places)


def _is_plain(path: str) -> bool:
    return path.startswith("/") and ":" not in path and str(PurePosixPath(path)) == path and ".." not in path.split("/")


def _subdomain(text: str, key: str) -> None:
    if not _SUBDOMAIN.fullmatch(text):
        raise Refused(f"`{text}` is not a name that Kubernetes allows: a-z, 0-9, - and . only.", where=_at(key), remedy="Correct it.")


def _at(key: str) -> str:
    return f"launch.kubernetes.{key}"
