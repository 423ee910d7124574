"""What the README shows can be typed, and what ships can be loaded."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from harness.cli.main import VERBS, build_parser
from harness.config.batch import batch_equation
from harness.config.deepspeed import merge
from harness.config.load import load


def _readme(repository) -> str:
    return (repository / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")


def test_every_command_of_the_readme_parses(repository):
    commands = re.findall(r"^harness .*$", _readme(repository), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        build_parser().parse_args(shlex.split(command, comments=True)[1:])


def test_launches_over_several_hosts_are_shown_and_not_refused(repository, tmp_path):
    """With two hosts of eight slots; a program of MPI is looked for, nothing is started."""
    (tmp_path / "launch").symlink_to(repository / "launch")
    (tmp_path / "hosts").write_text("gpu-a slots=8\ngpu-b slots=8\n")
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    (tmp_path / "mpirun").chmod(0o755)
    commands = [shlex.split(line) for line in re.findall(r"^harness launch .*--on .*$", _readme(repository), re.MULTILINE)]
    assert sorted(words[words.index("--on") + 1] for words in commands) == ["hosts", "kubernetes", "mpi", "slurm"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for words in commands:
        shown = subprocess.run([sys.executable, "-m", *words, "--print"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert shown.returncode == 0, f"{shlex.join(words)}\n{shown.stderr}"


def test_every_verb_is_in_the_readme(repository):
    for verb in VERBS:
        assert f"`harness {verb} " in _readme(repository), verb


def test_the_readme_shows_the_run_file_that_ships(repository):
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", _readme(repository), re.DOTALL).group(1))
    assert shown == yaml.safe_load((repository / "launch/runs/medical_qa.yaml").read_text(encoding="utf-8"))


def test_no_placeholder_is_left(repository):
    assert "@@" not in _readme(repository)


@pytest.mark.parametrize("name", ["medical_qa", "writing", "mixture", "quickstart_pretrain", "quickstart_finetune"])
@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero1_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme"])
def test_what_ships_fits_together(repository, name, engine):
    loaded = load(repository / "launch/runs" / f"{name}.yaml", [f"engine.deepspeed={engine}", "engine.nvme_dir=/nvme"])
    merged = merge(loaded, batch_equation(loaded, 2))
    assert merged["train_micro_batch_size_per_gpu"] * merged["gradient_accumulation_steps"] * 2 == loaded.run.train.global_batch_rows
