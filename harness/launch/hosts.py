"""A run on several hosts over ssh: through the `deepspeed` launcher and pdsh, or through plain ssh; on each a node starter."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.config.load import Loaded
from harness.errors import Refused
from harness.launch import hostfile, operators, roll_call
from harness.launch.job import Job
from harness.launch.local import free_port
from harness.launch.run import LaunchPlan
from harness.log import say

PASSED_ON = ("PYTHONPATH", "HF_", "NCCL_", "GLOO_", "FI_", "UCX_", "TORCH_", "CUDA_", "OMP_", "TOKENIZERS_", "AWS_", "GOOGLE_", "DS_ACCELERATOR", "LD_LIBRARY_PATH")
"""Variables of this process, by the beginning of their names, that every rank gets."""
KEPT = ("CUDA_VISIBLE_DEVICES",)
"""Of those, what says something about this machine alone."""
TAKE = 'while IFS= read -r line && [ -n "$line" ]; do export "$line"; done; exec "$@"'
"""Variables come by standard input: all users of a host see the words of commands."""
ALIVE = ("-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=6")
"""A dead link ends ssh within about half a minute; without it, never."""


def choose(loaded: Loaded) -> dict[str, int]:
    """The hosts of the run file's hostfile, and the ranks of each.

    Raises:
        Refused: without a hostfile, or when it is wrong or gives another number of ranks than `launch.ranks`.
    """
    settings = loaded.run.launch.hosts
    where = f"launch.hosts.file ({loaded.origin('launch.hosts.file')})"
    if settings.file is None:
        raise Refused("Which hosts to use is not said.", where=where, remedy="Set `launch.hosts.file` to a hostfile: a line a host, `HOST slots=N`.")
    named = hostfile.read_hostfile(Path(settings.file), where=where)
    chosen = hostfile.choose(named, include=settings.include, exclude=settings.exclude, where=where)
    wanted, given = loaded.run.launch.ranks, sum(chosen.values())
    if wanted not in (None, given) and settings.at_least is None:
        raise Refused(
            f"The run file asks for {wanted} ranks, but the slots of {', '.join(f'{host} ({slots})' for host, slots in chosen.items())} make {given}.",
            where=f"launch.ranks ({loaded.origin('launch.ranks')}), {where}", remedy=f"Mend the slots, or set launch.ranks={given}.",
        )
    return chosen


def check(loaded: Loaded, chosen: Mapping[str, int], *, run_file: str) -> dict[str, int]:
    """Those of the hosts that can train this run.

    Raises:
        Refused: a host cannot, and `launch.hosts.at_least` does not allow to go on without it.
    """
    settings = loaded.run.launch.hosts
    told = roll_call.ask(list(chosen), run_file, ssh=_ssh(settings.ssh_port))
    device = loaded.run.engine.device
    some_gpu = any(answer["gpus"] for answer in told.values() if not isinstance(answer, str))  # this machine may have none
    found = roll_call.problems(told, roll_call.facts(run_file), slots=chosen, needs_gpus=device == "cuda" or (device == "auto" and some_gpu))
    if not found:
        return dict(chosen)
    reasons = "\n".join(f"  {host}: {problem}" for host, problem in found.items())
    left = {host: slots for host, slots in chosen.items() if host not in found}
    if len(left) < (settings.at_least or len(chosen)):
        raise Refused(
            f"{len(found)} of {len(chosen)} hosts cannot train this run:\n{reasons}", where=f"launch.hosts.file ({settings.file})",
            remedy="Mend them, leave them out (launch.hosts.exclude), or allow to go on without them (launch.hosts.at_least).",
        )
    say(f"Going on without {len(found)} of {len(chosen)} hosts:\n{reasons}")
    return left


def plan(loaded: Loaded, chosen: Mapping[str, int], *, run_file: str, overrides: Sequence[str]) -> LaunchPlan:
    """The commands that start a node starter on every host, in the same folder as here.

    Raises:
        Refused: pdsh is wanted and not here.
    """
    settings = loaded.run.launch.hosts
    job = Job((run_file, *overrides), tuple(chosen.values()), settings.master or next(iter(chosen)), settings.port or free_port())
    through = settings.through if settings.through != "auto" else "deepspeed" if shutil.which("pdsh") and len(chosen) > 1 else "ssh"
    folder = loaded.run.run_path.absolute() / "launch"
    if through == "ssh":
        return LaunchPlan(ssh_commands(job, list(chosen), port=settings.ssh_port), loaded.run.run_path, job=job, stdin=lines(variables(loaded)))
    if not shutil.which("pdsh"):
        raise Refused("pdsh is not on this machine.", where="launch.hosts.through", remedy="Install pdsh, or set `launch.hosts.through=ssh`.")
    texts = {folder / "hostfile": hostfile.render(dict.fromkeys(chosen, 1))}  # one process a host: its node starter
    private = {folder / "environment": lines(variables(loaded))}
    environment = {"DS_ENV_FILE": str(folder / "environment"), "PDSH_SSH_ARGS_APPEND": " ".join(_ssh(settings.ssh_port)[1:]), "PDSH_RCMD_TYPE": "ssh"}
    return LaunchPlan((deepspeed_command(job, folder / "hostfile"),), loaded.run.run_path, environment, job=job, texts=texts, private=private)


def deepspeed_command(job: Job, hosts: Path) -> tuple[str, ...]:
    """The words of DeepSpeed's launcher, which starts the node starter as if it were the one rank of each host."""
    script = Path(sys.prefix) / "bin" / "deepspeed"
    program = [str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    starter = [_for_a_shell(word) for word in job.command(None, python="")[2:]]
    return (
        *program, "--hostfile", str(hosts), "--launcher", "pdsh", "--force_multi", "--no_ssh_check", "--master_addr", job.master, "--master_port",
        str(job.port), "--no_local_rank", "--log_level", "error", "--module", *starter,
    )


def _for_a_shell(word: str) -> str:
    """DeepSpeed's launcher joins words for the shell of the other host, and puts quotes around those with spaces alone."""
    if " " not in word:
        return shlex.quote(word)
    if re.search(r"[$`\\!]", word):
        raise Refused(
            f"`{word}` holds spaces and one of $ ` \\ !, which does not survive DeepSpeed's launcher.", where="the command line",
            remedy="Write it into the run file, or set `launch.hosts.through=ssh`.",
        )
    return word


def ssh_commands(job: Job, hosts: Sequence[str], *, port: int | None) -> tuple[tuple[str, ...], ...]:
    """One ssh a host, which reads the `lines` of the variables."""
    return tuple((*_ssh(port), host, there(job.command(number, python=sys.executable))) for number, host in enumerate(hosts))


def there(words: Sequence[str]) -> str:
    """A command for the shell of another host, in the same folder, with variables that come as `lines`, up to an empty one, on its standard input."""
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['sh', '-c', TAKE, 'sh', *words])}"


def lines(values: Mapping[str, str]) -> str:
    """Variables, one a line."""
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _ssh(port: int | None) -> tuple[str, ...]:
    """The words before a host's name."""
    return ("ssh", *ALIVE, *(("-p", str(port)) if port else ()))


def variables(loaded: Loaded) -> dict[str, str]:
    """What every rank of every host finds in its environment.

    Raises:
        Refused: a value that DeepSpeed's launcher cannot carry.
    """
    named = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and name not in KEPT}
    own = {"PATH": operators.environment()["PATH"]}  # where the operators are is for each host to say: they are built for its processor
    if loaded.run.engine.device == "cpu":
        own["DS_ACCELERATOR"] = "cpu"
    values = named | own
    # launch.hosts.environment is in the run file, which every node starter reads itself
    if bad := [name for name, value in values.items() if re.search(r"[\"'`$\\\n]", value) or not re.fullmatch(r"\w+", name)]:
        raise Refused(f"The value of {bad[0]} holds a quote, a `$`, a backslash or a line break, which does not survive two shells.", where="the environment", remedy="Put it into launch.hosts.environment, or set it on the hosts.")
    return dict(sorted(values.items()))
