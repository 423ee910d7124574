"""Several hosts: the hostfile, the roll call, and every command as it would run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli.main import main
from harness.config.load import load
from harness.errors import Refused
from harness.launch import hostfile, hosts, local, mpi, roll_call
from harness.launch.job import Job
from tests.launch.golden import assert_golden

WORDS = ("launch/runs/medical_qa.yaml", "train.steps=3", "evaluation.prompts=[What is asthma?]", "data.columns={prompt: a}", "run_dir=a's")
TWO = {"gpu-a": 8, "gpu-b": 4}


def _text(commands) -> str:
    return "".join(shlex.join(command).replace(sys.executable, "PYTHON").replace(sys.prefix, "PREFIX") + "\n" for command in commands)


def test_the_commands_of_each_form(monkeypatch):
    monkeypatch.setattr("os.getcwd", lambda: "/home/me/project")
    job = Job(WORDS, tuple(TWO.values()), "gpu-a", 20000)
    names = ["NCCL_DEBUG", "PATH"]
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    forms = {
        "local": [local.render(ranks=2, port=20000, run_file=WORDS[0], overrides=WORDS[1:])],
        "ssh": hosts.ssh_commands(job, list(TWO), port=2222),
        "deepspeed": [hosts.deepspeed_command(job, Path("/runs/a/launch/hostfile"))],
        "openmpi": [mpi.render("openmpi", ranks=12, hosts="/runs/a/launch/mpi-hosts", names=names, run_file=WORDS[0], overrides=WORDS[1:])],
        "mpich": [mpi.render("mpich", ranks=12, hosts="/runs/a/launch/mpi-hosts", names=names, run_file=WORDS[0], overrides=WORDS[1:])],
    }
    assert_golden("commands.txt", "".join(f"# {name}\n{_text(commands)}\n" for name, commands in forms.items()))


def test_words_and_variables_survive_the_shell_of_another_host():
    """What a shell makes of ssh's last word is what was given."""
    shell = ["sh", "-c", hosts.there(["sh", "-c", 'printf "%s\\n" "$A" "$HF_TOKEN" "$@"; cat', "sh", *WORDS])]
    values = hosts.lines({"A": "b  c # *", "HF_TOKEN": "a=b"})
    shown = subprocess.run(shell, input=f"{values}\nthe rest", capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["b  c # *", "a=b", *WORDS, "the rest"]
    assert not any("HF_TOKEN" in word for command in hosts.ssh_commands(Job(WORDS, (1, 1), "h0", 1), ["h0", "h1"], port=None) for word in command)


@pytest.mark.parametrize("words", [["--on", "hosts", "launch.hosts.through=ssh"], ["--on", "hosts", "launch.hosts.through=deepspeed"], ["--on", "mpi"]])
def test_no_secret_is_shown(tmp_path, repository, monkeypatch, capsys, words):
    for name in ("pdsh", "mpirun"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("h0 slots=1\nh1 slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "NCCL_NET", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, f"value-of-{name}")
    run = [str(repository / "launch/runs/medical_qa.yaml"), f"launch.hosts.file={tmp_path / 'hosts'}", f"run_dir={tmp_path / 'run'}", "train.global_batch_rows=8"]
    assert main(["launch", *run, "--print", *words]) == 0
    shown = capsys.readouterr().out
    assert sorted(re.findall(r"value-of-(\w+)", shown)) == ["NCCL_NET", "TOKENIZERS_PARALLELISM"]
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS"):
        assert re.search(rf"^(export )?{name}=\*\*\*$", shown, re.MULTILINE), shown


def test_deepspeed_gets_words_that_its_shell_leaves_alone():
    words = hosts.deepspeed_command(Job(WORDS[:4], (1, 1), "h0", 1), Path("hostfile"))
    assert words[-3:] == (WORDS[1], WORDS[2], WORDS[3]) and "'a*b'" in hosts.deepspeed_command(Job(("run.yaml", "a*b"), (1, 1)), Path("h"))
    with pytest.raises(Refused, match="launch.hosts.through=ssh"):
        hosts.deepspeed_command(Job(("run.yaml", "a $HOME"), (1, 1)), Path("h"))


@pytest.mark.parametrize(("text", "message"), [
    (None, "does not exist"), ("# nobody\n\n", "names no host"), ("h0 slots=2\nh0 slots=1\n", "Line 2 .* names h0 a second time"),
    ("h0 slot=2\n", "Line 1 .* is not `HOST slots=N`: h0 slot=2"), ("h0 slots=0\n", "Line 1"), ("h0 slots=1 max=2\n", "Line 1"),
])
def test_a_wrong_hostfile_is_refused(tmp_path, text, message):
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Refused, match=message):
        hostfile.read_hostfile(path, where="launch.hosts.file")


def test_slots_that_make_another_number_of_ranks_are_refused_before_any_host_is_asked(tmp_path):
    (tmp_path / "hosts").write_text("h0 slots=2\nh1 slots=1\n")
    words = [f"launch.hosts.file={tmp_path / 'hosts'}"]
    run_file = Path(__file__).parents[2] / "launch" / "runs" / "medical_qa.yaml"
    with pytest.raises(Refused, match=r"asks for 4 ranks, but the slots of h0 \(2\), h1 \(1\) make 3") as refused:
        hosts.choose(load(run_file, [*words, "launch.ranks=4"]))
    assert "launch.ranks=3" in refused.value.remedy and "launch.hosts.file" in refused.value.where
    assert hosts.choose(load(run_file, [*words, "launch.ranks=3"])) == {"h0": 2, "h1": 1}
    assert sum(hosts.choose(load(run_file, [*words, "launch.ranks=2", "launch.hosts.at_least=1", "launch.hosts.exclude=[h1]"])).values()) == 2


def test_hosts_are_chosen_by_name(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("a slots=2 # old\nb\n\nc slots=4\n")
    found = hostfile.read_hostfile(path, where="")
    assert found == {"a": 2, "b": 1, "c": 4}
    assert hostfile.choose(found, include=[], exclude=["b"], where="") == {"a": 2, "c": 4}
    assert hostfile.choose(found, include=["c"], exclude=[], where="") == {"c": 4}
    for include, exclude in ((["d"], []), ([], ["d"]), (["a"], ["a"])):
        with pytest.raises(Refused):
            hostfile.choose(found, include=include, exclude=exclude, where="")


def test_mpi_ranks_meet_on_the_host_where_open_mpi_puts_the_first_one(tmp_path, repository, monkeypatch):
    """On that where it is started, even if the hostfile names another one first."""
    (tmp_path / "mpirun").write_text("#!/bin/sh\necho 'mpirun (Open MPI) 4.1.4'\n")
    (tmp_path / "mpirun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    loaded = load(repository / "launch/runs/medical_qa.yaml", [f"run_dir={tmp_path}"])
    for names in (["192.0.2.1", "localhost"], ["localhost", "192.0.2.1"]):
        plan = mpi.plan(loaded, dict.fromkeys(names, 2), run_file="run.yaml", overrides=[])
        assert plan.texts[tmp_path / "launch" / "mpi-hosts"] == "localhost slots=2\n192.0.2.1 slots=2\n"
        assert plan.environment["MASTER_ADDR"] == "localhost" and "MASTER_ADDR" in plan.commands[0]


def test_hosts_look_for_operators_of_their_own_processor(repository, monkeypatch):
    loaded = load(repository / "launch/runs/medical_qa.yaml")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    assert "TORCH_EXTENSIONS_DIR" not in hosts.variables(loaded)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/shared/operators")
    assert hosts.variables(loaded)["TORCH_EXTENSIONS_DIR"] == "/shared/operators"


def test_no_hostfile_is_refused_and_not_taken_for_this_machine(repository):
    with pytest.raises(Refused, match="launch.hosts.file"):
        hosts.choose(load(repository / "launch/runs/medical_qa.yaml"))


@pytest.fixture(scope="module")
def own(repository):
    return roll_call.facts(str(repository / "launch/runs/medical_qa.yaml"))


@pytest.mark.parametrize(("change", "problem"), [
    ({}, ""), ({"python": "3.12.1"}, "it has python 3.12.1"), ({"versions": {"torch": "2.4.0"}}, "it has torch 2.4.0, this host"),
    ({"versions": {"deepspeed": "none"}}, "it has deepspeed none"), ({"code": "0"}, "its code of the harness differs"),
    ({"run file": None}, "it has no such run file"), ({"run file": "0"}, "its run file differs"), ({"gpus": 2}, "gives it 4 slots, but it has 2 GPUs"),
])
def test_what_differs_is_named(own, change, problem):
    own = own | {"gpus": 8}
    answer = own | change | {"versions": own["versions"] | change.get("versions", {})}
    found = roll_call.problems({"h1": answer, "h2": "No route to host"}, own, slots={"h1": 4, "h2": 4}, needs_gpus=True)
    assert found.pop("h2") == "No route to host"
    assert problem in found.get("h1", "") and bool(found) == bool(problem)


def test_without_an_ssh_client_that_is_said(repository, monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = roll_call.ask(["h1"], str(repository / "launch/runs/medical_qa.yaml"), ssh=("ssh",))
    assert told == {"h1": "ssh cannot be started here: No such file or directory"}


def test_slots_are_held_against_the_gpus_of_the_hosts_not_of_this_machine(tmp_path, monkeypatch):
    """ssh answers from this machine, which has no GPU, in the name of hosts that have four."""
    ssh = tmp_path / "ssh"
    ssh.write_text("""#!/bin/sh\nfor last; do :; done\nsh -c "$last" | sed 's/"gpus": [0-9]*/"gpus": 4/'\n""")
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "run.yaml").write_text("run_dir: r\ndata: {dir: d}\nmodel: {path: m}\ntrain: {steps: 1}\n")
    for device, found in (("auto", True), ("cuda", True), ("cpu", False)):
        loaded = load(tmp_path / "run.yaml", [f"engine.device={device}", "launch.hosts.file=hosts"])
        assert hosts.check(loaded, {"gpu-a": 4}, run_file=str(tmp_path / "run.yaml")) == {"gpu-a": 4}
        if found:
            with pytest.raises(Refused, match="8 slots, but it has 4 GPUs"):
                hosts.check(loaded, {"gpu-a": 4, "gpu-b": 8}, run_file=str(tmp_path / "run.yaml"))
        else:
            assert hosts.check(loaded, {"gpu-b": 8}, run_file=str(tmp_path / "run.yaml"))


def test_this_host_answers_itself(own, repository):
    told = roll_call.ask(["localhost"], str(repository / "launch/runs/medical_qa.yaml"), ssh=("ssh",))
    assert roll_call.problems(told, own, slots={"localhost": 1}, needs_gpus=False) == {}
