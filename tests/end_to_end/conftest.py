"""Runs through the real launcher, shared by the tests that look at them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.testing.models import tiny_architecture


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    output: str


def harness(*words: object, timeout: float = 300, cwd: Path | None = None) -> Finished:
    """`python -m harness WORDS`."""
    done = subprocess.run([sys.executable, "-m", "harness", *map(str, words)], capture_output=True, text=True, timeout=timeout, cwd=cwd)
    return Finished(done.returncode, done.stdout + done.stderr)


def deepspeed(*words: object, ranks: int = 2, timeout: float = 300, cwd: Path | None = None) -> Finished:
    """`deepspeed --module harness WORDS` on this machine."""
    from harness.launch.local import free_port

    command = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), "--no_local_rank"]
    done = subprocess.run([*command, "--module", "harness", *map(str, words)], capture_output=True, text=True, timeout=timeout, cwd=cwd)
    return Finished(done.returncode, done.stdout + done.stderr)


QUESTIONS = [(f"What is the {word} of {n}?", f"It is {n * 7 % 23} {word}s, more or less.") for n, word in enumerate("tone size name rule form pace hue age rank kind sum part root turn base edge".split())]


@pytest.fixture
def pairs(tmp_path) -> Path:
    """Sixteen question-answer pairs."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    return path


@pytest.fixture
def run_file(tmp_path, pairs) -> Path:
    """A run file for a tiny GPT-2 on those pairs, from scratch, with a tokenizer of its own."""
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"question": f"{q} Really?", "answer": a}) + "\n" for q, a in QUESTIONS[:5]))
    import yaml

    values = {
        "run_dir": str(tmp_path / "run"),
        "data": {
            "dir": str(tmp_path / "data"), "train": {"path": str(pairs)}, "validation": {"path": str(held)}, "shape": "prompt_completion",
            "columns": {"prompt": "question", "completion": "answer"}, "sequence_length": 64, "train_tokenizer": {"vocab_size": 320},
        },
        "model": {"architecture": tiny_architecture("gpt2", width=64, dropout=0.1)},
        "train": {"steps": 8, "global_batch_rows": 4, "micro_batch": 1, "precision": "fp32", "activation_checkpointing": 1},
        "optimizer": {"lr": 3e-3, "schedule": "constant"},
        "engine": {"deepspeed": "zero3_offload_cpu", "device": "cpu"},
        "evaluation": {"every_steps": 4},
        "checkpoint": {"every_steps": 4},
        "launch": {"ranks": 2, "restarts": 0},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path
