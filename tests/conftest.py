"""What all tests share: an environment like a rank's, and pools of ranks."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.launch import operators
from tests.cluster.hosts import hosts  # noqa: F401 (a fixture)

os.environ.update(operators.environment())
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
REPOSITORY = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep)


def _pool(size: int):
    from harness.testing.pool import RankPool

    pool = RankPool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks1():
    """One rank."""
    yield from _pool(1)


@pytest.fixture(scope="session")
def ranks2():
    """Two ranks."""
    yield from _pool(2)


@pytest.fixture(scope="session")
def ranks4():
    """Four ranks."""
    yield from _pool(4)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(autouse=True)
def _signals():
    """No test leaves a handler behind."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)
