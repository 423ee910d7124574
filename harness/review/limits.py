"""`--fail-if`: conditions on a run's numbers, for programs that must notice."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass

from harness.errors import Refused
from harness.review.summary import FACTS, Summary

_OPERATORS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_FORM = re.compile(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+.\w]+?)(x?)\s*")


@dataclass(frozen=True)
class Limit:
    """A condition that fails a run.

    Attributes:
        text: as it was given.
        name: of the number.
        compare: how.
        bound: with what.
        is_relative: the bound is in units of the first run's number.
    """

    text: str
    name: str
    compare: Callable[[float, float], bool]
    bound: float
    is_relative: bool

    def failures(self, summaries: list[Summary]) -> list[str]:
        """A sentence for every run that it fails; a number that a run does not have fails it too."""
        first, *others = summaries
        return [told for one in (others if self.is_relative else summaries) if (told := self._failure(one, first))]

    def _failure(self, one: Summary, first: Summary) -> str:
        value, base = one.facts.get(self.name, math.nan), first.facts.get(self.name, math.nan)
        lacking = next((run.name for run, found in ((one, value), (first, base)) if math.isnan(found) and (run is one or self.is_relative)), None)
        if lacking is not None:
            return f"{lacking} has no {self.name}"
        if not self.compare(value, self.bound * base if self.is_relative else self.bound):
            return ""
        beside = f", {value / base:.3f} times that of {first.name}" if self.is_relative and base else ""
        return f"{one.name}: {self.name} is {value:.6g}{beside} (--fail-if '{self.text}')"


def parse(text: str, *, num_runs: int) -> Limit:
    """Read `NAME < NUMBER`, or `NAME < NUMBERx` for so many times the first run's.

    Args:
        text: the condition; <, <=, > and >= are known.
        num_runs: that are reviewed.

    Raises:
        Refused: when it is none.
    """
    found = _FORM.fullmatch(text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if found is None or math.isnan(bound):
        raise Refused(f"`{text}` is no condition.", where="--fail-if", remedy="Write it like 'tokens_per_second < 1000', or 'tokens_per_second < 0.95x' beside a first run.")
    if found[1] not in FACTS:
        raise Refused(f"No number of a run is called `{found[1]}`.", where="--fail-if", remedy=f"There are: {', '.join(FACTS)}.")
    if found[4] and num_runs < 2:
        raise Refused(f"`{text}` compares with a first run, and there is only one.", where="--fail-if", remedy="Name the run to compare with first, then the others.")
    return Limit(text.strip(), found[1], _OPERATORS[found[2]], bound, bool(found[4]))
