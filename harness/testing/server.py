"""An HTTP server on loopback that fails on demand, for tests of remote sets."""

from __future__ import annotations

import http.server
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.data.store import Wanted
from harness.formats import digest


def wanted(name: str, content: bytes) -> Wanted:
    """What an index says of `content`."""
    return Wanted(name, len(content), digest.of_bytes(content))


class Server(http.server.ThreadingHTTPServer):
    """Serves bytes, after the faults that are queued for a name: a status, `stall`, `truncate`, `wrong`, `long`, `slow`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}
        self.faults: dict[str, list[object]] = {}
        self.gets: Counter[str] = Counter()
        self.queries: set[str] = set()
        self.headers: list[str | None] = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/set"

    def add_folder(self, folder: Path, below: str) -> None:
        """Serve every file of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.content[f"{below}/{path.relative_to(folder)}"] = path.read_bytes()

    def add(self, name: str, size: int) -> Wanted:
        """Serve random bytes under a name."""
        self.content[name] = random.Random(name).randbytes(size)
        return wanted(name, self.content[name])

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: N802 (the name is the library's)
        """Answer, or fail as asked."""
        server: Server = self.server
        path, _, query = self.path.partition("?")
        name = path.removeprefix("/set/")
        server.gets[name] += 1
        server.queries.add(query)
        server.headers.append(self.headers.get("Authorization"))
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        body = server.content.get(name)
        if isinstance(fault, int) or body is None:
            self.send_error(fault or 404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + (fault == "long")))
        self.end_headers()
        half = len(body) // 2
        if fault == "truncate":
            self.wfile.write(body[:half])
            self.close_connection = True
        elif fault == "stall":
            self.wfile.write(body[:half])
            server.over.wait(20)
            self.close_connection = True
        elif fault == "slow":
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                server.over.wait(0.05)
        else:
            self.wfile.write(b"x" + body[1:] if fault == "wrong" else body + b"x" * (fault == "long"))

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server that runs until the end of the block."""
    it = Server()
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield it
    finally:
        it.over.set()
        it.shutdown()
        thread.join()
        it.server_close()
