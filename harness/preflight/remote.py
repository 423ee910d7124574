"""The machines of a hostfile, asked over ssh, all at once and each within a time limit."""

from __future__ import annotations

import getpass
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.config.load import Loaded
from harness.launch import hosts as launch
from harness.launch.hostfile import read_hostfile
from harness.preflight import cluster
from harness.preflight.findings import REPORT_VERSION, Finding, Report, failed, from_json, passed
from harness.preflight.machine import Purpose

CONNECT_S, ANSWER_S, REPORT_S, BUILD_S = 10, 30.0, 180.0, 1800.0
SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


class Silent(Exception):
    """A host that gave no answer; the text says why."""


class Remote:
    """The agent on one host.

    Args:
        name: of the host.
        port: of its ssh daemon; None for the usual one.
    """

    def __init__(self, name: str, *, port: int | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile()
        passed_on = {key: value for key, value in os.environ.items() if key.startswith(launch.PASSED_ON) and key not in launch.KEPT}
        self._process = subprocess.Popen(
            [*SSH, *_port(port), name, launch.there([sys.executable, "-m", "harness.preflight.agent"])], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
        )
        self._unsent = launch.lines({key: value for key, value in passed_on.items() if "\n" not in value}).encode() + b"\n"
        self._rest = b""

    def ask(self, method: str, *, within_s: float = ANSWER_S, **arguments: Any) -> Any:
        """The answer to a request.

        Raises:
            Silent: no answer came.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(self._unsent + json.dumps({"method": method, "arguments": arguments}).encode() + b"\n")
            self._unsent = b""
            self._process.stdin.flush()
        except OSError:
            raise Silent(self._why()) from None
        answer = json.loads(self._line(time.monotonic() + within_s, within_s))
        if "error" in answer:
            raise Silent(f"its check broke off: {answer['error']}")
        return answer["answer"]

    def _line(self, deadline: float, within_s: float) -> bytes:
        assert self._process.stdout is not None
        while True:
            line, found, rest = self._rest.partition(b"\n")
            if found:
                self._rest = rest
                if line.startswith(b"{"):  # not a greeting of the login shell
                    return line
                continue
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Silent(f"no answer within {within_s:.0f} s")
            block = os.read(self._process.stdout.fileno(), 1 << 16)
            if not block:
                raise Silent(self._why())
            self._rest += block

    def _why(self) -> str:
        """What ssh or the other end said last."""
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            return "the connection broke"
        self._errors.seek(0)
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"ssh ended with code {self._process.returncode}"

    def close(self) -> None:
        """End the conversation."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            try:
                stream.close()  # type: ignore[union-attr]
            except OSError:
                pass


class Hosts:
    """All hosts of a hostfile; one that falls silent is left out from then on.

    Args:
        names: of the hosts.
        port: of their ssh daemons; None for the usual one.
    """

    def __init__(self, names: list[str], *, port: int | None = None):
        self._port = port
        self.silent: dict[str, str] = {}
        self._pool = ThreadPoolExecutor(max_workers=min(256, len(names)))
        self._remotes = {name: Remote(name, port=port) for name in names}

    def __enter__(self) -> Hosts:
        answers = self._all(lambda remote: remote.ask("hello", name=remote.name, within_s=CONNECT_S + ANSWER_S))
        for name, answer in answers.items():
            if answer["version"] != REPORT_VERSION:
                self._drop(name, f"runs another version of the harness (reports of version {answer['version']})")
        return self

    def __exit__(self, *_: object) -> None:
        for remote in self._remotes.values():
            remote.close()
        self._pool.shutdown()

    def __len__(self) -> int:
        """How many still answer."""
        return len(self._remotes)

    def _drop(self, name: str, why: str) -> None:
        self.silent.setdefault(name, why)
        self._remotes.pop(name).close()

    def _all(self, question: Callable[[Remote], Any]) -> dict[str, Any]:
        """The answer of each host that gave one."""

        def ask(remote: Remote) -> Any:
            try:
                return question(remote)
            except (Silent, ValueError) as error:
                return error

        remotes = list(self._remotes.values())
        answers = dict(zip((remote.name for remote in remotes), self._pool.map(ask, remotes), strict=True))
        for name, answer in answers.items():
            if isinstance(answer, Exception):
                self._drop(name, str(answer))
        return {name: answer for name, answer in answers.items() if not isinstance(answer, Exception)}

    def unreachable(self) -> list[Finding]:
        """The verdict on ssh: which host gave no answer, and why."""
        if not self.silent:
            return [passed("hosts", f"{len(self._remotes)} answer over ssh")]
        me = f"{getpass.getuser()}@{socket.gethostname()}"
        return [
            failed(
                "hosts",
                f"{name} gives no answer: {why}.",
                f"{' '.join(('ssh', *_port(self._port), name))} {sys.executable} -m harness --version   must work from {me} without a password, "
                f"in {os.getcwd()}",
            )
            for name, why in self.silent.items()
        ]

    def reports(self, purposes: dict[str, Purpose], *, build: bool) -> list[Report]:
        """Every host's report on itself."""
        limit = BUILD_S if build else REPORT_S
        return list(
            self._all(lambda remote: from_json(remote.ask("report", purpose=vars(purposes[remote.name]), build=build, within_s=limit))).values()
        )

    def clocks(self) -> dict[str, float]:
        """Each host's clock minus ours, in seconds: of five tries the one that came back soonest."""
        return self._all(_offset)

    def meet(self) -> Finding:
        """Whether every host can open a connection to every other, on a port that the system chose."""
        ports = self._all(lambda remote: remote.ask("listen"))
        answers = self._all(
            lambda remote: remote.ask(
                "connect", targets={name: port for name, port in ports.items() if name != remote.name}, within_s=ANSWER_S + len(ports)
            )
        )
        return cluster.meetings({(start, end): why for start, found in answers.items() for end, why in found.items()}, hosts=len(ports))

    def share_folder(self, folder: Path) -> Finding:
        """Whether all hosts see one `folder`: the first one leaves a file in it, and the others look."""
        token, first = f".harness-doctor-{uuid.uuid4().hex}", next(iter(self._remotes))

        def only_first(method: str) -> str:
            answers = self._all(lambda remote: remote.ask(method, folder=str(folder), token=token) if remote.name == first else "")
            return str(answers.get(first, "the host fell silent"))

        placed = only_first("place_token")
        if placed != "yes":
            return cluster.folder_shared(folder, {first: placed})
        seen = self._all(lambda remote: remote.ask("see_token", folder=str(folder), token=token))
        only_first("take_token")
        return cluster.folder_shared(folder, seen)


def _port(port: int | None) -> tuple[str, ...]:
    return ("-p", str(port)) if port else ()


def _offset(remote: Remote) -> float:
    tries = []
    for _ in range(5):
        began = time.time()
        theirs = remote.ask("clock")
        ended = time.time()
        tries.append((ended - began, theirs - (began + ended) / 2))
    return min(tries)[1]


def examine(hostfile: Path, *, loaded: Loaded | None, build: bool) -> cluster.Diagnosis:
    """Examine every host of a hostfile over ssh, and compare them.

    Raises:
        Refused: the hostfile or the run file cannot be read.
    """
    slots = read_hostfile(hostfile, where="--hosts")
    purposes = {host: cluster.purpose(loaded, hosts=len(slots), ranks=count) for host, count in slots.items()}
    with Hosts(list(slots), port=loaded.run.launch.hosts.ssh_port if loaded else None) as hosts:
        reports = hosts.reports(purposes, build=build)
        together = cluster.compare(reports) if len(reports) > 1 else []
        if len(hosts) > 1:
            together += [cluster.clocks(hosts.clocks()), hosts.meet()]
        if len(hosts) > 1:
            together.append(hosts.share_folder(Path(next(iter(purposes.values())).run_dir).absolute()))
        return cluster.Diagnosis(list(slots), reports, [*hosts.unreachable(), *together])
