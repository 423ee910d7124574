"""One start of a run: its number, and the folder that says what it was started with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from harness import files
from harness.config.load import Loaded, fixed_keys, flatten, load
from harness.errors import Refused


@dataclass(frozen=True)
class Attempt:
    """The folder `attempts/NNNN` of a run.

    Attributes:
        number: from 1.
        folder: `RUN_DIR/attempts/NNNN`.
        loaded: the run file as resolved.
    """

    number: int
    folder: Path
    loaded: Loaded

    @property
    def logs(self) -> Path:
        """One log file a rank."""
        return self.folder / "logs"

    @classmethod
    def at(cls, number: int, loaded: Loaded) -> Attempt:
        """Attempt `number` of the run, without touching the disk."""
        return cls(number, loaded.run.run_path / "attempts" / f"{number:04d}", loaded)

    @classmethod
    def begin(cls, loaded: Loaded) -> Attempt:
        """Make the folder of the next attempt and write the run file as resolved."""
        attempts = loaded.run.run_path / "attempts"
        number = max((int(path.name) for path in _numbered(attempts)), default=0) + 1
        attempt = cls.at(number, loaded)
        attempt.logs.mkdir(parents=True)
        control = loaded.run.run_path / "control"
        control.mkdir(exist_ok=True)
        for name in ("save", "stop", "trace"):  # asked of an attempt that is over
            (control / name).unlink(missing_ok=True)
        files.write_text(attempt.folder / "run.yaml", _with_origins(loaded))
        return attempt

    def write_deepspeed(self, config: dict[str, Any]) -> None:
        """Keep the merged DeepSpeed configuration beside the run file."""
        files.write_json(self.folder / "deepspeed.json", config)

    def hyper_parameters(self) -> dict[str, Any]:
        """The leaves of the run file that TensorBoard's table of hyper-parameters takes."""
        leaves = flatten(self.loaded.run)
        return {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in leaves.items() if value is not None}


def _numbered(attempts: Path) -> list[Path]:
    return sorted(path for path in attempts.glob("[0-9]*") if path.name.isdigit()) if attempts.is_dir() else []


def _with_origins(loaded: Loaded) -> str:
    """The run file with every value spelled out, and a list of where each one that was set came from."""
    origins = "".join(f"#   {key}: {place}\n" for key, place in sorted(loaded.origins.items()))
    body = yaml.safe_dump(loaded.run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
    return f"# As resolved. What was set, and where (all else is default):\n{origins}{body}"


def check_same_run(loaded: Loaded) -> None:
    """Refuse a run folder that is another run's, or nobody's.

    Raises:
        Refused: when the folder holds foreign files, or a fixed setting differs from the last attempt's.
    """
    folder = loaded.run.run_path
    if not folder.exists() or not os.listdir(folder):
        return
    where = f"run_dir ({loaded.origin('run_dir')})"
    attempts = [path for path in _numbered(folder / "attempts") if (path / "run.yaml").is_file()]  # not one that was killed as it began
    known = {"attempts", "control", "launch", "model", "outcome.json", "events.jsonl"}
    if not attempts and set(os.listdir(folder)) - known:
        raise Refused(f"{folder} holds files, but no run.", where=where, remedy="Set `run_dir` to a new or empty folder.")
    if not attempts:
        return
    before = flatten(load(attempts[-1] / "run.yaml").run)
    now = flatten(loaded.run)
    fixed = fixed_keys()
    for key in sorted(now.keys() | before.keys()):
        is_fixed = any(fnmatchcase(key, pattern) or key.startswith(f"{pattern}.") for pattern in fixed)
        if is_fixed and before.get(key) != now.get(key):
            raise Refused(
                f"`{key}` is {now.get(key)!r}, but the run in {folder} was started with {before.get(key)!r}; it may not change on resume.",
                where=f"{key} ({loaded.origin(key)}); {attempts[-1] / 'run.yaml'}",
                remedy="Set it back, or set `run_dir` to a new folder for a new run.",
            )
