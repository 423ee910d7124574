"""What one check of a machine found: a verdict, what was seen, and the remedy in words that can be typed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

REPORT_VERSION = 1
State = Literal["pass", "warn", "fail", "skip"]
_ORDER: tuple[State, ...] = ("fail", "warn", "pass", "skip")


@dataclass(frozen=True)
class Finding:
    """One verdict.

    Attributes:
        name: of the check, the same on every machine.
        state: pass; warn: training works, but worse or not for long; fail: it would break; skip: there is nothing to judge here.
        what: was seen, with the figures.
        remedy: what to type or change; empty where nothing is wrong.
    """

    name: str
    state: State
    what: str
    remedy: str = ""


@dataclass
class Report:
    """What was found on one machine; travels as JSON.

    Attributes:
        host: name of the machine.
        findings: verdicts, in the order of the checks.
        facts: what is only wrong in comparison with other machines: versions, code, GPUs, figures of bandwidth.
    """

    host: str
    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"version": REPORT_VERSION, "state": worst(self.findings), **asdict(self)}


def from_json(value: dict[str, Any]) -> Report:
    """A report as `to_json` wrote it.

    Raises:
        ValueError: when another version of this program wrote it.
    """
    if value.get("version") != REPORT_VERSION:
        raise ValueError(f"a report of version {value.get('version')}, where {REPORT_VERSION} is read")
    return Report(value["host"], [Finding(**finding) for finding in value["findings"]], value["facts"])


def worst(findings: Iterable[Finding]) -> State:
    """The gravest state among them; pass when there are none."""
    states = {finding.state for finding in findings}
    return next((state for state in _ORDER if state in states), "pass")


def passed(name: str, what: str) -> Finding:
    """All is well."""
    return Finding(name, "pass", what)


def skipped(name: str, why: str) -> Finding:
    """There is nothing to judge."""
    return Finding(name, "skip", why)


def warned(name: str, what: str, remedy: str) -> Finding:
    """Training works, but worse or not for long."""
    return Finding(name, "warn", what, remedy)


def failed(name: str, what: str, remedy: str) -> Finding:
    """Training would break."""
    return Finding(name, "fail", what, remedy)
