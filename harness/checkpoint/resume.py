"""Which checkpoint a run goes on from, when each host may have a disk of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness import distributed
from harness.checkpoint.commit import publish
from harness.checkpoint.disks import Disks
from harness.checkpoint.shelf import checkpoints_folder, committed, folder_name, has_damaged, inspect, leftovers, put_aside, restore_replaced
from harness.errors import Failure, HarnessError, Refused
from harness.files import digest_file
from harness.formats.manifest import FILE_NAME, Manifest, absent_parts, parse_manifest


@dataclass(frozen=True)
class Sight:
    """What the leader of a disk sees of a step.

    Attributes:
        identity: of the manifest; empty where there is none that can be read.
        absent: number and hosts of each disk whose files are not here; all others are, and hold.
        aside: where it lies instead, when it was ready to be committed here and, as can be seen on another disk, was about to be.
        problem: why it does not hold; empty when it does, or is not here.
        error: why nobody can say.
    """

    identity: str = ""
    absent: dict[int, str] = field(default_factory=dict)
    aside: Path | None = None
    problem: str = ""
    error: HarnessError | None = None


def newest(run_dir: Path, disks: Disks, *, tell: Callable[[str], None]) -> tuple[Path, Manifest] | None:
    """The newest checkpoint of which all files hold, on whatever disks they are. Collective.

    What is damaged is renamed to `*.damaged` on its disk, and what is newer than the one chosen, but not there on all disks, to
    `*.incomplete`; what a disk does not give, or a later version wrote, keeps its name. After a crash between the commits of two hosts, the second is made up for. Nothing is deleted.

    Args:
        run_dir: the run's folder.
        disks: which ranks share it.
        tell: called on all ranks with each reason why one, finished or not, was passed over.

    Returns:
        folder and manifest, the same on all ranks; None when nothing was saved yet.

    Raises:
        Refused: on all ranks, when there are checkpoints but none holds, the newest has files on a host that does not take part, or a
            later version wrote it.
        Failure: on all ranks, when a disk does not give it.
    """
    answers = distributed.gather_objects(_survey(run_dir) if disks.is_leader else ([], [], False))
    steps = sorted({step for mine, _, _ in answers for step in mine}, reverse=True)
    _tell(tell, disks, enumerate(texts for _, texts, _ in answers))
    for step in steps:
        folder = checkpoints_folder(run_dir) / folder_name(step)
        with distributed.together("load"):
            sight = _look(folder) if disks.is_leader else Sight()
        sights = distributed.gather_objects(sight)
        _refuse_unread(sights, disks)
        _tell(tell, disks, ((rank, [sight.problem]) for rank, sight in enumerate(sights) if sight.problem))
        source = next((rank for rank, sight in enumerate(sights) if sight.identity and not _missing(sights, sight.identity)), None)
        if source is not None:
            text = ((sights[source].aside or folder) / FILE_NAME).read_text(encoding="utf-8") if disks.rank == source else ""
            manifest = parse_manifest(distributed.broadcast_object(text, source=source))
            if disks.is_leader:
                _settle(run_dir, step, sights[disks.rank], is_chosen=sights[disks.rank].identity in ("", sights[source].identity))
            return folder, manifest
        for text in _incomplete(folder, sights, disks):
            tell(text)
    if steps or any(damaged for _, _, damaged in answers):
        reason = "Every checkpoint of this run is damaged" if disks.is_one else "No checkpoint of this run holds on all disks"
        raise Refused(
            f"{reason}; training would begin anew.", where=str(checkpoints_folder(run_dir)),
            remedy="Mend one of them, or start a new run in another run_dir.",
        )
    return None


def _tell(tell: Callable[[str], None], disks: Disks, told: Iterable[tuple[int, list[str]]]) -> None:
    for rank, texts in told:
        for text in texts:
            tell(text if disks.is_one else f"on {disks.name(disks.number_of(rank))} {text}")


def _survey(run_dir: Path) -> tuple[list[int], list[str], bool]:
    restore_replaced(run_dir)
    return [step for step, _ in committed(run_dir)], [f"{path.name} was not finished" for path in leftovers(run_dir)], has_damaged(run_dir)


def _look(folder: Path) -> Sight:
    try:
        return _found(folder)
    except HarnessError as error:
        return Sight(error=error)
    except OSError as error:
        return Sight(error=Failure(f"{folder.name}: {error}"))


def _refuse_unread(sights: list[Sight], disks: Disks) -> None:
    for rank, sight in enumerate(sights):
        if sight.error is not None:
            raise sight.error if disks.is_one else type(sight.error)(f"On {disks.name(disks.number_of(rank))}: {sight.error}")


def _found(folder: Path) -> Sight:
    if not folder.is_dir():
        asides = [(aside, *inspect(aside)) for aside in folder.parent.glob(f"{folder.name}.tmp-*") if (aside / FILE_NAME).is_file()]
        return next((_sight(aside, manifest, aside=aside) for aside, manifest, problems in asides if manifest and not problems), Sight())
    manifest, problems = inspect(folder)
    if manifest is None or problems:
        return Sight(problem=f"{folder.name} is damaged: {'; '.join(problems[:3])}; now {put_aside(folder).name}")
    return _sight(folder, manifest)


def _sight(folder: Path, manifest: Manifest, *, aside: Path | None = None) -> Sight:
    return Sight(digest_file(folder / FILE_NAME), {number: manifest.disks[number] for number in absent_parts(folder, manifest)}, aside)


def _missing(sights: list[Sight], identity: str) -> dict[int, str]:
    """The disks of whose files there is no copy on any, with their hosts."""
    same = [sight.absent for sight in sights if sight.identity == identity]
    return {number: same[0][number] for number in sorted(set.intersection(*map(set, same)))}


def _incomplete(folder: Path, sights: list[Sight], disks: Disks) -> list[str]:
    """Say who lacks what.

    Raises:
        Refused: when a host that has some of it does not take part.
    """
    told = []
    for identity in dict.fromkeys(sight.identity for sight in sights if sight.identity):
        missing = _missing(sights, identity)
        if strangers := sorted({host for hosts in missing.values() for host in hosts.split(", ")} - set(disks.hosts)):
            names = ", ".join(strangers)
            raise Refused(
                f"{folder.name} was saved on disks local to each host, and {names}, with a part of it, does not take part.", where=str(folder),
                remedy=f"Start with {names} as well, copy its {folder.name} into this one, or rename this one to go on from an earlier checkpoint.",
            )
        told.append(f"{folder.name} was not saved on all disks: {', '.join(missing.values())} lacks it")
    return told


def _settle(run_dir: Path, step: int, sight: Sight, *, is_chosen: bool) -> None:
    """Set aside what this disk has of steps that others lack, and commit what was about to be."""
    for number, folder in committed(run_dir):
        if number > step or (number == step and not is_chosen):
            put_aside(folder, "incomplete")
    if is_chosen and sight.aside is not None:
        publish(sight.aside, checkpoints_folder(run_dir) / folder_name(step))
