"""The records of a range of a file, whatever its format, and what cannot be read named by file and line."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import orjson

from harness.data import builtin
from harness.data.examples import HALF_A_PAIR, is_text
from harness.data.ranges import CsvRows, InputRange, decode, told

BLANK_LINES = re.compile(r"\n\s*\n")
EACH_LINE = re.compile(r"[^\n]*\n|[^\n]+")
LINES = ("jsonl", "csv", "text")
LONGEST_PIECE = 4000
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class Broken:
    """A record that cannot be read.

    Attributes:
        line: of its file, from 1; the row where a format has no lines.
        reason: such as "is not JSON: Expecting value".
    """

    line: int
    reason: str


Record = dict[str, Any] | Broken | None
"""What stands in a row; None for an empty line."""


def read(part: InputRange) -> Iterator[Record]:
    """The records of a range, in order.

    Raises:
        Refused: when its bytes are not in its encoding.
    """
    with told(part):
        yield from islice(_READERS[part.kind](part), part.limit)


def column_names(part: InputRange, count: int) -> list[str]:
    """The names of the columns, or those of the first `count` records where there is no list of them."""
    if part.kind == "csv":
        return list(part.header)
    if part.kind == "hub":
        return part.table.column_names
    if part.kind == "parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(part.path).names
    return list(dict.fromkeys(name for record in islice(read(part), count) if isinstance(record, dict) for name in record))


def line_of(part: InputRange, number: int) -> int:
    """The line, or row, of its file in which a record of the range begins, both from 1; `number` from 0. Counted only to name a broken one."""
    if part.kind not in LINES:
        return part.start + number + 1
    before = islice(read(part), number if part.kind == "csv" else 0)
    return _lines_before(part) + number + 1 + sum(value.count("\n") for record in before if isinstance(record, dict) for value in record.values())


def first_records(parts: list[InputRange], count: int) -> list[InputRange]:
    """The ranges that hold the first `count` records, the last of them limited."""
    kept = []
    for part in parts:
        held = sum(record is not None for record in read(part))
        if held >= count:
            return [*kept, replace(part, limit=_lines_for(part, count), ends=part.ends and held == count)]
        count -= held
        kept.append(part)
    return kept


def _lines_for(part: InputRange, count: int) -> int:
    """How many records, empty lines included, hold the first `count`."""
    for number, record in enumerate(read(part), 1):
        count -= record is not None
        if count == 0:
            return number
    return number


def _bytes(part: InputRange) -> bytes:
    with open(part.path, "rb") as stream:
        stream.seek(part.start)
        return stream.read(part.stop - part.start)


def _lines_before(part: InputRange) -> int:
    """Lines of the file in front of the range; counted only to name a broken one."""
    count, place = 0, 0
    with open(part.path, "rb") as stream:
        while place < part.start and (block := stream.read(min(1 << 22, part.start - place))):
            count += block.count(b"\n")
            place += len(block)
    return count


def _read_jsonl(part: InputRange) -> Iterator[Record]:
    for number, line in enumerate(_lines(part)):
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            value = None if line.isspace() else _loads_slowly(line, part, number)
        else:
            if type(value) is not dict:
                value = _no_object(part, number)
        yield value


def _no_object(part: InputRange, number: int) -> Broken:
    return Broken(_lines_before(part) + number + 1, "is not a JSON object")


def _lines(part: InputRange) -> Iterator[bytes]:
    """The lines of a range, in UTF-8."""
    if part.encoding.lower().replace("_", "-") not in ("utf-8", "utf8", "ascii"):
        yield from io.BytesIO(decode(_bytes(part), part, part.start).encode("utf-8", "surrogatepass"))
        return
    with open(part.path, "rb", buffering=BUFFER_BYTES) as stream:
        stream.seek(part.start)
        left = part.stop - part.start
        while left > 0 and (line := stream.readline()):
            left -= len(line)
            yield line


def _loads_slowly(line: bytes, part: InputRange, number: int) -> Any:
    """What orjson refuses and the standard library reads (NaN, half a surrogate pair), or what is wrong with the line."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        decode(_bytes(part), part, part.start)
        raise
    try:
        value = json.loads(text)
        if isinstance(value, dict) and not is_text([value.get(name) for name in part.columns]):
            return Broken(_lines_before(part) + number + 1, HALF_A_PAIR)
        return value if isinstance(value, dict) else _no_object(part, number)
    except json.JSONDecodeError as error:
        return Broken(_lines_before(part) + number + 1, f"is not JSON: {error.msg}")


def _read_csv(part: InputRange) -> Iterator[Record]:
    rows, line = CsvRows(part, part.start), 1
    for row in rows:
        if isinstance(row, csv.Error):
            yield Broken(_lines_before(part) + line, f"cannot be read as csv: {row}")
        elif len(row) > len(part.header):
            yield Broken(_lines_before(part) + line, f"has {len(row)} fields where the header has {len(part.header)}")
        else:
            yield dict(zip(part.header, row, strict=False)) if row else None
        if rows.place >= part.stop:
            return
        line = rows.number + 1


def _read_text(part: InputRange) -> Iterator[Record]:
    """Pieces of some 4,000 characters, which together are the text."""
    text = io.StringIO(decode(_bytes(part), part, part.start), newline=None).read()
    current = ""
    for unit in _units(text):
        if len(current) + len(unit) > LONGEST_PIECE and not current.isspace() and not unit.isspace() and current:
            yield {part.columns[0]: current}
            current = unit
        else:
            current += unit
    if current:
        yield {part.columns[0]: current}


def _units(text: str) -> Iterator[str]:
    """Paragraphs with the blank lines that follow them, and of those that are longer than a piece their lines."""
    place = 0
    for stop in (*(found.end() for found in BLANK_LINES.finditer(text)), len(text)):
        paragraph, place = text[place:stop], stop
        yield from [paragraph] if len(paragraph) <= LONGEST_PIECE else EACH_LINE.findall(paragraph)


def _read_parquet(part: InputRange) -> Iterator[Record]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(part.path) as parquet:
        first, chosen, begin = 0, [], 0
        for number in range(parquet.metadata.num_row_groups):
            rows = parquet.metadata.row_group(number).num_rows
            if first < part.stop and first + rows > part.start:
                begin = first if not chosen else begin
                chosen.append(number)
            first += rows
        place = begin
        columns = [name for name in part.columns if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(BATCH_ROWS, row_groups=chosen, columns=columns):
            low, high = max(part.start - place, 0), min(part.stop - place, batch.num_rows)
            if low < high:
                yield from batch.slice(low, high - low).to_pylist()
            place += batch.num_rows


def _read_hub(part: InputRange) -> Iterator[Record]:
    columns = [name for name in part.columns if name in part.table.column_names]
    for first in range(part.start, part.stop, BATCH_ROWS):
        yield from part.table.data.table.slice(first, min(BATCH_ROWS, part.stop - first)).select(columns).to_pylist()


def _read_builtin(part: InputRange) -> Iterator[Record]:
    rows = builtin.python_prose() if part.path == "python-prose" else builtin.python_questions()
    for row in rows[part.start : part.stop]:
        yield dict(zip(part.columns, (row,) if isinstance(row, str) else row, strict=True))


_READERS: dict[str, Callable[[InputRange], Iterator[Record]]] = {
    "jsonl": _read_jsonl, "csv": _read_csv, "text": _read_text, "parquet": _read_parquet, "hub": _read_hub, "builtin": _read_builtin,
}
