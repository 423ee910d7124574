"""A set on which somebody trains is not replaced by a preparation with other settings."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from harness.data import in_use
from harness.data.prepare import prepare
from tests.data.conftest import make_run, write_pairs


def prepared(run_file, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "harness", "prepare", str(run_file), *words], capture_output=True, text=True)


@pytest.fixture
def run(tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 60)
    run = make_run(tmp_path, train={"path": str(tmp_path / "pairs.jsonl")}, shape="prompt_completion")
    prepare(run, progress=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    return run


def test_it_is_replaced_when_nobody_trains_on_it(run, tmp_path):
    before = (tmp_path / "data" / "train" / "index.json").read_bytes()
    with in_use.hold(run.data), in_use.hold(run.data):
        found = prepared(tmp_path / "run.yaml")
        assert found.returncode == 0, found.stderr
        refused = prepared(tmp_path / "run.yaml", "data.template.prompt=Ask {prompt}")
        assert refused.returncode == 2 and "A run trains on the prepared set" in refused.stderr and "another folder" in refused.stderr
        assert (tmp_path / "data" / "train" / "index.json").read_bytes() == before
    found = prepared(tmp_path / "run.yaml", "data.template.prompt=Ask {prompt}")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "data" / "train" / "index.json").read_bytes() != before


def test_a_folder_that_cannot_be_written_is_held_by_nobody(run, tmp_path):
    run = run.model_copy(update={"data": run.data.model_copy(update={"dir": str(tmp_path / "nowhere")})})
    with in_use.hold(run.data):
        in_use.refuse_replacing(run.data, where="data.dir")
