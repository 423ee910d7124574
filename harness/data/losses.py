"""Whether what was lost between a source and its rows may be lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from harness.config.schema import Data
from harness.data.encode import KNOWN, UNREADABLE
from harness.data.plans import Summary
from harness.errors import Refused
from harness.formats.index import ShardSetIndex

LONGER = "longer than a row"


def told(dropped: Mapping[str, int]) -> str:
    """Rows by cause, most first."""
    return ", ".join(f"{count} because {cause}" for cause, count in Counter(dropped).most_common())


def first(dropped: Mapping[str, int], audit: Mapping[str, Any]) -> str:
    """Where the first row of each cause stands, as far as an index's audit tells."""
    firsts = {UNREADABLE: next(iter(audit.get("broken", ())), None), **audit.get("firsts", {})}
    return "".join(f" The first {cause if cause != UNREADABLE else f'that {cause}'}: {firsts[cause]}." for cause in dropped if firsts.get(cause))


def refuse(data: Data, name: str, index: ShardSetIndex, summary: Summary) -> None:
    """Refuse rows without a trained token, and a set of which too much was left out.

    What was left out of a set that is given by name was accepted when it was prepared; its row length is this run's own.

    Args:
        data: the section of the run file.
        name: of the set, for messages.
        index: of the set; its files need not be written yet.
        summary: of its rows.

    Raises:
        Refused: with the causes.
    """
    dropped = Counter(index.audit["dropped"] if data.sets is None else {}) + Counter({LONGER: summary.dropped})
    where = f"data.{name}" if data.sets is None else "data.sets"
    if sum(summary.trained) == 0:
        raise Refused(f"No row of {data.sequence_length} tokens of the {name} set has a trained token: all of them stand further back.",
                      where="data.sequence_length, data.long_documents", remedy="Raise data.sequence_length, or set data.long_documents=cut.")
    lost, rows_in, documents = dropped.total() - dropped[KNOWN] - dropped[LONGER], index.audit["rows_in"], sum(index.columns["rows"])
    if lost / max(1, rows_in) + dropped[LONGER] / documents > data.max_dropped_share:
        amounts = [f"{lost} of {rows_in} rows"] * (lost > 0) + [f"{dropped[LONGER]} of {documents} documents"] * (dropped[LONGER] > 0)
        remedy = "Raise data.sequence_length, set data.long_documents=cut" if dropped[LONGER] else "Mend the rows"
        raise Refused(f"{' and '.join(amounts)} of the {name} set would be dropped: {told(dropped)}.{first(dropped, index.audit)}", where=where,
                      remedy=f"{remedy}, or raise data.max_dropped_share.")
