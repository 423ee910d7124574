"""A stand-in for kubelet and Job controller: one Indexed Job's pods on the hosts of this machine, pod I on host I, by the manifest's own words.

Real: command, $(NAME), environment, fields, index; ConfigMap, claims and memory as mounts; the read-only root, the user and no rights; host names;
process 1 of a process table of its own; eviction (SIGTERM, grace, SIGKILL), replacement, pod failure policy, backoff limit.
Stood in for: image (this machine's disk), scheduler, DNS (a hosts file), defaults and admission, devices, probes, limits.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.cluster.hosts import Cluster

_INDEX, _UID = "batch.kubernetes.io/job-completion-index", "batch.kubernetes.io/controller-uid"


def expand(text: str, env: dict[str, str]) -> str:
    """What Kubernetes makes of $(NAME) of a known name and of $$."""
    return re.sub(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)", lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]), text)


@dataclass
class Pod:
    """One pod that was started.

    Attributes:
        name: with the number of its start.
        index: its place in the job.
        log: file of what it prints.
        process: outside its process table.
        evicted_s: when it was asked to go, on the monotonic clock.
        code: its exit code, once it has ended.
    """

    name: str
    index: int
    log: Path
    process: subprocess.Popen[str]
    evicted_s: float | None = None
    code: int | None = None
    finished: float = 0.0


@dataclass
class Controller:
    """Keeps a pod for each index until the job is complete or has failed.

    Args:
        cluster: as many hosts as pods.
        folder: for logs and what ConfigMaps hold.
        claims: claim -> folder.
        image_env: what ENV in the image would set.
        image_folders: what the image would hold, readable for everyone; here they may stand in a folder that is closed to others.
    """

    cluster: Cluster
    folder: Path
    claims: dict[str, Path]
    image_env: dict[str, str]
    image_folders: tuple[Path, ...] = ()
    job: dict[str, Any] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    state: str = ""
    pods: list[Pod] = field(default_factory=list)
    failures: int = 0
    _number: int = 0
    _thread: threading.Thread | None = None
    _stop: threading.Event = field(default_factory=threading.Event)

    def apply(self, text: str) -> None:
        """Take the objects of a manifest up and begin."""
        documents = {document["kind"]: document for document in yaml.safe_load_all(text)}
        self.job, self.config, service = documents["Job"], documents["ConfigMap"]["data"], documents["Service"]
        assert self._pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
        assert service["spec"]["selector"].items() <= self.job["spec"]["template"]["metadata"]["labels"].items()
        self._number += 1
        self.state, self.failures, self.pods, self._stop = "Running", 0, [], threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def delete(self) -> None:
        """End the job with its pods, which get their grace."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.job, self.state = {}, ""

    def evict(self, index: int) -> None:
        """Ask the pod of an index to go."""
        pod = next(pod for pod in self.pods if pod.index == index and pod.code is None)
        pod.evicted_s = time.monotonic()
        self._signal(pod, signal.SIGTERM)

    @property
    def _pod(self) -> dict[str, Any]:
        return self.job["spec"]["template"]["spec"]

    @property
    def uid(self) -> str:
        """Of the job."""
        return f"uid-{self._number}"

    def _run(self) -> None:
        while self.state == "Running" and not self._stop.is_set():
            done = {pod.index for pod in self.pods if pod.code == 0}
            active = {pod.index for pod in self.pods if pod.code is None}
            for index in sorted(set(range(self.job["spec"]["completions"])) - done - active):
                self.pods.append(self._start(index))
            time.sleep(0.1)
            self._collect()
        for pod in self.pods:
            if pod.code is None:
                pod.evicted_s = pod.evicted_s or time.monotonic()
                self._signal(pod, signal.SIGTERM)
        while any(pod.code is None for pod in self.pods):
            time.sleep(0.1)
            self._collect()

    def _collect(self) -> None:
        """Note ends, and what the pod failure policy says of them."""
        for pod in self.pods:
            if pod.code is not None:
                continue
            code = pod.process.poll()
            if code is None:
                if pod.evicted_s is not None and time.monotonic() - pod.evicted_s > self._pod["terminationGracePeriodSeconds"]:
                    self._signal(pod, signal.SIGKILL)
                continue
            pod.code, pod.finished = (128 - code if code < 0 else code), time.time()
            action = self._action(pod)
            self.failures += action == "Count"
            if self.state == "Running" and (action == "FailJob" or self.failures > self.job["spec"]["backoffLimit"]):
                self.state = "Failed"
        if self.state == "Running" and {pod.index for pod in self.pods if pod.code == 0} == set(range(self.job["spec"]["completions"])):
            self.state = "Complete"

    def _action(self, pod: Pod) -> str:
        if pod.code == 0:
            return "Succeeded"
        for rule in self.job["spec"]["podFailurePolicy"]["rules"]:
            if pod.evicted_s is not None and "onPodConditions" in rule:
                return rule["action"]
            codes = rule.get("onExitCodes")
            if codes and (pod.code in codes["values"]) == (codes["operator"] == "In"):
                return rule["action"]
        return "Count"

    def _start(self, index: int) -> Pod:
        name = f"{self.job['metadata']['name']}-{index}"
        start = sum(pod.index == index for pod in self.pods) + 1
        log = self.folder / f"{name}-{self._number}-{start}.log"
        container, = self._pod["containers"]
        env = self._environment(container, index, f"{name}-{start}")
        words = [expand(word, env) for word in container["command"]]
        user = self._pod["securityContext"]["runAsUser"]
        rights = ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={user}", "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--"]
        run = shlex.join([*rights, "env", "-i", *(f"{key}={value}" for key, value in env.items()), *words])
        script = "\n".join(["set -e", f"hostname {name}", *self._mounts(container, index, name), f"cd {container['workingDir']}", f"exec {run}"])
        own = ["unshare", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "--kill-child", "bash", "-c", script]
        with open(log, "w", encoding="utf-8") as stream:
            return Pod(f"{name}-{self._number}-{start}", index, log, self.cluster.start(index, *own, stdout=stream, stderr=subprocess.STDOUT))

    def _environment(self, container: dict[str, Any], index: int, name: str) -> dict[str, str]:
        fields = {f"metadata.labels['{_UID}']": self.uid, "metadata.name": name}
        env = {**self.image_env, "HOSTNAME": f"{self.job['metadata']['name']}-{index}", "JOB_COMPLETION_INDEX": str(index)}
        for entry in container["env"]:
            field_path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            env[entry["name"]] = fields[field_path] if field_path else expand(entry["value"], env)
        return env

    def _mounts(self, container: dict[str, Any], index: int, name: str) -> list[str]:
        """Shell lines: a hosts file as a kubelet and the service's DNS give, the volumes, and nothing else to write on."""
        volumes = {volume["name"]: volume for volume in self._pod["volumes"]}
        base = shlex.quote(str(self.folder / f"{name}.etc"))
        lines = [f"mkdir -p {base}", f"mount -t tmpfs tmpfs {base}", f"mkdir {base}/upper {base}/work",
                 f"mount -t overlay overlay -o lowerdir=/etc,upperdir={base}/upper,workdir={base}/work /etc", *self._image(base)]
        for mount in container["volumeMounts"]:
            volume, path = volumes[mount["name"]], mount["mountPath"]
            if "configMap" in volume:
                lines.append(f"mkdir -p {path}")
                lines += [f"printf %s {shlex.quote(text)} > {path}/{key}" for key, text in self.config.items()]
            elif "persistentVolumeClaim" in volume:
                lines.append(f"mount --bind {shlex.quote(str(self.claims[volume['persistentVolumeClaim']['claimName']] / mount.get('subPath', '')))} {path}")
            elif volume["emptyDir"].get("medium") == "Memory":
                lines.append(f"mount -t tmpfs -o mode=1777,size={volume['emptyDir']['sizeLimit'].rstrip('i').lower()} tmpfs {path}")
            else:
                lines.append(self._empty(Path(path)))
        lines.append(f"printf %s {shlex.quote(self._names(index))} > /etc/hosts")
        return [*sorted(lines, key=lambda line: bool(re.search(r" tmpfs /tmp(;|$)", line))), "mount -o remount,ro /etc", "mount -o remount,bind,ro /"]

    def _empty(self, path: Path) -> str:
        """A shell line that lays an empty folder over `path`; where the image stands below it, on this machine alone, it is laid there again."""
        below = [folder for folder in self.image_folders if folder.is_relative_to(path)]
        kept = "".join(f"mkdir -p /media/{number}; mount --bind {shlex.quote(str(folder))} /media/{number}; " for number, folder in enumerate(below))
        laid = "".join(f"; mkdir -p {shlex.quote(str(folder))}; mount --bind /media/{number} {shlex.quote(str(folder))}; umount /media/{number}" for number, folder in enumerate(below))
        opened = "mount -t tmpfs tmpfs /media; " if below else ""
        return f"{opened}{kept}mount -t tmpfs -o mode=1777 tmpfs {path}{laid}"

    def _image(self, base: str) -> list[str]:
        """Shell lines that open the way to the image's folders, and to nothing beside them."""
        closed = {folder: next((parent for parent in reversed(folder.parents) if not parent.stat().st_mode & 1), None) for folder in self.image_folders}
        hidden = {number: folder for number, folder in enumerate(self.image_folders) if closed[folder] is not None}
        kept = [f"mkdir {base}/{number}; mount --bind {shlex.quote(str(folder))} {base}/{number}" for number, folder in hidden.items()]
        opened = [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(parent))}" for parent in sorted({closed[folder] for folder in hidden.values()})]
        laid = [f"mkdir -p {shlex.quote(str(folder))}; mount --bind {base}/{number} {shlex.quote(str(folder))}" for number, folder in hidden.items()]
        return [*kept, *opened, *laid]

    def _names(self, index: int) -> str:
        job, service, space = self.job["metadata"]["name"], self._pod["subdomain"], self.job["metadata"]["namespace"]
        lines = ["127.0.0.1 localhost"]
        for other in range(self.job["spec"]["completions"]):
            host = f"{job}-{other}"
            own = f" {host}" if other == index else ""
            lines.append(f"{self.cluster.address(other)} {host}.{service}.{space}.svc.cluster.local {host}.{service}.{space} {host}.{service}{own}")
        return "\n".join(lines) + "\n"

    def _signal(self, pod: Pod, number: int) -> None:
        """To process 1 of the pod."""
        try:
            for child in self.cluster.inner(pod.process).children():
                child.send_signal(number)
        except (psutil.Error, AssertionError, IndexError):  # gone meanwhile
            pass

    def until(self, there: Callable[[], object], *, timeout_s: float = 120.0) -> None:
        """Wait for a moment of a job that runs."""
        deadline = time.monotonic() + timeout_s
        while not there():
            assert time.monotonic() < deadline and self.state == "Running", f"{self.state}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        """Of all pods."""
        return "\n".join(f"== {pod.name} ended with {pod.code}\n{pod.log.read_text(errors='replace')}" for pod in self.pods)

    def job_status(self) -> dict[str, Any]:
        """The job's object as far as followers read it."""
        over = [{"type": self.state, "status": "True"}] if self.state in ("Complete", "Failed") else []
        codes = [pod.code for pod in self.pods]
        counts = {"active": codes.count(None), "succeeded": codes.count(0), "failed": len([code for code in codes if code]), "conditions": over}
        return {**self.job, "status": counts}

    def pod_list(self) -> dict[str, Any]:
        """The pods' objects as far as followers read them."""
        items = []
        for pod in self.pods:
            ended = {"terminated": {"exitCode": pod.code, "finishedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(pod.finished))}}
            status = {"name": "harness", "image": "x", "imageID": "x", "ready": True, "restartCount": 0, "state": {"running": {}} if pod.code is None else ended}
            phase = {None: "Running", 0: "Succeeded"}.get(pod.code, "Failed")
            labels = {**self.job["spec"]["template"]["metadata"]["labels"], _INDEX: str(pod.index), _UID: self.uid}
            items.append({"metadata": {"name": pod.name, "uid": pod.name, "labels": labels}, "status": {"phase": phase, "containerStatuses": [status]}})
        return {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items}
