"""`mpirun -n 2 harness prepare`: the bytes of one process, one message for a mistake, and no waiting for a rank that failed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import write_pairs
from tests.end_to_end.conftest import Finished

MPIRUN = shutil.which("mpirun")
pytestmark = pytest.mark.skipif(MPIRUN is None, reason="there is no mpirun (Debian: apt-get install openmpi-bin)")
SMALL_SHARDS = "from harness.data import prepare\nprepare.SHARD_TEXT_BYTES = 16 << 10\n"
ROWS = 600


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Of processes that make small shards, so that there are many."""
    place = tmp_path / "site"
    place.mkdir()
    (place / "sitecustomize.py").write_text(SMALL_SHARDS)
    return os.environ | {"PYTHONPATH": f"{place}:{os.environ['PYTHONPATH']}", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def _options() -> list[str]:
    """More ranks than cores are allowed; other implementations of MPI allow it unasked."""
    version = subprocess.run([str(MPIRUN), "--version"], capture_output=True, text=True, timeout=30).stdout
    return ["--oversubscribe"] if "Open MPI" in version else []


def _prepare(folder: Path, environment: dict[str, str], source: Path, *, ranks: int) -> Finished:
    folder.mkdir()
    values = {
        "run_dir": str(folder / "run"), "model": {"architecture": {"model_type": "gpt2"}}, "train": {"steps": 1, "global_batch_rows": 8},
        "data": {"dir": str(folder / "data"), "train": {"path": str(source)}, "validation_share": 0.1, "shape": "prompt_completion",
                 "sequence_length": 64, "train_tokenizer": {"vocab_size": 300}, "num_processes": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(values))
    start = [str(MPIRUN), *_options(), "-n", str(ranks)] if ranks > 1 else []
    done = subprocess.run([*start, sys.executable, "-m", "harness", "prepare", str(folder / "run.yaml")],
                          capture_output=True, text=True, timeout=120, env=environment, stdin=subprocess.DEVNULL)
    return Finished(done.returncode, done.stdout + done.stderr)


def _bytes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".digests.json"}


def _one_message(done: Finished, told: str) -> None:
    assert done.code == 2, done.output
    assert done.output.count(told) == 1 and done.output.count("harness: ") == 1, done.output
    assert "Traceback" not in done.output, done.output


def test_the_bytes_of_one_process(tmp_path, environment):
    source = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    found = {}
    for ranks in (1, 2):
        done = _prepare(tmp_path / str(ranks), environment, source, ranks=ranks)
        assert done.code == 0, done.output
        found[ranks] = _bytes(tmp_path / str(ranks) / "data")
    assert found[1] == found[2] and sum(name.endswith(".arrow") for name in found[1]) > 10
    assert done.output.count("rows in") == 1, f"one rank shows the audit: {done.output}"


def test_a_missing_file(tmp_path, environment):
    _one_message(_prepare(tmp_path / "absent", environment, tmp_path / "absent.jsonl", ranks=2), "There is no file")


def test_a_broken_row_in_the_last_shard(tmp_path, environment):
    source = write_pairs(tmp_path / "pairs.jsonl", ROWS)
    with open(source, "a") as stream:
        stream.write("{oops\n")
    done = _prepare(tmp_path / "broken", environment, source, ranks=2)
    _one_message(done, f"pairs.jsonl line {ROWS + 1} is not JSON")
    assert f"where:  {source}:{ROWS + 1} (data.train.path)" in done.output
