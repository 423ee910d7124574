"""The copy that a thread writes, what it may take of the memory, and old checkpoints that cannot be deleted."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from harness import memory
from harness.checkpoint import background, shelf
from harness.checkpoint.background import Behind, Snapshot
from harness.world import World
from tests.checkpoint.fabricate import commit_groups, fields, groups, save, state

KIB = 1024


def test_a_copy_keeps_what_it_copied_and_its_memory_is_used_again(tmp_path):
    tensors, snapshot = state(), Snapshot()
    copies = snapshot.take(groups(tensors, rank=0, ranks=1))
    buffers = [buffer.data_ptr() for buffer in snapshot._buffers]
    expected = [entry.digest for entry in shelf.inspect(save(tmp_path / "plain", 1, tensors=state()))[0].files]
    for held in tensors.values():
        for tensor in held.values():
            tensor.add_(1.0)
    folder = commit_groups(copies, run_dir=tmp_path, fields=fields(1), attempt=1, world=World())
    assert [entry.digest for entry in shelf.inspect(folder)[0].files] == expected
    again = snapshot.take(groups(tensors, rank=0, ranks=1))
    assert [buffer.data_ptr() for buffer in snapshot._buffers] == buffers
    assert torch.equal(again[0].tensors["master"]["wte.weight"], tensors["master"]["wte.weight"])


def test_memory_made_beforehand_is_what_the_copy_uses(monkeypatch):
    tensors, snapshot = state(), Snapshot()
    snapshot.reserve([3 * sum(part.length for part in group.slices) for group in groups(tensors, rank=0, ranks=1)])
    monkeypatch.setattr(background, "_host_memory", lambda length: pytest.fail(f"made {length} elements anew"))
    copies = snapshot.take(groups(tensors, rank=0, ranks=1))
    assert torch.equal(copies[0].tensors["master"]["wte.weight"], tensors["master"]["wte.weight"])


def test_memory_is_no_longer_made_once_it_is_given_up():
    snapshot = Snapshot()
    snapshot.give_up()
    snapshot.reserve([1 << 40])
    assert not snapshot._buffers


def test_memory_that_cannot_be_had_beforehand_is_told_when_it_is_needed(monkeypatch):
    tensors, snapshot, real = state(), Snapshot(), background._host_memory

    def refuse(length):
        raise RuntimeError("no memory")

    monkeypatch.setattr(background, "_host_memory", refuse)
    snapshot.reserve([1 << 40])
    with pytest.raises(RuntimeError, match="no memory"):
        snapshot.take(groups(tensors, rank=0, ranks=1))
    monkeypatch.setattr(background, "_host_memory", real)
    assert snapshot.take(groups(tensors, rank=0, ranks=1))


def test_a_copy_takes_twelve_bytes_an_element_and_other_types_become_fp32():
    snapshot, kinds = Snapshot(), state()
    kinds["master"]["wte.weight"] = kinds["master"]["wte.weight"].double()
    copies = snapshot.take(groups(kinds, rank=0, ranks=1))
    assert sum(buffer.nbytes for buffer in snapshot._buffers) == 12 * sum(tensor.numel() for tensor in kinds["exp_avg"].values())
    assert copies[0].tensors["master"]["wte.weight"].dtype == torch.float32


def test_what_a_thread_does_is_seen_when_it_is_over():
    gate = threading.Event()
    behind = Behind(lambda: gate.wait(20) and "written")
    assert not behind.is_done
    gate.set()
    assert behind.result() == "written" and behind.is_done and behind.seconds > 0


def test_an_old_checkpoint_that_cannot_be_renamed_is_told_and_left(tmp_path, monkeypatch, capsys):
    for step in (10, 20, 30):
        save(tmp_path, step)
    rename = shelf.os.rename

    def refuse(source, target):
        if Path(source).name == "step-000010":
            raise OSError(30, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(shelf.os, "rename", refuse)
    told: list[str] = []
    monkeypatch.setattr(shelf, "say", told.append)
    gone = shelf.retain(tmp_path, keep_last=1)
    assert [path.name for path in gone] == ["step-000020"] and [step for step, _ in shelf.committed(tmp_path)] == [30, 10]
    assert told == ["The old checkpoint step-000010 cannot be deleted: [Errno 30] Read-only file system"]


def _machine(root: Path, *, available_kib: int, group: str, files: dict[str, str]) -> Path:
    for path, text in {"proc/meminfo": f"MemTotal: 999999999 kB\nMemAvailable: {available_kib} kB\n", "proc/self/cgroup": group, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_memory_is_bounded_by_the_tightest_limit_around_the_process(tmp_path):
    group = "sys/fs/cgroup/pod"
    v2 = _machine(tmp_path / "v2", available_kib=900, group="0::/pod/leaf\n", files={
        f"{group}/leaf/memory.max": "max\n", f"{group}/leaf/memory.current": "5\n", f"{group}/leaf/memory.stat": "",
        f"{group}/memory.max": f"{700 * KIB}\n", f"{group}/memory.current": f"{500 * KIB}\n",
        f"{group}/memory.stat": f"anon 1\ninactive_file {30 * KIB}\nactive_file {10 * KIB}\n",
    })
    assert memory.available_bytes(v2) == 240 * KIB
    v1 = _machine(tmp_path / "v1", available_kib=100, group="7:cpu:/x\n5:memory:/docker/abc\n", files={
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{700 * KIB}\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{630 * KIB}\n",
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    })
    assert memory.available_bytes(v1) == 70 * KIB
    assert memory.available_bytes(_machine(tmp_path / "none", available_kib=100, group="0::/\n", files={})) == 100 * KIB
    assert memory.available_bytes(tmp_path / "nothing") is None


def test_memory_of_this_machine_is_told():
    assert (memory.available_bytes() or 0) > 1 << 20
