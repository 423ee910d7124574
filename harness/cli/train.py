"""`harness train`: one rank of a run, from its checks to its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import time

from harness import world as worlds
from harness.config.load import Loaded, load
from harness.errors import EXIT_DONE, EXIT_FAILURE, EXIT_RESUME_ME, HarnessError, PeerLost, StopRequested, first_line
from harness.heartbeat import began, mark, spent, standing
from harness.log import say, say_traceback
from harness.world import World

PATIENCE_S = 30.0
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def run(arguments: argparse.Namespace) -> int:
    """Train; every way out leaves an outcome behind, and only rank 0 speaks."""
    from harness.launch import operators

    os.environ.update(operators.environment())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the ranks have met it ends them, as SIGTERM does: looking for each other is deaf to Python's
    world = worlds.current()
    try:
        loaded = load(arguments.run_file, arguments.overrides)
        if loaded.run.engine.device == "cpu":
            os.environ["DS_ACCELERATOR"] = "cpu"
        return _train(loaded, world)
    except StopRequested:
        return EXIT_RESUME_ME  # said and saved by all ranks together
    except HarnessError:
        if not world.is_main:
            _wait_for_rank_0()
        raise


def _wait_for_rank_0() -> None:
    """Rank 0 says the same, and a launcher ends this rank as soon as rank 0 is gone; it speaks itself only if nobody does."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE_S)


def _train(loaded: Loaded, world: World) -> int:
    from harness.formats import running
    from harness.train.attempt import Attempt, check_same_run

    attempt = None
    try:
        use_gpu = _use_gpu(loaded)
        if world.is_main:
            check_same_run(loaded)
            _preflight(loaded, world, use_gpu)
            running.hold(loaded.run.run_path)
            attempt = Attempt.begin(loaded)
        else:
            _load_libraries()
        _build_operators(loaded, speak=world.is_main)
        from harness.train.compose import train

        evaluation = train(loaded, world, use_gpu=use_gpu, attempt=attempt)
    except running.Occupied:
        raise
    except HarnessError as error:
        if isinstance(error, StopRequested):
            say(str(error))
            _close(loaded, world, state=error.state)
        _leave(loaded, world, attempt, state=error.state, code=error.exit_code, reason=str(error))
        raise
    except BaseException as error:
        if _is_peer_lost(error):
            say_traceback(on_terminal=False)
            reason = f"Another rank is gone, or the way to it: {first_line(error)}"
            say(reason)
            _leave(loaded, world, attempt, state=PeerLost.state, code=PeerLost.exit_code, reason=reason)
            return PeerLost.exit_code
        say_traceback()
        _leave(loaded, world, attempt, state="failed", code=EXIT_FAILURE, reason=f"{type(error).__name__}: {error}")
        return EXIT_FAILURE
    _close(loaded, world, state="done")
    _leave(loaded, world, attempt, state="done", code=EXIT_DONE, reason=f"evaluation loss {evaluation.loss:.4f}")
    return EXIT_DONE


def _is_peer_lost(error: BaseException) -> bool:
    from harness import distributed

    return distributed.is_peer_lost(error)


def _preflight(loaded: Loaded, world: World, use_gpu: bool) -> None:
    from transformers.utils import logging as transformers_logging

    from harness.preflight.check import check

    transformers_logging.set_verbosity_error()
    check(loaded, ranks=world.size, has_gpu=use_gpu, ahead=True)


def _load_libraries() -> None:
    """Load beside rank 0, while it checks the run, what its checks load; later all would wait for it."""
    import harness.model.build
    import harness.model.configure
    import transformers.modeling_utils  # noqa: F401


def _use_gpu(loaded: Loaded) -> bool:
    import torch

    return loaded.run.engine.device != "cpu" and torch.cuda.is_available()


def _build_operators(loaded: Loaded, *, speak: bool) -> None:
    from harness.config.deepspeed import offload_device, read_deepspeed
    from harness.launch import operators

    config, _ = read_deepspeed(loaded)
    devices = {offload_device(config, "optimizer"), offload_device(config, "param")}
    operators.build(operators.needed(optimizer_offload=offload_device(config, "optimizer"), nvme="nvme" in devices, gpu=_use_gpu(loaded)), speak=speak)


def _close(loaded: Loaded, world: World, *, state: str) -> None:
    from harness.train.closing import closing

    if world.is_main and os.path.isdir(loaded.run.run_dir):
        say(closing(loaded.run.run_dir, state=state))


def _leave(loaded: Loaded, world: World, attempt: object, *, state: str, code: int, reason: str) -> None:
    """Write the outcome first, so that whatever a launcher does next finds it; then part from the other ranks. Another job's run is left alone."""
    from harness import distributed
    from harness.formats import ledger, outcome, running

    orderly = state not in ("failed", "lost")
    waited_s = 0.0 if orderly else standing()  # in the phase in which it went wrong, nobody knows since when
    phases = None if orderly else spent()
    mark("end")
    if os.path.isdir(loaded.run.run_dir) and (distributed.is_initialized() or not running.is_foreign(loaded.run.run_path, main=world.is_main)):
        number = getattr(attempt, "number", 0)
        last_step = outcome.last_step(loaded.run.run_path)
        end = outcome.Outcome(state=state, code=code, reason=reason, step=last_step, attempt=number)
        outcome.write_end(loaded.run.run_path, world.rank, end)
        if world.is_main:
            outcome.write_outcome(loaded.run.run_path, end)
            ledger.append(
                loaded.run.run_path, "finish" if code == EXIT_DONE else "stop", attempt=number, state=state, code=code, reason=reason,
                step=last_step, began=began(), phases=phases or spent(), waited_s=waited_s,
            )
    if state in ("done", "stopped"):
        distributed.shutdown()
    else:
        distributed.abandon(code)
