"""The log of a job's first pod, whichever pod that is, as it grows."""

from __future__ import annotations

import sys
import threading
from typing import Any

from harness.errors import Refused
from harness.log import say

LOOK_S = 2.0
_FIRST = "batch.kubernetes.io/job-completion-index=0"


class PodLog:
    """Prints the log of pod 0, whose rank 0 speaks for all, and of each pod that takes its place.

    Args:
        namespace: of the job.
        selector: finds its pods.

    Raises:
        Refused: without the `kubernetes` package, or a configuration of a cluster.
    """

    def __init__(self, namespace: str, selector: str):
        try:
            from kubernetes import client, config
            from kubernetes.client.rest import ApiException
        except ImportError:
            remedy = "pip install kubernetes, or leave --follow away."
            raise Refused("--follow needs the package `kubernetes`.", where="--follow", remedy=remedy) from None
        try:
            config.load_config()
        except config.ConfigException as error:
            raise Refused(f"There is no configuration of a cluster: {error}", where="KUBECONFIG", remedy="Set KUBECONFIG, as for kubectl.") from None
        self._api, self._failure = client.CoreV1Api(), ApiException
        self._namespace, self._selector = namespace, f"{selector},{_FIRST}"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._seen: set[str] = set()

    def start(self) -> None:
        """Follow in the background."""
        self._thread.start()

    def end(self) -> None:
        """Print what is left, for a moment."""
        self._over.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            was_over = self._over.is_set()
            try:
                for pod in self._api.list_namespaced_pod(self._namespace, label_selector=self._selector).items:
                    self._print(pod)
            except (self._failure, OSError) as error:
                say(f"The log cannot be followed at present: {error}")
            if was_over:
                return
            self._over.wait(LOOK_S)

    def _print(self, pod: Any) -> None:
        if pod.metadata.uid in self._seen or pod.status.phase == "Pending":
            return
        self._seen.add(pod.metadata.uid)
        stream = self._api.read_namespaced_pod_log(pod.metadata.name, self._namespace, follow=True, _preload_content=False)
        for block in stream.stream(decode_content=True):
            sys.stdout.write(block.decode("utf-8", "replace"))
            sys.stdout.flush()
