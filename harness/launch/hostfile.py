"""The hosts of a hostfile and their slots, as the `deepspeed` launcher and Open MPI read it, after include and exclude."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import Refused

_LINE = re.compile(r"^(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\s+slots=(?P<slots>\d+))?$")


def read_hostfile(path: Path, *, where: str) -> dict[str, int]:
    """Slots by host, in the order of the file.

    Args:
        path: lines of `HOST slots=N`; `#` begins a comment.
        where: the setting that named it, for messages.

    Raises:
        Refused: when it is missing, empty, or a line says something else. (DeepSpeed goes on without one, on this machine alone.)
    """
    if not path.is_file():
        raise Refused(f"The hostfile {path} does not exist.", where=where, remedy="Write one, a line a host: `HOST slots=N`.")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.split("#")[0].strip()
        found = _LINE.match(text)
        if text and (found is None or found["host"] in hosts or found["slots"] == "0"):
            problem = f"names {found['host']} a second time" if found and found["host"] in hosts else f"is not `HOST slots=N`: {text}"
            raise Refused(f"Line {number} of {path} {problem}.", where=f"{path}:{number}", remedy="Write each host once, with its number of ranks.")
        if found:
            hosts[found["host"]] = int(found["slots"] or 1)
    if not hosts:
        raise Refused(f"The hostfile {path} names no host.", where=where, remedy="Write a line a host: `HOST slots=N`.")
    return hosts


def choose(hosts: dict[str, int], *, include: list[str], exclude: list[str], where: str) -> dict[str, int]:
    """The hosts that are wanted.

    Args:
        hosts: slots by host.
        include: only these, if any are named.
        exclude: not these.
        where: the hostfile, for messages.

    Raises:
        Refused: when a name is not in the hostfile, or none is left.
    """
    if unknown := [name for name in (*include, *exclude) if name not in hosts]:
        raise Refused(f"{', '.join(unknown)} is not in the hostfile, which names {', '.join(hosts)}.", where=where, remedy="Name hosts as the hostfile does.")
    chosen = {name: slots for name, slots in hosts.items() if (not include or name in include) and name not in exclude}
    if not chosen:
        raise Refused("No host of the hostfile is left.", where=where, remedy="Exclude fewer of them.")
    return chosen


def render(hosts: dict[str, int]) -> str:
    """A hostfile."""
    return "".join(f"{name} slots={slots}\n" for name, slots in hosts.items())
