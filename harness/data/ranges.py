"""Files cut into ranges at record borders before anything of them is tokenised, so that the shards of a set are known beforehand."""

from __future__ import annotations

import csv
import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.errors import Refused, first_line

BOM = b"\xef\xbb\xbf"
BLANK_LINES = re.compile(rb"\n[ \t\r]*\n")
CSV_LINES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
LARGEST_FIELD = 2**31 - 1
LOOKED_FOR_BYTES = 1 << 20
"""So far a blank line is looked for where a text is to be cut; then any line will do."""


@dataclass(frozen=True)
class InputRange:
    """Consecutive records of one file.

    Attributes:
        kind: jsonl, csv, text, parquet, hub or builtin.
        path: the file that is read.
        shown: the file as the user knows it: that which was unpacked, say.
        key: dotted key of the source, for messages.
        encoding: of text formats, one in which a newline is the byte 10.
        columns: what is read of each record.
        start: first byte; first row of parquet, hub and builtin.
        stop: the byte or row after the last.
        size: bytes, about.
        limit: at most so many records; None for all.
        header: names of a CSV file's columns.
        ends: of kind text, whose records are one document: whether it ends with the last of them.
        table: of kind hub, a memory-mapped `datasets.Dataset`.
    """

    kind: str
    path: str
    shown: str
    key: str
    encoding: str
    columns: tuple[str, ...]
    start: int
    stop: int
    size: int
    limit: int | None = None
    header: tuple[str, ...] = ()
    ends: bool = True
    table: Any = None


def whole_file(path: Path, shown: Path, kind: str, *, key: str, encoding: str, columns: tuple[str, ...]) -> InputRange:
    """All of a file."""
    size = path.stat().st_size
    return InputRange(kind, str(path), str(shown), key, encoding, columns, 0, size, size)


def cut(whole: InputRange, size: int) -> list[InputRange]:
    """Cut a file into ranges of about `size` bytes, at borders that depend on its bytes alone."""
    with told(whole):
        return _CUTTERS[whole.kind](whole, size)


def group(parts: list[InputRange], size: int) -> list[tuple[InputRange, ...]]:
    """Join consecutive small ranges up to `size` bytes: what one shard is made of."""
    groups: list[tuple[InputRange, ...]] = []
    held = 0
    for part in parts:
        if groups and held + part.size <= size:
            groups[-1] += (part,)
        else:
            groups.append((part,))
            held = 0
        held += part.size
    return groups


@contextmanager
def told(part: InputRange) -> Iterator[None]:
    """Say which file a library could not read."""
    import pyarrow as pa

    try:
        yield
    except (OSError, pa.ArrowException) as error:
        cause = first_line(error)
        raise Refused(f"{part.shown} cannot be read as {part.kind}: {cause}", where=f"{part.key}.path", remedy="Mend the file, or set the right format.") from None


def _at_bytes(whole: InputRange, size: int, border: Callable[[Any, int], int], first: int) -> list[InputRange]:
    """Cut at the first border at or after each multiple of `size`."""
    with open(whole.path, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        places = [first]
        while places[-1] < whole.stop:
            after = places[-1] + size
            places.append(border(content, after) if after < whole.stop else whole.stop)
    return [replace(whole, start=a, stop=b, size=b - a) for a, b in zip(places, places[1:], strict=False)]


def _after_newline(content: Any, place: int) -> int:
    found = content.find(b"\n", place - 1)
    return len(content) if found < 0 else found + 1


def _after_blank_line(content: Any, place: int) -> int:
    found = BLANK_LINES.search(content, place, place + LOOKED_FOR_BYTES)
    return found.end() if found else _after_newline(content, place)


def _start(path: str) -> int:
    with open(path, "rb") as stream:
        return len(BOM) if stream.read(len(BOM)) == BOM else 0


def _cut_jsonl(whole: InputRange, size: int) -> list[InputRange]:
    return _at_bytes(whole, size, _after_newline, _start(whole.path))


def _cut_text(whole: InputRange, size: int) -> list[InputRange]:
    parts = _at_bytes(whole, size, _after_blank_line, _start(whole.path))
    return [replace(part, ends=part is parts[-1]) for part in parts]


def _cut_csv(whole: InputRange, size: int) -> list[InputRange]:
    """A newline may stand between quotes, so a file of several ranges is parsed once to find the borders."""
    rows = CsvRows(whole, _start(whole.path))
    given = iter(rows)
    header = next(given, [])
    if isinstance(header, csv.Error):
        raise Refused(f"{whole.shown} line 1 cannot be read as csv: {header}.", where=f"{whole.shown}:1 ({whole.key}.path)", remedy="Mend the file, or set the right format.")
    places = [rows.place]
    for _ in given if whole.stop - places[0] > size else ():
        if rows.place - places[-1] >= size:
            places.append(rows.place)
    if places[-1] < whole.stop or len(places) == 1:
        places.append(whole.stop)
    return [replace(whole, start=a, stop=b, size=b - a, header=tuple(header)) for a, b in zip(places, places[1:], strict=False)]


class CsvRows:
    """The rows of a CSV file from a place on, to its end; an error for one that cannot be read.

    After such a row it goes on at the next line, so that a quote that is never closed takes no other row with it.

    Attributes:
        place: after the last row.
        number: of lines before that place.
    """

    def __init__(self, part: InputRange, place: int):
        self.part, self.place, self.number = part, place, 0
        csv.field_size_limit(LARGEST_FIELD)

    def __iter__(self) -> Iterator[list[str] | csv.Error]:
        reader = csv.reader(self._lines(), strict=True)
        while True:
            begin = self.place, self.number
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.place, self.number = begin
                next(self._lines(), None)
                reader = csv.reader(self._lines(), strict=True)
                yield error

    def _lines(self) -> Iterator[str]:
        with open(self.part.path, "rb") as stream:
            stream.seek(self.place)
            for line in stream:
                for piece in CSV_LINES.findall(line) if b"\r" in line else (line,):
                    text = decode(piece, self.part, self.place)
                    self.place += len(piece)
                    self.number += 1
                    yield text


def _cut_parquet(whole: InputRange, size: int) -> list[InputRange]:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(whole.path)
    parts, first = [], 0
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        rows, held = row_group.num_rows, row_group.total_byte_size
        pieces = max(1, min(rows, -(-held // size)))
        edges = [first + rows * piece // pieces for piece in range(pieces + 1)]
        parts += [replace(whole, start=a, stop=b, size=held // pieces) for a, b in zip(edges, edges[1:], strict=False)]
        first += rows
    return parts


def _cut_rows(whole: InputRange, size: int) -> list[InputRange]:
    rows = whole.stop - whole.start
    pieces = max(1, min(rows, -(-whole.size // size)))
    edges = [rows * piece // pieces for piece in range(pieces + 1)]
    return [replace(whole, start=a, stop=b, size=whole.size // pieces) for a, b in zip(edges, edges[1:], strict=False)]


def decode(content: bytes, part: InputRange, place: int) -> str:
    """Bytes of a file as text.

    Args:
        content: that stand at `place` of it.
        part: a range of the file.
        place: of the first byte.

    Raises:
        Refused: they are not in its encoding; with the place and the encoding that the file looks like.
    """
    try:
        return content.decode(part.encoding)
    except UnicodeDecodeError as error:
        likely = _likely_encoding(part.path)
        raise Refused(
            f"{part.shown} is not {part.encoding}: byte {place + error.start} cannot be decoded.", where=f"{part.shown} ({part.key}.path)",
            remedy=f"Save the file as {part.encoding}, or set `{part.key}.encoding` to its encoding" + (f"; it looks like {likely}." if likely else "."),
        ) from None


def _likely_encoding(path: str) -> str | None:
    """What the first MiB looks like; GB18030 for all that it contains (GB2312, GBK)."""
    from charset_normalizer import from_bytes

    with open(path, "rb") as stream:
        found = from_bytes(stream.read(1 << 20)).best()
    if found is None:
        return None
    return "gb18030" if found.encoding in ("gb2312", "gbk", "hz") else found.encoding


_CUTTERS: dict[str, Callable[[InputRange, int], list[InputRange]]] = {
    "jsonl": _cut_jsonl, "csv": _cut_csv, "text": _cut_text, "parquet": _cut_parquet, "hub": _cut_rows, "builtin": _cut_rows,
}
