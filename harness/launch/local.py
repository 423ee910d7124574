"""A run on this machine: the `deepspeed` command as a value, and a start that passes on what it is asked."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from harness.config.load import Loaded
from harness.errors import EXIT_FAILURE, EXIT_RESUME_ME, Refused
from harness.formats.outcome import read_outcome
from harness.launch.operators import environment, num_gpus

__all__ = ["LaunchPlan", "free_port", "num_gpus", "plan", "render", "run"]
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
LINGER_S = 5.0
GRACE_S = 60.0
FIRST_PORT = 20000


@dataclass(frozen=True)
class LaunchPlan:
    """What is started, and where its outcome will be.

    Attributes:
        command: the whole command.
        ranks: it starts.
        run_dir: of the run.
        environment: variables that every rank needs, besides those of this process.
    """

    command: tuple[str, ...]
    ranks: int
    run_dir: Path
    environment: dict[str, str] = field(default_factory=dict)


def plan(loaded: Loaded, *, run_file: str, overrides: list[str]) -> LaunchPlan:
    """The `deepspeed` command for this machine: as many ranks as the run file asks for, else as there are GPUs.

    Raises:
        Refused: CUDA_VISIBLE_DEVICES names GPUs in a way that DeepSpeed's launcher cannot read.
    """
    gpus = 0 if loaded.run.engine.device == "cpu" else num_gpus()
    ranks = loaded.run.launch.ranks or max(1, gpus)
    command = render(
        ranks=ranks, port=free_port(), run_file=run_file, overrides=overrides, gpu_ids=_visible_gpus() if gpus else ()
    )
    values = environment(ranks=ranks)
    if not gpus:
        values["DS_ACCELERATOR"] = "cpu"
    return LaunchPlan(command, ranks, loaded.run.run_path, values)


def render(
    *, ranks: int, port: int, run_file: str, overrides: Sequence[str], gpu_ids: Sequence[int] = ()
) -> tuple[str, ...]:
    """The words of the command.

    Args:
        ranks: processes on this machine.
        port: where they meet.
        run_file: path of the run file.
        overrides: `key.path=value` words.
        gpu_ids: those that may be used, where CUDA_VISIBLE_DEVICES restricts them: `--num_gpus` would ignore it and start at 0.
    """
    script = Path(sys.prefix) / "bin" / "deepspeed"
    program = [str(script)] if script.is_file() else [sys.executable, "-m", "deepspeed.launcher.runner"]
    where = ["--include", f"localhost:{','.join(map(str, gpu_ids[:ranks]))}"] if gpu_ids else ["--num_gpus", str(ranks)]
    return (
        *program,
        *where,
        "--master_port",
        str(port),
        "--no_local_rank",
        "--log_level",  # of its launchers alone: what a rank has to say, it says itself
        "error",
        "--module",
        "harness",
        "train",
        run_file,
        *overrides,
    )


def run(plan: LaunchPlan) -> int:
    """Start the ranks, wait until all are gone, and answer with the outcome's code, else with the launcher's.

    SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed to every rank at once, never to DeepSpeed's launchers, which would not wait.
    """
    job = _Job()
    started = time.time()
    with job.listening():
        child = job.start(plan)
        code = child.wait()
        job.reap()
    outcome = read_outcome(plan.run_dir)
    if outcome is not None and outcome.time >= started:
        return outcome.code
    if job.asked:
        return EXIT_RESUME_ME  # stopped before a rank could listen: nothing was trained that a resume would lack
    return code if code > 0 else EXIT_FAILURE  # DeepSpeed's runner answers 0 when its launcher is killed


class _Job:
    """The processes of one launch: a session of their own, so that no terminal signals them behind our back."""

    def __init__(self) -> None:
        self.leader = 0
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over the requests; a hangup stays ignored where it was (nohup)."""
        before = {number: signal.getsignal(number) for number in REQUESTS}
        for number, handler in before.items():
            if number != signal.SIGHUP or handler != signal.SIG_IGN:
                signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, plan: LaunchPlan) -> subprocess.Popen[bytes]:
        """Start the command; a request that came before it is carried out now."""
        child = subprocess.Popen(plan.command, env=os.environ | plan.environment, start_new_session=True)
        self.leader = child.pid
        if self.asked:
            self._send(signal.SIGTERM)
        return child

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.leader:
            self._send(number)

    def _send(self, number: int) -> None:
        """To all ranks at once; where none exists yet, end the launchers, which have nothing to lose."""
        members = self.members()
        ranks = _ranks(members)
        for process in ranks or members:
            with suppress(psutil.Error):
                process.send_signal(number if ranks and number != signal.SIGHUP else signal.SIGTERM)

    def members(self) -> list[psutil.Process]:
        """Every living process of the session, those whose parent is gone included."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.leader and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def reap(self) -> None:
        """Wait for processes that outlived their launcher: ask them to stop and save, in the end kill them."""
        if self._gone_within(LINGER_S):
            return
        self._send(signal.SIGTERM)
        if not self._gone_within(GRACE_S):
            for process in self.members():
                with suppress(psutil.Error):
                    process.kill()

    def _gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.members():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True


def _ranks(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that run `-m harness train`: not DeepSpeed's launchers, which carry some of these words, nor a rank's children."""
    found = {}
    for process in processes:
        try:
            words = process.cmdline()
            if any(words[i : i + 3] == ["-m", "harness", "train"] for i in range(len(words))):
                found[process.pid] = (process, process.ppid())
        except psutil.Error:
            continue
    return [process for process, parent in found.values() if parent not in found]


def _visible_gpus() -> tuple[int, ...]:
    """The ids in CUDA_VISIBLE_DEVICES; none when it is not set."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not all(name.isdecimal() for name in names):
        raise Refused(
            f"CUDA_VISIBLE_DEVICES={','.join(names)} does not name GPUs by number, and DeepSpeed's launcher reads nothing else.",
            where="the environment",
            remedy="Give their numbers (nvidia-smi -L lists them), such as CUDA_VISIBLE_DEVICES=0,1.",
        )
    return tuple(int(name) for name in names)


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel hands to connections: it stays free until the ranks are up."""
    try:
        end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split()[0])
    except OSError:
        end = 32768
    choices = [*random.SystemRandom().sample(range(FIRST_PORT, end), 50)] if end - FIRST_PORT > 50 else []
    for port in [*choices, 0]:
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise Refused(
        "No free port was found for the ranks to meet on.",
        where="this host",
        remedy="End what listens, or widen net.ipv4.ip_local_port_range.",
    )
