"""The audit: what went in, what was left out and why, and how the result looks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.data.losses import LONGER
from harness.data.rows import RowTable
from harness.data.specials import OWN
from harness.data.template import Template
from harness.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Audit:
    """The counts of both sets, and some rows.

    Attributes:
        folder: of both sets.
        tables: the rows of each set; they know its index.
        samples: rows as lists of (text, trained).
    """

    folder: Path
    tables: dict[str, RowTable]
    samples: list[list[tuple[str, bool]]]

    def facts(self) -> dict[str, dict[str, Any]]:
        """The numbers by set."""
        facts = {}
        for name, table in self.tables.items():
            index, shards = table.index, table.index.shards
            facts[name] = {
                "rows in": index.audit["rows_in"],
                "documents": sum(s.rows for s in shards),
                **{f"dropped: {cause}": count for cause, count in index.audit["dropped"].items()},
                **({f"dropped: {LONGER}": table.summary.dropped} if table.summary.dropped else {}),
                **({"truncated": table.summary.truncated} if table.summary.truncated else {}),
                "duplicates (kept)": index.audit["duplicates"],
                **({OWN: index.audit["special"]} if "special" in index.audit else {}),
                "tokens": sum(s.tokens for s in shards),
                "trained tokens": sum(s.trained_tokens for s in shards),
                f"rows of {table.sequence_length}": table.num_rows,
                **({"rows without a trained token": table.summary.untrained} if table.summary.untrained else {}),
                "filled": f"{table.filled_share:.1%}",
                "shards": len(shards),
                "on disk": format_bytes(sum(s.bytes for s in shards)),
            }
        return facts

    def render(self, console: Console) -> Any:
        """A rich renderable: the table, what is worth a look, and sample rows with the trained text marked, by brackets where the console has no colours."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        facts = self.facts()
        table = Table("", *facts, title=Text(str(self.folder), style="table.title"), title_justify="left")
        for row in dict.fromkeys(key for values in facts.values() for key in values):
            cells = [values.get(row, 0) for values in facts.values()]
            table.add_row(row, *(cell if isinstance(cell, str) else f"{cell:,}" for cell in cells))
        notes = [Text(note, style="yellow") for name, rows in self.tables.items() for note in _notes(name, rows.index.audit)]
        plain = console.color_system is None or console.no_color
        samples = [Text(f"template: {Template.from_dict(next(iter(self.tables.values())).template).told}")]
        for number, pieces in enumerate(self.samples, 1):
            text = Text.assemble((f"sample {number} (trained text is {'in [[ ]]' if plain else 'marked'}): ", "dim"))
            for piece, trained in pieces:
                text.append(f"[[{piece}]]" if trained and plain else piece, style="bold green" if trained else "default")
            samples.append(text)
        return Group(table, *notes, *samples)


def _notes(name: str, audit: dict[str, Any]) -> list[str]:
    """What is worth a look, with the first row of its kind."""
    firsts = audit.get("firsts", {})
    told = [f"{audit['special']:,} rows of {name} hold {OWN}, which become control tokens; the first: {firsts[OWN]}"] if OWN in firsts else []
    return told + [f"The first row of {name} {kind}: {place}" for kind, place in firsts.items() if kind != OWN]


def sample_rows(folder: Path, tokenizer: Any = None, *, count: int, longest: int = 400, trust_code: bool = False) -> list[list[tuple[str, bool]]]:
    """The first, middle and last document of a set, as text with its trained parts, shortened to `longest` characters."""
    import datasets

    documents = datasets.load_from_disk(str(folder))
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer", trust_remote_code=trust_code)
    chosen = sorted({round(i * (len(documents) - 1) / max(1, count - 1)) for i in range(count)}) if len(documents) else []
    return [_pieces(documents[number], tokenizer, longest) for number in chosen]


def _pieces(document: dict[str, Any], tokenizer: Any, longest: int) -> list[tuple[str, bool]]:
    ids, place, pieces = document["input_ids"], 0, []
    for start, stop in zip(document["trained_starts"], document["trained_stops"], strict=True):
        pieces += [(ids[place:start], False), (ids[start:stop], True)]
        place = stop
    pieces.append((ids[place:], False))
    return [(tokenizer.decode(part)[:longest], trained) for part, trained in pieces if len(part)]
