"""A run as a Slurm job: the batch script as text."""

from __future__ import annotations

import re
import shlex
from pathlib import Path, PurePath

from harness.config.load import Loaded
from harness.config.schema import Slurm
from harness.errors import Refused
from harness.launch import plan as plans
from harness.launch.plan import JobPlan

_PORTS = (20000, 12000)
"""First of the ports where ranks meet, and how many: below those that the kernel hands to connections. A start takes two."""
_STRAGGLERS_S = 600
"""How long tasks may outlive the first that ended: they find out by themselves, and a last save may take its time."""
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:,+@/-]*")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|INFINITE")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\"'\\%]")

_SCRIPT = """\
#!/bin/bash
{directives}
# Written by `harness launch --on slurm`: one node starter a node. When the run can be resumed, the job goes back into the queue by itself.
# Given to sbatch by hand, it wants the folder of its logs, without which it ends and leaves no word: mkdir -p {logs}
# shellcheck disable=SC2016 # what a run's words hold is not for the shell
set -u

run_dir={run_dir}
python={python}
job=slurm-$SLURM_JOB_ID
restart=${{SLURM_RESTART_COUNT:-0}}

say() {{ echo "$(date '+%F %T') job $SLURM_JOB_ID, start $((restart + 1)): $*"; }}

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
master=${{nodes%%$'\\n'*}}
port=$(({first_port} + (SLURM_JOB_ID * 20 + restart * 2) % {num_ports})) # another at each start: late ranks of the last one must never be met

# TERM comes here before the time limit; at preemption the tasks get it from Slurm. It goes to the step: srun itself would kill the tasks at once.
trap 'say "asked to stop"; scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM

say "$(tr '\\n' ' ' <<<"$nodes")port $port"
since=$(date +%s)
srun --kill-on-bad-exit=0 --wait={stragglers} --mpi=none --cpu-bind=none --open-mode=append --output={node_log} \\
  {starter} &
step=$!
while :; do # the trap ends a wait early
  wait "$step"
  code=$?
  kill -0 "$step" 2>/dev/null || break
done

# srun says 143 after most requests, whatever the ranks said: the outcome in the run's folder counts, and the code where there is none.
verdict=$("$python" -m harness.launch.again "$run_dir" --job "$job" --restarts {restarts} --since "$since" --code "$code" | tail -n 1)
read -r what ended <<<"${{verdict:-end $code}}"
say "srun ended with $code, the run with $ended"
if [ "$what" = again ]; then
  told=0
  trap 'told=1' TERM
  state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
  if [ "$state" = RUNNING ]; then # not under scancel, after which a requeue would bring the job back
    say "back into the queue"
    told=0
    if scontrol requeue "$SLURM_JOB_ID"; then
      while [ "$told" = 0 ]; do sleep 1; done # until Slurm ends this start; to leave before it does would be the end of the job
      exit "$ended"
    fi
  fi
  say "not queued again: the job is $state"
fi
exit "$ended"
"""


def plan(loaded: Loaded, *, run_file: str, overrides: list[str], folder: Path) -> JobPlan:
    """The plan of the run under Slurm.

    Args:
        loaded: the run file.
        run_file: its path, from `folder`.
        overrides: `key.path=value` words.
        folder: where the job runs: this one, on a file system that the nodes share.
    """
    slurm = loaded.run.launch.slurm
    return plans.plan(
        loaded, hosts=slurm.nodes, ranks_per_host=slurm.ranks_per_node, grace_s=slurm.grace_seconds, run_file=run_file,
        run_dir=folder / loaded.run.run_path, overrides=overrides,
    )


def render(plan: JobPlan, slurm: Slurm, *, python: str, folder: Path) -> str:
    """The batch script.

    Args:
        plan: what is started.
        slurm: settings of the job.
        python: the interpreter, on a file system that the nodes share.
        folder: where the job runs.

    Raises:
        Refused: for a value that Slurm would read as something else.
    """
    check(slurm)
    run_dir = _path(plan.run_dir, "run_dir")
    lines = _directives(plan, slurm, run_dir=run_dir, folder=_path(folder, "the current folder"))
    starter = plan.starter(python="PYTHON", master="MASTER", job="JOB")
    words = {"PYTHON": '"$python"', "MASTER": '"$master:$port"', "JOB": '"$job"'}
    return _SCRIPT.format(
        logs=shlex.quote(f"{run_dir}/launch"), directives="\n".join(f"#SBATCH {line}" for line in lines), run_dir=shlex.quote(run_dir), python=shlex.quote(python),
        first_port=_PORTS[0], num_ports=_PORTS[1], stragglers=_STRAGGLERS_S, node_log=shlex.quote(f"{run_dir}/launch/slurm-%j-node%n.log"),
        starter=" ".join(words.get(word) or shlex.quote(word) for word in starter), restarts=plan.restarts,
    )


def _directives(plan: JobPlan, slurm: Slurm, *, run_dir: str, folder: str) -> list[str]:
    """The options of sbatch; the user's own come last and win."""
    options = {
        "job-name": plans.as_label(plan.run_dir.name, longest=40) or "harness", "nodes": slurm.nodes, "ntasks-per-node": 1,
        "gpus-per-node": slurm.ranks_per_node if plan.uses_gpus else None, "cpus-per-task": slurm.cpus_per_node,
        "partition": slurm.partition, "time": slurm.time, "account": slurm.account, "qos": slurm.qos,
        "signal": f"B:TERM@{slurm.grace_seconds}", "open-mode": "append", "chdir": folder, "output": f"{run_dir}/launch/slurm-%j.log",
    }
    lines = [f"--{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    whole = [] if slurm.cpus_per_node else ["--exclusive", "--mem=0"]
    return [*lines, *whole, "--requeue", *slurm.extra]


def check(slurm: Slurm) -> None:
    """Refuse settings that Slurm would read as something else.

    Raises:
        Refused: with the first one.
    """
    for key in ("partition", "account", "qos"):
        value = getattr(slurm, key)
        if value is not None and not _WORD.fullmatch(value):
            raise Refused(f"`{value}` is no name of Slurm's.", where=f"launch.slurm.{key}", remedy="Use letters, digits and . _ - only.")
    if slurm.time is not None and not _TIME.fullmatch(slurm.time):
        raise Refused(f"`{slurm.time}` is no time limit.", where="launch.slurm.time", remedy="Write minutes, H:M:S or D-H:M:S, in quotes.")
    for option in slurm.extra:
        if not option.startswith("-") or _newline(option):
            remedy = "Write one option an entry, such as --constraint=a100."
            raise Refused(f"`{option}` is no option of sbatch.", where="launch.slurm.extra", remedy=remedy)


def _newline(text: str) -> bool:
    return any(ord(letter) < 32 for letter in text)


def _path(path: PurePath, what: str) -> str:
    """A path that can stand in a directive and in a pattern for log files."""
    text = str(path)
    if _UNPRINTABLE.search(text):
        remedy = "Use a path without quotes, backslashes, percent and control signs."
        raise Refused(f"Slurm cannot write logs below {text!r}.", where=what, remedy=remedy)
    return text


def _quoted(text: str) -> str:
    return f'"{text}"' if " " in text else text
