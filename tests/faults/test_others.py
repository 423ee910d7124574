"""What works for runs before they train, killed: a preparation of data, and a compilation of operators."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.end_to_end.faults import assert_same, events, running
from tests.faults import cases
from tests.faults.cases import Case, rows
from tests.faults.test_runs import wait


def _prepare(folder: Path, name: str) -> list[str]:
    """`harness prepare` of 6 MB of pairs with two processes."""
    source = folder / "pairs.jsonl"
    if not source.is_file():
        source.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n * 7 % 9973}. " * 8}) + "\n" for n in range(30_000)))
    values = {
        "run_dir": str(folder / "run"), "model": {"architecture": {"model_type": "gpt2"}}, "train": {"steps": 1, "global_batch_rows": 8},
        "data": {
            "dir": str(folder / name), "train": {"path": str(source)}, "validation_share": 0.1, "shape": "prompt_completion",
            "sequence_length": 64, "train_tokenizer": {"vocab_size": 300}, "num_processes": 2,
        },
    }
    (folder / f"{name}.yaml").write_text(json.dumps(values))
    script = folder / "prepare.py"  # a source of this size is one shard, which one process would do
    script.write_text("import sys\nfrom harness.cli.main import main\nfrom harness.data import prepare\nif __name__ == '__main__':\n"
                      "    prepare.SHARD_TEXT_BYTES = 200_000\n    sys.exit(main(['prepare', sys.argv[1]]))\n")
    return [sys.executable, str(script), str(folder / f"{name}.yaml")]


def _bytes(folder: Path) -> dict[str, bytes]:
    """Of the shards, whose names and bytes are a function of the source."""
    return {path.name: path.read_bytes() for path in folder.rglob("shard-*") if path.is_file()}


@rows(cases.PREPARE)
def test_a_preparation_is_killed(case: Case, measured, tmp_path):
    """All its processes at once: no one is left who could tidy up."""
    subprocess.run(_prepare(tmp_path, "whole"), check=True, capture_output=True)
    child = subprocess.Popen(_prepare(tmp_path, "killed"), start_new_session=True, stdout=subprocess.DEVNULL)
    wait(lambda: list((tmp_path / "killed").glob("train/parts/shard-*.json")), "the first shard")
    assert len(psutil.Process(child.pid).children(recursive=True)) >= 2
    struck = time.time()
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    wait(lambda: not [one for one in psutil.process_iter(["cmdline"]) if "killed.yaml" in " ".join(one.info["cmdline"] or [])], "its end")
    measured["ended"] = time.time() - struck
    subprocess.run(_prepare(tmp_path, "killed"), check=True, capture_output=True)
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


@rows(cases.OPERATORS)
def test_a_build_of_operators_is_killed(case: Case, course, measured, monkeypatch, tmp_path):
    """With the rank that waits for it; what compiles has a session of its own."""
    place, run_dir = tmp_path / "operators", tmp_path / "run"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place))

    def compilers() -> list[psutil.Process]:
        return [one for one in psutil.process_iter(["name", "cwd"]) if str(place) in (one.info["cwd"] or "")]

    with running(course.run_file, run_dir) as it:
        it.until(lambda: any(one.info["name"].startswith(("cc1plus", "g++", "c++")) for one in compilers()))
        struck, first = time.time(), compilers()
        above = {parent.pid for one in first if one.is_running() for parent in one.parents()}
        it.strike(signal.SIGKILL, ranks=[number for number, rank in enumerate(it.ranks()) if rank.pid in above])
        wait(lambda: "SIGKILL" in it.output, "the notice")
        measured["noticed"] = time.time() - struck
        wait(lambda: events(run_dir, "relaunch"), "a new start")
        measured["ended"] = events(run_dir, "relaunch")[0]["time"] - struck
        assert not [one for one in first if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        assert it.end(timeout_s=300) == 0, it.output
    assert list(place.rglob("*.so")) and not list(place.rglob("lock"))
    assert_same(run_dir, course.run_dir)
