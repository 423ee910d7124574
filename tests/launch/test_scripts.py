"""Every shell script of the repository passes shellcheck."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
OTHER_FOLDERS = {".git", ".venv", "runs", "build", "dist"}  # of a working copy, not of the repository


def _is_shell(path: Path) -> bool:
    if path.suffix in (".sh", ".bash", ".sbatch"):
        return True
    return not path.suffix and path.is_file() and path.read_bytes()[:64].startswith((b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh"))


def _scripts() -> list[Path]:
    paths = (path for folder in sorted(REPOSITORY.iterdir()) if folder.name not in OTHER_FOLDERS for path in [folder, *folder.rglob("*")])
    return sorted(path for path in paths if _is_shell(path))


@pytest.mark.parametrize("script", _scripts(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_shellcheck_finds_nothing(script):
    command = [str(Path(sys.prefix) / "bin" / "shellcheck"), "--external-sources", str(script.relative_to(REPOSITORY))]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr


def test_none_is_forgotten():
    names = {str(path.relative_to(REPOSITORY)) for path in _scripts()}
    assert {".ci/run", "launch/environment.sh", "launch/quickstart.sh", "tests/run.sh", "tests/docker/build.sh", "docker/portable-compiler"} <= names
