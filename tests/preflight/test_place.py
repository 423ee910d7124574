"""Where a run will train: the hosts of its launcher, not this machine, decide what is planned and refused."""

from __future__ import annotations

import pytest

from harness.config import rules
from harness.config.load import load
from harness.errors import Refused
from harness.launch import local
from harness.preflight.place import Place, where
from tests.config.test_load import BASE


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "num_gpus", lambda: 0)  # a login node
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\nc slots=4\n")
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(run_dir=tmp_path / "run"))
    return path


@pytest.mark.parametrize(
    "words, place",
    [
        (["launch.ranks=16", "launch.slurm.nodes=2", "launch.slurm.ranks_per_node=8"], Place(16, 8, True, False)),
        (["launch.slurm.nodes=2", "launch.slurm.ranks_per_node=8", "engine.device=cpu"], Place(16, 8, False, False)),
        (["launch.ranks=4", "launch.kubernetes.pods=4"], Place(4, 1, True, False)),
        (["launch.hosts.file={hosts}", "launch.hosts.exclude=[c]"], Place(12, 8, True, True)),
        (["launch.ranks=2", "launch.slurm.nodes=4"], Place(2, 2, False, True)),
        (["launch.kubernetes.image=some"], Place(1, 1, False, True)),
    ],
)
def test_the_hosts_that_the_run_file_names(run_file, words, place):
    assert where(load(run_file, [word.format(hosts=run_file.parent / "hosts") for word in words])) == place


def test_other_ranks_than_a_launcher_starts_are_on_this_machine(run_file):
    assert where(load(run_file, ["launch.slurm.nodes=4"]), 2) == Place(2, 2, False, True)


@pytest.mark.parametrize("word", ["train.precision=fp16", "engine.device=cuda"])
def test_what_needs_a_gpu_is_not_refused_for_hosts_that_have_some(run_file, word):
    loaded = load(run_file, [word, "launch.slurm.nodes=2", "train.micro_batch=1"])
    place = where(loaded)
    rules.check(loaded, ranks=place.ranks, has_gpu=place.has_gpu, here=place.here)
    with pytest.raises(Refused, match="GPU"):
        rules.check(loaded, ranks=2, has_gpu=where(loaded, 1).has_gpu)
