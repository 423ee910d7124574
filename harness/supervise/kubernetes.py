"""A Kubernetes job: applied by kubectl, followed through its pods to its end, and answered for by their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from harness.errors import EXIT_ANOMALY, EXIT_CHECK_FAILED, EXIT_DONE, EXIT_FAILURE, EXIT_REFUSED, EXIT_RESUME_ME, Refused
from harness.log import say
from harness.supervise import follow
from harness.supervise.podlog import PodLog

POLL_S = 3.0
RESOURCES = {"job": "jobs.batch", "jobset": "jobsets.jobset.x-k8s.io", "trainjob": "trainjobs.trainer.kubeflow.org"}
DONE, FAILED = {"Complete", "Completed"}, {"Failed"}
_FINAL = (EXIT_REFUSED, EXIT_ANOMALY, EXIT_CHECK_FAILED)


@dataclass(frozen=True)
class KubernetesJob:
    """A job of this run.

    Attributes:
        name: of the object.
        namespace: where it is.
        kind: job, jobset or trainjob.
    """

    name: str
    namespace: str
    kind: str

    @property
    def selector(self) -> str:
        """Finds its pods."""
        return f"app.kubernetes.io/instance={self.name}"

    @property
    def words(self) -> str:
        """As kubectl takes it."""
        return f"{RESOURCES[self.kind]} {self.name} -n {self.namespace}"

    def read(self) -> dict[str, Any] | None:
        """The object, or None when there is none.

        Raises:
            Refused: when kubectl does not reach the cluster, or may not look.
        """
        text = _kubectl("get", RESOURCES[self.kind], self.name, "-n", self.namespace, "-o", "json", "--ignore-not-found")
        return json.loads(text) if text.strip() else None

    def exit_codes(self) -> list[int]:
        """Of its pods that have ended, the last one first."""
        pods = json.loads(_kubectl("get", "pods", "-n", self.namespace, "-l", self.selector, "-o", "json"))["items"]
        states = [status["state"] for pod in pods for status in pod["status"].get("containerStatuses", [])]
        ends = [state["terminated"] for state in states if "terminated" in state]
        return [end["exitCode"] for end in sorted(ends, key=lambda end: end.get("finishedAt") or "", reverse=True)]


def launch(job: KubernetesJob, manifest: str, *, show_log: bool) -> int:
    """Apply a manifest and follow the job until it is over; one of this name that still runs is followed instead, one that is over is replaced.

    Returns:
        the code of the run's outcome; 75 when the job goes on without us, or somebody has deleted it.

    Raises:
        Refused: without kubectl, a cluster, or what `--follow` needs.
    """
    log = PodLog(job.namespace, job.selector) if show_log else None
    found = job.read()
    if found is not None and ended(found):
        say(f"An earlier job of this name is {ended(found)}: replacing it.")
        _kubectl("delete", RESOURCES[job.kind], job.name, "-n", job.namespace, "--wait=true")
        found = None
    if found is not None:
        say(f"{job.kind} {job.name} is in the cluster already: following it. End it with: kubectl delete {job.words}")
    else:
        say(_kubectl("apply", "-f", "-", given=manifest).strip())
        say(f"End it with: kubectl delete {job.words}")
    if log is not None:
        log.start()
    code = _wait(job)
    if log is not None:
        log.end()
    return code


def _wait(job: KubernetesJob) -> int:
    before = ""
    with follow.until_asked() as asked:
        while True:
            told = _look(job)
            if told is not None and told != before:
                say(f"{job.kind} {job.name}: {told or 'gone'}.")
                before = told
            if told == "" or told in DONE | FAILED:
                break
            if asked.wait(POLL_S):
                say(f"{job.kind} {job.name} goes on. The same command follows it again; kubectl delete {job.words} ends it after a save.")
                return EXIT_RESUME_ME
    if before in DONE:
        return EXIT_DONE
    return code_of(job.exit_codes()) if before in FAILED else EXIT_RESUME_ME


def _look(job: KubernetesJob) -> str | None:
    """How it stands; empty when it is gone, None when the cluster does not answer."""
    try:
        found = job.read()
    except Refused as error:
        say(error.problem)
        return None
    if found is None:
        return ""
    status = found.get("status", {})
    return ended(found) or f"{status.get('active', 0)} pods active, {status.get('succeeded', 0)} done, {status.get('failed', 0)} ended otherwise"


def ended(found: dict[str, Any]) -> str:
    """The condition that says that a job is over; empty while it is not."""
    for condition in found.get("status", {}).get("conditions", []):
        if condition["status"] == "True" and condition["type"] in DONE | FAILED:
            return str(condition["type"])
    return ""


def code_of(codes: list[int]) -> int:
    """Of a failed job: what its last pods said of the run for good, else failure.

    Args:
        codes: exit codes of its pods, the last one first.
    """
    return next((code for code in codes if code in _FINAL), EXIT_FAILURE)


def _kubectl(*words: str, given: str | None = None) -> str:
    if shutil.which("kubectl") is None:
        raise Refused("kubectl is not on this machine.", where="PATH", remedy="Install it, or see the manifest with --print and apply it elsewhere.")
    done = subprocess.run(["kubectl", *words], input=given, capture_output=True, text=True)
    if done.returncode:
        remedy = "Check the cluster (kubectl cluster-info), launch.kubernetes, and what the cluster has installed."
        raise Refused(f"kubectl {words[0]} failed: {done.stderr.strip()}", where="kubectl", remedy=remedy)
    return done.stdout
