"""Are the machines of a cluster fit to train together: each one by itself, and all of them compared."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.config.load import Loaded
from harness.preflight.findings import REPORT_VERSION, Finding, Report, failed, passed, warned, worst
from harness.preflight.machine import Purpose, examine, purpose_of
from harness.units import format_bytes

MAX_SKEW_S = 2.0
SLOW_SHARE = 0.5
SHOWN_HOSTS = 4


@dataclass
class Diagnosis:
    """All that was found.

    Attributes:
        hosts: that were asked.
        reports: of those that answered.
        together: verdicts on the cluster as a whole.
    """

    hosts: list[str]
    reports: list[Report] = field(default_factory=list)
    together: list[Finding] = field(default_factory=list)

    def rows(self) -> list[tuple[str, Finding]]:
        """Each different finding once, with the hosts that it holds for; those of the cluster first."""
        rows = [("all", finding) for finding in self.together]
        names = dict.fromkeys(finding.name for report in self.reports for finding in report.findings)
        for name in names:
            rows += self._of_one_check(name)
        return rows

    def _of_one_check(self, name: str) -> list[tuple[str, Finding]]:
        """The faults of one check; where there are none, one row for each state."""
        found = [(report.host, finding) for report in self.reports for finding in report.findings if finding.name == name]
        faults = [finding for _, finding in found if finding.state in ("fail", "warn")]
        if faults:
            return [(_names([host for host, other in found if other == finding]), finding) for finding in dict.fromkeys(faults)]
        rows = []
        for state in dict.fromkeys(finding.state for _, finding in found):
            alike = {host: finding for host, finding in found if finding.state == state}
            host, first = next(iter(alike.items()))
            shown = first if len(set(alike.values())) == 1 else replace(first, what=f"{first.what}   (that is {host})")
            rows.append((_names(list(alike)), shown))
        return rows

    def failures(self) -> int:
        """How many of the rows failed."""
        return sum(finding.state == "fail" for _, finding in self.rows())

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        everything = [*self.together, *(finding for report in self.reports for finding in report.findings)]
        return {
            "version": REPORT_VERSION,
            "state": worst(everything),
            "hosts": self.hosts,
            "together": [vars(finding) for finding in self.together],
            "machines": [report.to_json() for report in self.reports],
        }


def _names(hosts: Sequence[str]) -> str:
    shown = ", ".join(hosts[:SHOWN_HOSTS])
    return f"{shown} and {len(hosts) - SHOWN_HOSTS} more" if len(hosts) > SHOWN_HOSTS else shown


def purpose(loaded: Loaded | None, *, hosts: int, ranks: int = 0) -> Purpose:
    """What each of `hosts` machines shall do; `ranks` on each, where the launcher says so."""
    if loaded is None:
        return Purpose(hosts=hosts, ranks=ranks)
    stated = purpose_of(loaded, hosts=hosts)
    return Purpose(**(vars(stated) | ({"ranks": ranks} if ranks else {})))


def this_machine(*, loaded: Loaded | None, build: bool) -> Diagnosis:
    """Examine this machine alone."""
    report = examine(purpose(loaded, hosts=1), build=build)
    return Diagnosis([report.host], [report])


def compare(reports: list[Report]) -> list[Finding]:
    """What must be equal on all hosts, and whose figures stand out."""
    return [_versions(reports), _code(reports), _gpus(reports), _host_names(reports), *_speeds(reports)]


def _minority(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the hosts that hold another."""
    usual = Counter(map(repr, values.values())).most_common(1)[0][0]
    return next(value for value in values.values() if repr(value) == usual), {host: value for host, value in values.items() if repr(value) != usual}


def _versions(reports: list[Report]) -> Finding:
    wrong = []
    for package in reports[0].facts["versions"]:
        usual, others = _minority({report.host: report.facts["versions"].get(package) for report in reports})
        wrong += [(host, package, value, usual) for host, value in others.items()]
    if not wrong:
        return passed("equal versions", f"on {len(reports)} hosts")
    pins = " ".join(
        sorted({f"{package}=={usual}" for _, package, _, usual in wrong if usual and package not in ("python", "CUDA of torch", "harness")})
    )
    what = "; ".join(f"{host} has {package} {value or 'not at all'}, the others {usual or 'not'}" for host, package, value, usual in wrong)
    return failed(
        "equal versions",
        f"{what}.",
        f"On {_names(sorted({host for host, *_ in wrong}))}: {f'pip install {pins}' if pins else 'install the same versions'}",
    )


def _code(reports: list[Report]) -> Finding:
    usual, others = _minority({report.host: report.facts["code"] for report in reports})
    if not others:
        return passed("equal code", f"{usual} on {len(reports)} hosts")
    what = ", ".join(f"{host} runs {value}" for host, value in others.items())
    return failed(
        "equal code",
        f"The harness differs: {what}, the others {usual}.",
        f"Install the same version of it on {_names(list(others))}, or keep it in a folder that all hosts share.",
    )


def _gpus(reports: list[Report]) -> Finding:
    kinds = {report.host: sorted(set(report.facts["gpus"])) for report in reports}
    usual, others = _minority(kinds)
    counts = Counter(len(report.facts["gpus"]) for report in reports)
    if others:
        what = "; ".join(f"{host} has {', '.join(value) or 'no GPU'}" for host, value in others.items())
        verdict = failed if any(not value for value in kinds.values()) else warned
        return verdict(
            "equal GPUs",
            f"{what}; the others {', '.join(usual) or 'no GPU'}. All wait for the slowest.",
            f"Leave {_names(list(others))} out of the hostfile.",
        )
    return passed("equal GPUs", f"{'/'.join(map(str, sorted(counts)))} x {', '.join(usual)} a host" if usual else "none on any host")


def _host_names(reports: list[Report]) -> Finding:
    twice = [name for name, count in Counter(report.facts.get("hostname", report.host) for report in reports).items() if count > 1]
    if twice:
        return failed(
            "host names",
            f"Several hosts call themselves {', '.join(twice)}: MPI takes them for one, and counts its ranks wrong.",
            "hostnamectl set-hostname NAME   on each, with a name of its own",
        )
    return passed("host names", "all different")


def _speeds(reports: list[Report]) -> list[Finding]:
    found = []
    for key, name, unit in (
        ("memory_copy", "memory bandwidth", "copied"),
        ("nvme_write", "NVMe writing", "written"),
        ("nvme_read", "NVMe reading", "read"),
    ):
        figures = {report.host: report.facts["speeds"][key] for report in reports if key in report.facts["speeds"]}
        if len(figures) > 1:
            found.append(
                outliers(
                    f"equal {name}", figures, unit=unit, remedy="Look for what else runs there (top, iostat -x 1), or leave it out of the hostfile."
                )
            )
    return found


def outliers(name: str, figures: dict[str, float], *, unit: str, remedy: str) -> Finding:
    """Who is slower than half of the median; with two, slower than half of the other.

    Args:
        figures: bytes a second, by who made them.
        unit: what the bytes were.
    """
    middle = max(figures.values()) if len(figures) == 2 else statistics.median(figures.values())
    slow = {who: value for who, value in figures.items() if value < SLOW_SHARE * middle}
    if slow:
        what = ", ".join(f"{who} {format_bytes(value)}/s" for who, value in slow.items())
        return warned(name, f"Slow: {what} {unit}, where {format_bytes(middle)}/s is usual.", remedy)
    return passed(name, f"{format_bytes(min(figures.values()))}/s to {format_bytes(max(figures.values()))}/s {unit}")


def clocks(offsets: dict[str, float]) -> Finding:
    """Whether the clocks agree.

    Args:
        offsets: seconds by host, against any one clock.
    """
    middle = statistics.median_low(offsets.values())
    wrong = {host: offset - middle for host, offset in offsets.items() if abs(offset - middle) > MAX_SKEW_S}
    if wrong:
        what = ", ".join(f"{host} is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}" for host, skew in wrong.items())
        return warned(
            "clocks",
            f"{what}: logs and the age of files would mislead.",
            f"On {_names(list(wrong))}: chronyc makestep   (or systemctl restart systemd-timesyncd)",
        )
    return passed("clocks", f"within {max(offsets.values()) - min(offsets.values()):.2f} s")


def folder_shared(folder: Path, seen: dict[str, str]) -> Finding:
    """Whether all hosts see the same folder.

    Args:
        folder: its path.
        seen: by host: `yes`, `no`, or why it cannot be used.
    """
    broken = {host: state for host, state in seen.items() if state not in ("yes", "no")}
    apart = [host for host, state in seen.items() if state == "no"]
    if broken:
        return failed(
            "shared folder",
            "; ".join(f"{folder} on {host}: {state}" for host, state in broken.items()) + ".",
            f"mkdir -p {folder}   there, writable; or mount the shared file system; or set run_dir to a folder that all hosts have.",
        )
    if apart:
        return warned(
            "shared folder",
            f"{folder} is another folder on {_names(apart)}: each host keeps only its own part of a checkpoint.",
            "Set run_dir to a folder on a file system that all hosts share, or mean it: a run then resumes only on the same hosts.",
        )
    return passed("shared folder", f"{folder} is the same on {len(seen)} hosts")


def meetings(failures: dict[tuple[str, str], str], *, hosts: int) -> Finding:
    """Whether every host can open a connection to every other.

    Args:
        failures: (from, to) -> what went wrong.
        hosts: that tried.
    """
    if not failures:
        return passed("connections", f"each of {hosts} hosts reaches the others, on any port")
    shown = list(failures.items())[:SHOWN_HOSTS]
    what = "; ".join(f"{start} -> {end}: {why}" for (start, end), why in shown) + (
        f"; and {len(failures) - len(shown)} more" if len(failures) > len(shown) else ""
    )
    return failed(
        "connections",
        f"{what}.",
        "Ranks meet on ports that the system chooses: open all TCP ports between the hosts (firewall, security group), "
        "and give each name its network address in /etc/hosts on all hosts.",
    )
