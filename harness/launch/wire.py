"""The wire between the node starters of a job: JSON lines over TCP to the first host, one port above that where its ranks meet.

Each starter tells once a second where its ranks are, and at once how the first one ended badly; the first host judges and passes
on. A connection that breaks is made anew; a host that was heard and then is silent for too long is lost.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from typing import Any

from harness.errors import Failure
from harness.launch.job import Job

HEARD_S = 15.0
"""How long a host may be silent on the wire."""
_RETRY_S, _CONNECT_S = 1.0, 0.5
_BLOCK = 1 << 16


class Link:
    """One connection that never blocks.

    Attributes:
        heard_s: when something came last, on the monotonic clock.
        is_open: whether it still holds.
        unread: messages that come first next time.
    """

    def __init__(self, connection: socket.socket):
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._received, self._unsent = connection, b"", b""
        self.heard_s, self.is_open = time.monotonic(), True
        self.unread: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any]) -> None:
        """Send now what the connection takes, the rest later."""
        self._unsent += json.dumps(message).encode() + b"\n"
        with self._closing():
            self._unsent = self._unsent[self._socket.send(self._unsent) :]

    def receive(self) -> list[dict[str, Any]]:
        """Whole messages that have come."""
        with self._closing():
            if self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        with self._closing():
            while block := self._socket.recv(_BLOCK):
                self._received += block
                self.heard_s = time.monotonic()
            self.is_open = False
        *lines, self._received = self._received.split(b"\n")
        messages, self.unread = self.unread, []
        for line in lines:
            with suppress(ValueError):  # not one of ours
                messages.append(json.loads(line))
        return [message for message in messages if isinstance(message, dict)]

    def close(self) -> None:
        """Let go."""
        self.is_open = False
        self._socket.close()

    def _closing(self) -> _Closing:
        return _Closing(self)


class _Closing:
    """Takes note when a connection breaks; that it would block is no news."""

    def __init__(self, link: Link):
        self.link = link

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> bool:
        if kind is not None and issubclass(kind, OSError) and not issubclass(kind, BlockingIOError):
            self.link.is_open = False
        return kind is not None and issubclass(kind, OSError)


class Wire:
    """This host's end.

    Args:
        node: number of this host; 0 listens, the others come to it.
        job: the job; connections of another one are not let in.

    Raises:
        Failure: when the first host cannot listen.
    """

    def __init__(self, node: int, job: Job):
        self.node, self.nodes, self.key = node, len(job.slots), job.key
        self._address, self._tried_s = (job.master, job.port + 1), 0.0
        self._links: dict[int, Link] = {}
        self._strangers: list[Link] = []
        self._gone: set[int] = set()
        self._heard_s: dict[int, float] = {}
        self._server = _listen(job.port + 1) if node == 0 else None

    @classmethod
    def from_outside(cls, job: Job) -> Wire:
        """The end of what launched the job, wherever that runs: it comes after the hosts."""
        return cls(len(job.slots), job)

    @property
    def is_connected(self) -> bool:
        """Whether anybody is at the other end now."""
        return bool(self._links)

    def send(self, message: dict[str, Any], *, besides: int = -1) -> None:
        """To the first host; from there to all others, but for the one that it came from."""
        for node, link in self._links.items():
            if node != besides:
                link.send(message | {"node": self.node})

    def receive(self) -> list[tuple[int, dict[str, Any]]]:
        """What has come, with the number of the host that sent it."""
        self._connect()
        found = []
        for node, link in list(self._links.items()):
            for message in link.receive():
                self._heard_s[node] = link.heard_s
                if message.get("kind") == "bye":
                    self._gone.add(node)
                found.append((node, message))
            if not link.is_open:
                link.close()
                del self._links[node]
        return found

    def lost(self) -> list[int]:
        """Hosts that were heard, have not said goodbye, and are silent for too long."""
        return [node for node, heard_s in self._heard_s.items() if node not in self._gone and time.monotonic() - heard_s > HEARD_S]

    def forget(self, node: int) -> None:
        """Expect nothing more of a host."""
        self._gone.add(node)

    def close(self) -> None:
        """Say goodbye."""
        self.send({"kind": "bye"})
        for link in [*self._links.values(), *self._strangers]:
            link.close()
        if self._server is not None:
            self._server.close()

    def _connect(self) -> None:
        if self._server is not None:
            self._accept(self._server)
        elif 0 not in self._links and 0 not in self._gone and time.monotonic() - self._tried_s > _RETRY_S:
            self._tried_s = time.monotonic()
            with suppress(OSError):
                link = Link(socket.create_connection(self._address, timeout=_CONNECT_S))
                link.send({"kind": "hello", "job": self.key, "node": self.node})
                self._links[0] = link

    def _accept(self, server: socket.socket) -> None:
        """New connections become hosts once they have said which one of which job they are."""
        with suppress(BlockingIOError):
            while True:
                self._strangers.append(Link(server.accept()[0]))
        for link in list(self._strangers):
            messages = link.receive()
            if not messages and link.is_open:
                continue
            self._strangers.remove(link)
            hello = messages[0] if messages else {}
            node = hello.get("node")
            if hello.get("kind") != "hello" or hello.get("job") != self.key or not (isinstance(node, int) and 0 < node <= self.nodes):
                link.close()
                continue
            if node in self._links:
                self._links[node].close()
            self._links[node], self._heard_s[node], link.unread = link, time.monotonic(), messages[1:]


def _listen(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=512)
    except OSError as error:
        told = os.strerror(error.errno) if error.errno else error
        raise Failure(f"The starter of the first host cannot listen on port {port}, one above that of --meet: {told}. Choose another.") from error
    server.setblocking(False)
    return server
