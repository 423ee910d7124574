"""What a soak begins with and must not leave: a run file, and names in shared memory that nobody holds."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import yaml

from harness.testing.models import tiny_architecture

WORDS = "tone size name rule form pace hue age rank kind sum part root turn base edge".split()


def write_run_file(folder: Path) -> Path:
    """A tiny GPT-2 in fp32 on two ranks, from scratch, under ZeRO-2, with faults taken for granted.

    Args:
        folder: for the data and the run file.
    """
    for name, count in (("train", 64), ("held", 6)):
        pairs = [(f"What is the {WORDS[n % 16]} of {n}, {name}?", f"It is {n * 7 % 23} {WORDS[n % 16]}s, more or less.") for n in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    values = {
        "run_dir": str(folder / "nowhere"),
        "data": {
            "dir": str(folder / "data"), "train": {"path": str(folder / "train.jsonl")}, "validation": {"path": str(folder / "held.jsonl")},
            "shape": "prompt_completion", "columns": {"prompt": "question", "completion": "answer"}, "sequence_length": 64,
            "train_tokenizer": {"vocab_size": 320},
        },
        "model": {"architecture": tiny_architecture("gpt2", width=64, dropout=0.1)},
        "train": {"global_batch_rows": 8, "micro_batch": 1, "precision": "fp32"},
        "optimizer": {"lr": 3e-4, "schedule": "constant"},
        "engine": {"deepspeed": "zero2", "device": "cpu"},
        "checkpoint": {"keep_last": 4},
        "launch": {"ranks": 2, "restarts": 50, "silence_seconds": 8},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def left_in_shared_memory() -> set[str]:
    """Names of this user in /dev/shm that no process has open or mapped."""
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            held |= {line.split("/dev/shm/")[1].split()[0] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line}
            held |= {Path(os.readlink(link)).name for link in (process / "fd").iterdir() if "/dev/shm/" in os.readlink(link)}
    return {path.name for path in Path("/dev/shm").iterdir() if path.stat().st_uid == os.getuid()} - held
