"""Rules of Kubernetes that its schemas do not hold."""

from __future__ import annotations

from typing import Any

ENUMS = {
    "completionMode": {"Indexed", "NonIndexed"}, "podReplacementPolicy": {"Failed", "TerminatingOrFailed"}, "restartPolicy": {"Always", "OnFailure", "Never"},
    "action": {"Ignore", "FailJob", "FailIndex", "Count"}, "medium": {"", "Memory"}, "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"}, "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
}


def _walk(value: Any, path: str = ""):
    for key, held in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield f"{path}.{key}", key, held
        yield from _walk(held, f"{path}.{key}")


def check_enums(document: dict[str, Any]) -> None:
    """Words of a closed list are in it. An operator's list depends on where it stands."""
    for path, key, held in _walk(document):
        if key in ENUMS:
            assert held in ENUMS[key], (path, held)
        if key == "operator":
            assert held in ({"In", "NotIn"} if "onExitCodes" in path else {"Exists", "Equal"}), (path, held)


def check_job(job: dict[str, Any]) -> None:
    """What an API server demands of an Indexed Job with a pod failure policy, and what ranks that wait for each other need."""
    pod = job["template"]["spec"]
    names = [container["name"] for container in pod["containers"]]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    assert pod["restartPolicy"] == "Never" and job["podReplacementPolicy"] == "Failed"
    for rule in job["podFailurePolicy"]["rules"]:
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if "onExitCodes" in rule:
            codes = rule["onExitCodes"]
            assert codes["containerName"] in names
            assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]
    volumes = [volume["name"] for volume in pod["volumes"]]
    assert len(set(volumes)) == len(volumes)
    for container in pod["containers"]:
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(set(paths)) == len(paths) and {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        limits, requests = container["resources"].get("limits", {}), container["resources"].get("requests", {})
        assert all(requests.get(name) == held for name, held in limits.items() if "/" in name)
        assert container["securityContext"]["readOnlyRootFilesystem"] and not container["securityContext"]["allowPrivilegeEscalation"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0


def check_service(service: dict[str, Any], job: dict[str, Any]) -> None:
    """The service gives the pods their names, before they are ready."""
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert job["spec"]["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"]
