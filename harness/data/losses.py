"""Whether what was lost between a source and its rows may be lost."""

from __future__ import annotations

from collections import Counter

from harness.config.schema import Data
from harness.data.encode import KNOWN, UNREADABLE
from harness.data.plans import Summary
from harness.errors import Refused
from harness.formats.index import ShardSetIndex

LONGER = "longer than a row"


def refuse(data: Data, name: str, index: ShardSetIndex, summary: Summary) -> None:
    """Refuse a set without a trained token, and one of which too much was left out.

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
    causes = ", ".join(f"{count} because {cause}" for cause, count in dropped.most_common())
    firsts = {UNREADABLE: next(iter(index.audit.get("broken", ())), None), **index.audit.get("firsts", {})}
    first = "".join(f" The first {cause if cause != UNREADABLE else f'that {cause}'}: {firsts[cause]}." for cause in dropped if firsts.get(cause))
    if sum(index.columns["trained_tokens"]) == 0:
        detail = f" ({causes})" if causes else ""
        raise Refused(f"The {name} set has no row with a trained token{detail}.{first}", where=where,
                      remedy="Check data.shape, data.columns and data.template" + (", or raise data.validation_share." if name == "validation" else "."))
    if sum(summary.trained) == 0:
        raise Refused(f"No row of {data.sequence_length} tokens of the {name} set has a trained token: all of them stand further back.",
                      where="data.sequence_length, data.long_documents", remedy="Raise data.sequence_length, or set data.long_documents=cut.")
    lost, rows_in, documents = dropped.total() - dropped[KNOWN] - dropped[LONGER], index.audit["rows_in"], sum(index.columns["rows"])
    if lost / max(1, rows_in) + dropped[LONGER] / documents > data.max_dropped_share:
        told = [f"{lost} of {rows_in} rows"] * (lost > 0) + [f"{dropped[LONGER]} of {documents} documents"] * (dropped[LONGER] > 0)
        remedy = "Raise data.sequence_length, set data.long_documents=cut" if dropped[LONGER] else "Mend the rows"
        raise Refused(f"{' and '.join(told)} of the {name} set would be dropped: {causes}.{first}", where=where,
                      remedy=f"{remedy}, or raise data.max_dropped_share.")
