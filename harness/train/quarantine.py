"""Which documents a step was trained on whose loss stood out: written beside the training, which their absence does not end."""

from __future__ import annotations

import json
import threading
import time
from typing import TYPE_CHECKING

from harness import distributed
from harness.config.schema import RunFile
from harness.data.fetch import signals_blocked
from harness.data.passed import Passed
from harness.data.provenance import origins
from harness.data.sets import open_data
from harness.errors import HarnessError
from harness.heartbeat import alive
from harness.log import say

if TYPE_CHECKING:
    from harness.train.progress import Progress

PATIENCE_S = 30.0
"""How long the end of a run waits for what is still being written."""
_LOOK_S = 1.0


class Quarantine:
    """`quarantine.jsonl`, written by threads of rank 0: the sets may be far away, and all ranks would wait for it.

    Args:
        run: the run file.
    """

    def __init__(self, run: RunFile):
        self._run, self._path = run, run.run_path / "quarantine.jsonl"
        self._writing: list[threading.Thread] = []

    def __call__(self, progress: Progress, step: int, first: int, last: int) -> str:
        """Begin to write the documents of a step, trained on the rows from `first` up to `last`; gives the file."""
        if distributed.rank() == 0:
            facts = (Passed.of(progress.passed), progress.first_row, step, first, last)
            thread = threading.Thread(target=self._try, args=facts, name="harness-quarantine", daemon=True)
            self._writing.append(thread)
            with signals_blocked():
                thread.start()
        return str(self._path)

    def close(self) -> None:
        """Wait for what is being written, but not for long."""
        deadline = time.monotonic() + PATIENCE_S
        while (writing := [thread for thread in self._writing if thread.is_alive()]) and time.monotonic() < deadline:
            alive()
            writing[0].join(min(_LOOK_S, PATIENCE_S))
        if writing:
            say(f"{self._path} is not complete: the sets could not be read in {PATIENCE_S:.0f} s.")

    def _try(self, passed: Passed, begin: int, step: int, first: int, last: int) -> None:
        try:
            self._write(passed, begin, step, first, last)
        except (HarnessError, OSError) as error:
            say(f"The documents of step {step} are not in {self._path}: {error}")

    def _write(self, passed: Passed, begin: int, step: int, first: int, last: int) -> None:
        """The tables of the loader's thread are left alone."""
        run, data = self._run, open_data(self._run)
        try:
            order, count = data.train.order(seed=run.train.seed, window_shards=run.data.window_shards), passed.trained(first, last)
            ids = passed.rows(order, first, count, begin=begin)
            places = [place for start, size in passed.spans(first, count) for place in range(start, start + size)]
            lines = []
            for place, row_id in zip(places, ids.tolist(), strict=True):
                documents = [{"file": file, "row": row} for file, row in origins(data.train, row_id)]
                lines.append(json.dumps({"step": step, "position": place - begin, "documents": documents}, ensure_ascii=False) + "\n")
            with open(self._path, "a", encoding="utf-8") as stream:
                stream.write("".join(lines))
        finally:
            data.close()
