"""The Slurm script: compared whole with files that are kept, checked by shellcheck, and careful with what users write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.load import load
from harness.errors import Refused
from harness.launch import slurm
from tests.launch.golden import GOLDEN, assert_golden

ONE_NODE = ["launch.ranks=null", "engine.device=cpu", "launch.slurm.ranks_per_node=2", "launch.slurm.cpus_per_node=2"]
MANY = [
    "launch.ranks=null", "launch.slurm.nodes=16", "launch.slurm.ranks_per_node=8", "launch.slurm.partition=gpu", 'launch.slurm.time="2-12:00:00"',
    "launch.slurm.account=lab", "launch.slurm.qos=long", "launch.slurm.grace_seconds=300", "launch.slurm.extra=[--constraint=h100&nvlink]",
    "run_dir=/scratch/my runs/medical", "evaluation.prompts=[\"What's $HOME?\"]",
]


def _script(repository: Path, overrides: list[str]) -> str:
    loaded = load(repository / "launch/runs/medical_qa.yaml", overrides)
    folder = Path("/home/me/project")
    plan = slurm.plan(loaded, run_file="launch/runs/medical_qa.yaml", overrides=overrides, folder=folder)
    return slurm.render(plan, loaded.run.launch.slurm, python="/home/me/project/.venv/bin/python", folder=folder)


@pytest.mark.parametrize(("name", "overrides"), [("one_node", ONE_NODE), ("many_nodes", MANY)])
def test_scripts(repository, name, overrides):
    assert_golden(f"{name}.sbatch", _script(repository, overrides))


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.stem)
def test_shellcheck(path):
    checked = subprocess.run(["shellcheck", "--shell=bash", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_words_reach_the_starter_as_they_are(repository):
    """What bash makes of the command is what was given: srun is a function that shows its words."""
    script = _script(repository, MANY)
    start, end = script.index("srun "), script.index(" &\nstep=")
    shown = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}\npython=py master=h0 port=1 job=slurm-7\n{script[start:end]}"],
        capture_output=True, text=True, check=True, env={"HOME": "/wrong", "PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()
    assert shown[-4:] == [MANY[0], *MANY[-2:], "checkpoint.grace_seconds=300"]
    assert shown[shown.index("py") :][:10] == ["py", "-u", "-m", "harness.launch.node", "--slots", ",".join("8" * 16), "--meet", "h0:1", "--job", "slurm-7"]


@pytest.mark.parametrize("override", [
    "launch.slurm.partition=\"gpu\\n#SBATCH --x\"", "launch.slurm.time=soon", "launch.slurm.account=a b", "launch.slurm.extra=[constraint]",
    "launch.slurm.extra=[\"--x\\necho\"]", "run_dir=/runs/50%", "run_dir=\"/runs/a\\\"b\"",
])
def test_what_slurm_would_misread_is_refused(repository, override):
    with pytest.raises(Refused):
        _script(repository, [override])


def test_a_grace_of_the_users_own_is_kept(repository):
    assert "checkpoint.grace_seconds=30" in _script(repository, ["checkpoint.grace_seconds=30"])
    assert _script(repository, ["checkpoint.grace_seconds=30"]).count("checkpoint.grace_seconds") == 1


def test_print_shows_it_and_does_nothing_else(repository, tmp_path):
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "harness", "launch", "launch/runs/medical_qa.yaml", "launch.ranks=null", f"run_dir={run_dir}", "--on", "slurm", "--print"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 0 and done.stdout.startswith("#!/bin/bash\n#SBATCH --job-name=run\n"), done.stderr
    assert f"#SBATCH --chdir={repository}" in done.stdout and not run_dir.exists()
