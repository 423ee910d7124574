"""The checkpoints of a run that stand: which of them holds, which is the newest, and which need not be kept."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event
from typing import TypeVar

from harness.errors import Failure, Refused
from harness.files import digest_file, sync_folder
from harness.formats.manifest import LaterVersion, Manifest, ManifestError, SliceFile, coverage_problems, part_name, parts, read_manifest
from harness.heartbeat import alive
from harness.log import say

T = TypeVar("T")
MARKER = "latest"
MARK_S = 1.0
RETRY_S = 1.0
"""After this long, what a disk did not give is asked for once more."""
_COMMITTED = re.compile(r"step-(\d{6,})$")


def checkpoints_folder(run_dir: Path) -> Path:
    """Where the checkpoints of a run are."""
    return Path(run_dir) / "checkpoints"


def folder_name(step: int) -> str:
    """`400` -> `step-000400`."""
    return f"step-{step:06d}"


def committed(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and folder of every committed checkpoint, newest first; whether they hold is not looked at."""
    folder = checkpoints_folder(run_dir)
    matches = (
        [(_COMMITTED.match(path.name), path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    )
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


def inspect(folder: Path) -> tuple[Manifest | None, list[str]]:
    """Whether a checkpoint holds: its manifest, and every reason against it (an empty list when it does hold).

    Reads every byte of the files; sizes are looked at first. Files of other hosts' disks are not looked for (`absent_parts`).

    Raises:
        Failure: when the disk does not give a file, which may be whole.
        Refused: when a later version has written it.
    """
    try:
        manifest = _read(folder, lambda: read_manifest(folder))
    except ManifestError as error:
        return None, [str(error)]
    except LaterVersion as error:
        raise Refused(
            f"{folder.name} was written by a later version of this harness: {error}.", where=str(folder),
            remedy="Use that version, or rename the folder to use the checkpoint before it.",
        ) from None
    here = parts(folder, manifest)
    if not here:
        return manifest, [f"no {part_name(0)} or other file says whose part it is"]
    files = [entry for entry in manifest.files if entry.disk in here]
    problems = [text for text in (_size_problem(folder, entry) for entry in files) if text]
    if not problems:
        problems = _digest_problems(folder, files)
    return manifest, problems or coverage_problems(manifest.parameters, manifest.files)


def _size_problem(folder: Path, entry: SliceFile) -> str:
    try:
        size = _read(folder, (folder / entry.file).stat).st_size
    except FileNotFoundError:
        return f"{entry.file} is missing"
    return "" if size == entry.bytes else f"{entry.file} has {size} bytes instead of {entry.bytes}"


def _digest_problems(folder: Path, files: list[SliceFile]) -> list[str]:
    """Of all files, some at a time; as long as they can be read, this rank gives signs of life."""
    is_read = Event()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = [pool.submit(_digest_problem, folder, entry, is_read.set) for entry in files]
        while wait(found, timeout=MARK_S).not_done:
            if is_read.is_set():
                is_read.clear()
                alive()
    return [text for one in found if (text := one.result())]


def _digest_problem(folder: Path, entry: SliceFile, each: Callable[[], None]) -> str:
    try:
        digest = _read(folder, lambda: digest_file(folder / entry.file, each=each))
    except FileNotFoundError:
        return f"{entry.file} is missing"
    return "" if digest == entry.digest else f"{entry.file} was changed since it was written"


def _read(folder: Path, action: Callable[[], T], *, again: bool = True) -> T:
    """What reading gives; a disk that falters is asked once more.

    Raises:
        Failure: when it falters again.
        FileNotFoundError: when it says that there is no such file.
    """
    try:
        return action()
    except FileNotFoundError:
        raise
    except OSError as error:
        if not again:
            raise Failure(f"{folder.name} cannot be read, and may be whole: {error}. It was left as it is.") from None
    time.sleep(RETRY_S)
    return _read(folder, action, again=False)


def newest_good(run_dir: Path) -> tuple[tuple[Path, Manifest] | None, list[str]]:
    """The newest checkpoint that holds; nothing is changed.

    Returns:
        folder and manifest, or None; and why each newer one, finished or not, was passed over.

    Raises:
        Failure, Refused: as `inspect`.
    """
    skipped = [f"{path.name} was not finished" for path in leftovers(run_dir)]
    for _, folder in committed(run_dir):
        manifest, problems = inspect(folder)
        if manifest is not None and not problems:
            return (folder, manifest), skipped
        skipped.append(f"{folder.name} is damaged: {'; '.join(problems[:3])}")
    return None, skipped


def has_damaged(run_dir: Path) -> bool:
    """Whether checkpoints were found damaged, now or before: without a good one, a start would begin anew unasked."""
    folder = checkpoints_folder(run_dir)
    return folder.is_dir() and any(folder.glob("step-*.damaged*"))


def put_aside(folder: Path, why: str = "damaged") -> Path:
    """Rename a checkpoint, so that it is not looked at again, and give its new place."""
    number, target = 1, folder.with_name(f"{folder.name}.{why}")
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{why}-{number}")
    os.rename(folder, target)
    sync_folder(folder.parent)
    return target


def leftovers(run_dir: Path) -> list[Path]:
    """What saves that did not end have left."""
    return sorted(checkpoints_folder(run_dir).glob("step-*.tmp-*"))


def restore_replaced(run_dir: Path) -> None:
    """Give a checkpoint its name back, of which a save of the same step was killed between its two renames."""
    for path in checkpoints_folder(run_dir).glob("step-*.replaced"):
        if not path.with_suffix("").exists():
            os.rename(path, path.with_suffix(""))


def best(run_dir: Path, best_step: int) -> int | None:
    """The step of the best checkpoint that stands, or None.

    Args:
        run_dir: the run's folder.
        best_step: of the best evaluation, 0 where there was none; where its save failed, or was found damaged, the lowest loss among the others counts.

    Raises:
        Failure: when the disk does not give a manifest.
    """
    there = dict(committed(run_dir))
    if best_step in there or not best_step:
        return best_step or None
    losses = {step: _evaluation_loss(folder) for step, folder in there.items()}
    return min((step for step in losses if math.isfinite(losses[step])), key=lambda step: losses[step], default=None)


def _evaluation_loss(folder: Path) -> float:
    try:
        return float(_read(folder, lambda: read_manifest(folder)).metrics.get("eval/loss", math.inf))
    except (ManifestError, LaterVersion):
        return math.inf


def retain(run_dir: Path, *, keep_last: int, best_step: int | None = None, keep_every_steps: int | None = None) -> list[Path]:
    """Delete all but the newest checkpoints and the best, and what unfinished saves left. One rank of each disk, between saves.

    What cannot be deleted is told and left.

    Args:
        run_dir: the run's folder.
        keep_last: how many of the newest stay, at least one.
        best_step: of the best evaluation: the `best` that stands stays whatever its age; None keeps none for that.
        keep_every_steps: checkpoints of steps that this divides stay for good.

    Returns:
        the checkpoints that are gone.

    Raises:
        Failure: as `best`; nothing is deleted then.
    """
    gone, best_there = [], None if best_step is None else best(run_dir, best_step)
    for position, (step, folder) in enumerate(committed(run_dir)):
        for_good = keep_every_steps is not None and step % keep_every_steps == 0
        if position >= max(1, keep_last) and step != best_there and not for_good:
            try:
                os.rename(folder, folder.with_name(f"{folder.name}.deleting"))
            except OSError as error:
                say(f"The old checkpoint {folder.name} cannot be deleted: {error}")
                continue
            gone.append(folder)
    sweep(run_dir)
    return gone


def sweep(run_dir: Path) -> None:
    """Delete what saves, deletions and transfers that were killed have left. One rank of each disk, between saves."""
    folder = checkpoints_folder(run_dir)
    for path in [*folder.glob("step-*.deleting"), *folder.glob("step-*.replaced"), *folder.glob("step-*.fetched"), *leftovers(run_dir)]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f".{MARKER}.*.tmp"):
        path.unlink(missing_ok=True)
