"""What a rank says: everything into its own log file, and on rank 0 also on the terminal, which may die."""

from __future__ import annotations

import logging
import sys
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

from harness.world import World

LOGGER = logging.getLogger("harness")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class SafeStream(logging.StreamHandler):
    """A terminal handler that survives a stdout whose reader is gone."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the name is logging's)
        """A dead terminal is no reason to stop training; every other fault is shown as usual."""
        if isinstance(sys.exc_info()[1], OSError | ValueError):
            return
        super().handleError(record)


def setup(world: World, folder: Path) -> None:
    """Log to `folder/rank-00000.log`, with third parties' messages and warnings; rank 0's own words also go to stdout."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{world.rank:05d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    for name in ("DeepSpeed", "transformers", "torch", "datasets"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    LOGGER.handlers = [_terminal()] if world.is_main else []
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def say(text: str) -> None:
    """One line of progress for the person at the terminal; on ranks other than 0 it goes to the log file alone."""
    if not LOGGER.handlers and not logging.getLogger().handlers:
        LOGGER.addHandler(_terminal())
        LOGGER.setLevel(logging.INFO)
    LOGGER.info(text)


def say_traceback(*, on_terminal: bool = True) -> None:
    """The traceback of the exception at hand: into this rank's log file and, unless it tells people nothing, on stderr, which may be dead."""
    text = traceback.format_exc()
    LOGGER.error("%s", text.rstrip(), extra={"on_terminal": False})
    if not on_terminal:
        return
    with suppress(OSError, ValueError):
        print(text, end="", file=sys.stderr, flush=True)


def _terminal() -> logging.Handler:
    handler = SafeStream(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: getattr(record, "on_terminal", True))
    return handler
