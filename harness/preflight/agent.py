"""What `harness doctor --hosts` starts on each host over ssh: answers requests, one JSON object a line, until its input ends."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness.preflight.findings import REPORT_VERSION
from harness.preflight.machine import Purpose, examine

CONNECT_S = 3.0


class Agent:
    """One host's end of the conversation.

    Attributes:
        name: what the hostfile calls this host.
    """

    def __init__(self) -> None:
        self.name = ""
        self._listener: socket.socket | None = None
        self._made: list[Path] = []

    def hello(self, name: str) -> dict[str, Any]:
        """Say who this is."""
        self.name = name
        return {"version": REPORT_VERSION, "hostname": socket.gethostname()}

    def report(self, purpose: dict[str, Any], build: bool) -> dict[str, Any]:
        """Examine this machine; what checks print goes to stderr."""
        with contextlib.redirect_stdout(sys.stderr):
            found = examine(Purpose(**purpose), build=build)
        found.facts["hostname"], found.host = found.host, self.name
        return found.to_json()

    def clock(self) -> float:
        """The time, in seconds since the epoch."""
        return time.time()

    def listen(self) -> int:
        """Open a port that the system chooses; who connects is told this host's name."""
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024)
        threading.Thread(target=self._serve, args=(self._listener,), daemon=True).start()
        return int(self._listener.getsockname()[1])

    def _serve(self, listener: socket.socket) -> None:
        while True:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(self.name.encode())

    def connect(self, targets: dict[str, int]) -> dict[str, str]:
        """Try the ports of other hosts, all at once; answers with what went wrong, by name."""
        with ThreadPoolExecutor(max_workers=64) as pool:
            answers = pool.map(lambda target: _try(*target), targets.items())
            return {name: why for name, why in zip(targets, answers, strict=True) if why}

    def place_token(self, folder: str, token: str) -> str:
        """Leave a file in `folder`, which is made where it is missing; answers with `yes`, or with what went wrong."""
        place = Path(folder)
        self._made = [one for one in (place, *place.parents) if not one.exists()]
        try:
            place.mkdir(parents=True, exist_ok=True)
            (place / token).touch()
        except OSError as error:
            return str(error.strerror)
        return "yes"

    def see_token(self, folder: str, token: str) -> str:
        """Whether that file is in `folder` here: `yes`, `no`, or what is wrong with the folder."""
        place = Path(folder)
        if not place.is_dir():
            parents = [parent for parent in place.parents if parent.is_dir()]
            return "no" if parents and os.access(parents[0], os.W_OK) else "there is no such folder, and it cannot be made"
        if not os.access(place, os.W_OK | os.X_OK):
            return "it cannot be written"
        os.listdir(place)  # asks a network file system anew
        return "yes" if (place / token).exists() else "no"

    def take_token(self, folder: str, token: str) -> str:
        """Remove that file, and the folders that were made for it."""
        Path(folder, token).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for made in self._made:
                made.rmdir()
        return "yes"


def _try(name: str, port: int) -> str:
    """What is wrong with the way to a host; empty when it answers with its own name."""
    try:
        with socket.create_connection((name, port), timeout=CONNECT_S) as connection:
            address, answer = connection.getpeername()[0], connection.recv(256).decode()
    except TimeoutError:
        return f"no answer within {CONNECT_S:.0f} s"
    except OSError as error:
        return str(error.strerror or error)
    return "" if answer == name else f"that name leads to {address}, which is {answer or 'nobody'}"


def serve() -> None:
    """Answer until the asker is gone."""
    agent = Agent()
    for line in sys.stdin:
        request = json.loads(line)
        method: Callable[..., Any] = getattr(agent, request["method"])
        try:
            answer = {"answer": method(**request["arguments"])}
        except Exception as error:  # the asker must hear of it, whatever it is
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
