"""A stand-in for an API server over the stand-in for its controllers: as much as `kubectl apply, get, delete` and a follower of logs ask.

Logs and lists of pods go over the real HTTP interface, for the real Python client. kubectl is a program that hands its words on.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import yaml

from tests.cluster.pods import Controller

_KUBECTL = """#!{python}
import json, sys, urllib.request
words = sys.argv[1:]
given = sys.stdin.read() if "-f" in words else ""
asked = urllib.request.Request("{url}/kubectl", data=json.dumps([words, given]).encode())
code, out = json.load(urllib.request.urlopen(asked))
print(out, file=sys.stderr if code else sys.stdout)
raise SystemExit(code)
"""


class Api:
    """Serves until `close`.

    Args:
        controller: what the objects are given to.
        folder: for the configuration of clients, and for kubectl.
    """

    def __init__(self, controller: Controller, folder: Path):
        self.controller, self.asked = controller, []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                words, given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._answer(json.dumps(api.kubectl(words, given)))

            def do_GET(self) -> None:  # noqa: N802
                place = urlparse(self.path)
                if place.path.endswith("/pods"):
                    wanted = dict(word.split("=") for word in parse_qs(place.query)["labelSelector"][0].split(","))
                    found = controller.pod_list()
                    found["items"] = [item for item in found["items"] if wanted.items() <= item["metadata"]["labels"].items()]
                    self._answer(json.dumps(found))
                elif place.path.endswith("/log"):
                    self._stream(place.path.split("/")[-2])
                else:
                    self.send_error(404)

            def _answer(self, text: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(text.encode())

            def _stream(self, name: str) -> None:
                pod = next(pod for pod in controller.pods if pod.name == name)
                self.send_response(200)
                self.end_headers()
                with open(pod.log, "rb") as stream:
                    while True:
                        over = pod.code is not None
                        self.wfile.write(stream.read())
                        self.wfile.flush()
                        if over:
                            return
                        time.sleep(0.1)

            def log_message(self, *words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.config = folder / "kubeconfig"
        context = {"name": "x", "context": {"cluster": "x", "user": "x"}}
        self.config.write_text(yaml.safe_dump({
            "apiVersion": "v1", "kind": "Config", "current-context": "x", "contexts": [context],
            "clusters": [{"name": "x", "cluster": {"server": url}}], "users": [{"name": "x", "user": {}}],
        }))
        self.programs = folder / "bin"
        self.programs.mkdir()
        (self.programs / "kubectl").write_text(_KUBECTL.format(python=sys.executable, url=url))
        (self.programs / "kubectl").chmod(0o755)

    def kubectl(self, words: list[str], given: str) -> tuple[int, str]:
        """Exit code and text."""
        self.asked.append(words[0])
        if words[0] == "apply":
            self.controller.apply(given)
            return 0, "\n".join(f"{one['kind'].lower()}/{one['metadata']['name']} created" for one in yaml.safe_load_all(given))
        if words[0] == "delete":
            self.controller.delete()
            return 0, "deleted"
        if words[:2] == ["get", "pods"]:
            return 0, json.dumps(self.controller.pod_list())
        if words[:2] == ["get", "jobs.batch"]:
            return 0, json.dumps(self.controller.job_status()) if self.controller.job else ""
        return 1, f"error: the server doesn't have a resource type \"{words[1]}\""

    def close(self) -> None:
        """End the job and the server."""
        self.controller.delete()
        self._server.shutdown()
        self._server.server_close()
