"""Work that takes long shows that it goes on: a healthy rank that is silent would be ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from harness import heartbeat
from harness.checkpoint import shelf
from harness.checkpoint.disks import Disks
from harness.resilience import hearing
from harness.resilience.hearing import Hearing
from harness.train.certify import Witness
from harness.train.progress import Progress
from harness.train.rollback import load
from harness.train.trace import STEPS, Tracer
from harness.world import World
from tests.checkpoint.fabricate import SHAPES, groups, save_as_ranks, state


def marks(work: Callable[[], object]) -> int:
    """How often it was seen to go on, in the phase in which it began."""
    heartbeat.mark("data", 3)
    before = heartbeat._PULSE._count
    work()
    assert heartbeat.PHASES[heartbeat._PULSE._phase] == "data" and heartbeat._PULSE._step == 3
    return heartbeat._PULSE._count - before


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save_as_ranks(tmp_path, state(), ranks=3, state=Progress().state())


def test_reading_a_checkpoint_through(tmp_path, monkeypatch):
    monkeypatch.setattr(shelf, "MARK_S", 0.005)
    shapes = {"large": (1 << 22,)}
    folder = save_as_ranks(tmp_path, state(shapes), ranks=1, shapes=shapes)
    assert marks(lambda: shelf.inspect(folder)) >= 3


def test_loading_a_checkpoint(checkpoint):
    def load_slices(read: Callable[..., torch.Tensor], *, step: int) -> None:
        for name in SHAPES:
            read("master", name, 0, 1)

    engine = SimpleNamespace(
        held_slices=list, load_slices=load_slices, load_buffers=lambda buffers, *, where: None, restore_loss_scale=lambda scale: None,
    )
    assert marks(lambda: load(engine, (checkpoint, shelf.inspect(checkpoint)[0]), Disks.shared(World()))) == len(SHAPES)


def test_sealing_what_was_loaded():
    owned = list(groups(state(), rank=0, ranks=1))
    witness = Witness(None, SimpleNamespace(named_slices=lambda: iter(owned)), None, None, 1)
    assert marks(witness.tensors) == len(owned)


def test_waiting_for_rows(monkeypatch):
    monkeypatch.setattr(hearing, "EVERY_S", 0.02)
    until = time.monotonic() + 0.1
    waits = Hearing(lambda: False, torch.device("cpu"))
    assert marks(lambda: waits.until_all(lambda timeout_s: time.monotonic() > until)) >= 3


def test_writing_a_trace(tmp_path):
    tracer = Tracer(tmp_path / "attempts" / "0001" / "traces", rank=0, takes_part=True, note=lambda kind, **facts: None)
    tracer.ask()
    for step in range(1, STEPS + 1):
        tracer.after_step(step)
    assert marks(lambda: tracer.after_step(STEPS + 1)) >= 2 and list(tmp_path.rglob("*.gz"))
