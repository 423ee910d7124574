"""docker/compose.yaml is accepted by Docker Compose itself, and holds its containers in."""

from __future__ import annotations

import _ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# the program itself: the script of its package answers 0 when compose has refused
START = "import compose, os, sys; p = os.path.join(os.path.dirname(compose.__file__), 'docker-compose'); os.execv(p, [p, *sys.argv[1:]])"
COMPOSE = [sys.executable, "-c", START]


def _config(repository: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [*COMPOSE, "--file", str(repository / "docker/compose.yaml"), "config", "--format", "json"]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), **settings}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture
def services(repository, tmp_path) -> dict:
    answer = _config(repository, WORK=str(tmp_path), RUN_FILE="mine.yaml")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)["services"]


def test_without_a_folder_it_says_what_is_missing(repository):
    answer = _config(repository)
    assert answer.returncode and "WORK" in answer.stderr and "the folder with the run file" in answer.stderr


def test_the_run_is_built_here_and_ends_in_a_verb(services, repository):
    train = services["train"]
    assert Path(train["build"]["context"]).resolve() == repository
    assert (repository / train["build"]["dockerfile"]).is_file()
    assert train["command"] == ["launch", "mine.yaml"]
    assert train["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_every_container_is_held_in(services, tmp_path):
    for name, service in services.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["user"].split(":")[0] not in ("", "0", "root"), name
        assert [(volume["source"], volume["target"]) for volume in service["volumes"]] == [(str(tmp_path), "/work")], name
        assert ":" in service["image"] and not service["image"].endswith(":latest"), name


def test_what_is_compiled_in_tmp_can_be_loaded(services, repository, tmp_path):
    """Mounted as docker does it, its own options first."""
    documented = [line.split("--tmpfs ")[1].split()[0] for line in (repository / "README.md").read_text().splitlines() if line.startswith("docker run")]
    mounts = {*documented, *(mount for service in services.values() for mount in service["tmpfs"])}
    assert len(mounts) == 1 and len(documented) == 2
    folder, _, options = mounts.pop().partition(":")
    assert folder == "/tmp"
    script = f"""mount -t tmpfs -o noexec,nosuid,nodev,{options} tmpfs "$1" && cp "$2" "$1/x.so" && "$3" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1/x.so" """
    words = ["sh", "-c", script, "sh", str(tmp_path), _ctypes.__file__, sys.executable]
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False).returncode:
        pytest.skip("no mounts of one's own here")
    told = subprocess.run(["unshare", "--map-root-user", "--mount", *words], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr


def test_tensorboard_is_seen_from_this_machine_alone(services):
    assert [port["host_ip"] for port in services["tensorboard"]["ports"]] == ["127.0.0.1"]
    assert "/work/runs" in services["tensorboard"]["entrypoint"]
