"""Where raw examples come from, files, the hub or Python itself, as ranges of records."""

from __future__ import annotations

import codecs
import difflib
import glob
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from harness import files
from harness.config.schema import Data, Source
from harness.data import builtin, ranges, records
from harness.data.examples import columns_of, optional_columns_of
from harness.data.ranges import InputRange
from harness.errors import Refused, first_line
from harness.formats import digest

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 20
LOOKED_AT = 100
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def source_paths(source: Source, *, key: str) -> list[Path]:
    """The files of a source, in order.

    Raises:
        Refused: missing or empty files.
    """
    patterns = [source.path] if isinstance(source.path, str) else source.path or []
    paths: list[Path] = []
    for pattern in patterns:
        found = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))] or ([Path(pattern)] if Path(pattern).exists() else [])
        if not found:
            raise Refused(f"There is no file {pattern}.", where=f"{key}.path", remedy="Give the path of a file that exists; it is relative to the current folder.")
        paths += found
    for path in paths:
        if path.is_dir():
            raise Refused(f"{path} is a folder.", where=f"{key}.path", remedy=f"Name its files, such as {path}/*.jsonl.")
        if path.stat().st_size == 0:
            raise Refused(f"{path} is empty.", where=f"{key}.path", remedy="Give a file with examples.")
    return paths


def source_digest(source: Source, *, key: str, known: Path) -> str:
    """What identifies the bytes of a source.

    Args:
        source: where it is.
        key: dotted key of the source, for messages.
        known: file that remembers digests of files by size and time, so that large ones are not read at every start.
    """
    if source.path is not None:
        paths = source_paths(source, key=key)
        kinds = [_kind(path, source, key=key) for path in paths]
        return files.digest_text(*files.remembered_digests(paths, known, digest.of_file), *kinds, source.encoding)
    if source.builtin is not None:
        texts = builtin.python_prose() if source.builtin == "python-prose" else [f"{q}\n{a}" for q, a in builtin.python_questions()]
        return files.digest_text(*texts)
    return files.digest_text("hub", str(source.hub), source.split)


def reads_text(source: Source, *, key: str) -> bool:
    """Whether files of a source are plain text."""
    return source.path is not None and any(_kind(path, source, key=key) == "text" for path in source_paths(source, key=key))


def open_source(source: Source, data: Data, *, key: str, cache: Path, size: int) -> list[tuple[InputRange, ...]]:
    """The ranges of a source, grouped as shards are made of them.

    Args:
        source: where it is.
        data: the section of the run file, for shape and columns.
        key: dotted key of the source, for messages.
        cache: folder for what must be unpacked or written in another encoding first.
        size: bytes of a shard's text, about.

    Raises:
        Refused: whatever is wrong with a file, with the file and the place in it.
    """
    parts = [part for whole in _wholes(source, data, key=key, cache=cache) for part in ranges.cut(whole, size)]
    if source.max_rows is not None:
        parts = records.first_records(parts, source.max_rows)
    _check_columns(parts, source, data, key)
    return ranges.group(parts, size)


def _wholes(source: Source, data: Data, *, key: str, cache: Path) -> list[InputRange]:
    columns = columns_of(data) + optional_columns_of(data)
    if source.builtin is not None:
        rows = builtin.python_prose() if source.builtin == "python-prose" else builtin.python_questions()
        size = sum(len(row) if isinstance(row, str) else len(row[0]) + len(row[1]) for row in rows)
        return [InputRange("builtin", source.builtin, source.builtin, key, "utf-8", columns, 0, len(rows), size)]
    if source.hub is not None:
        table = _from_hub(source, key=key, cache=cache)
        return [InputRange("hub", source.hub, source.hub, key, "utf-8", columns, 0, len(table), table.data.nbytes, table=table)]
    try:
        splits = _splits_at_bytes(source.encoding)
    except LookupError:
        raise Refused(f"There is no encoding {source.encoding!r}.", where=f"{key}.encoding", remedy="Name one that Python knows, such as utf-8 or gb18030.") from None
    wholes = []
    for shown in source_paths(source, key=key):
        kind, encoding = _kind(shown, source, key=key), source.encoding
        path = _decompressed(shown, cache, key=key)
        if kind != "parquet" and not splits:
            path, encoding = _in_utf8(path, shown, encoding, cache, key=key), "utf-8"
        wholes.append(ranges.whole_file(path, shown, kind, key=key, encoding=encoding, columns=columns))
    return wholes


def _kind(path: Path, source: Source, *, key: str) -> str:
    kind = source.format or SUFFIXES.get(_plain_name(path).suffix)
    if kind is None:
        raise Refused(f"The format of {path} is not known from its suffix.", where=f"{key}.path", remedy=f"Set `{key}.format` to jsonl, csv, parquet or text.")
    return kind


def _check_columns(parts: list[InputRange], source: Source, data: Data, key: str) -> None:
    """Look at the names, or the first records, for the columns that the shape needs."""
    if not any(record is not None for part in parts for record in islice(records.read(part), LOOKED_AT)):
        raise Refused("The source has no rows.", where=f"{key} ({source.path or source.hub})", remedy="Give a file with examples.")
    for part in {(part.kind, part.header): part for part in reversed(parts)}.values():
        names = records.column_names(part, LOOKED_AT)
        for name in columns_of(data):
            if names.count(name) > 1:
                raise Refused(f"{part.shown} has {names.count(name)} columns named {name!r}.", where=f"{key} ({part.shown}), data.columns", remedy="Give each column a name of its own.")
            if names and name not in names:
                nearest = difflib.get_close_matches(name, names, n=1)
                raise Refused(
                    f"{part.shown} has no column {name!r}; it has {', '.join(names)}.", where=f"{key} ({part.shown}), data.columns",
                    remedy=f"Set `data.columns` to the names in the file{f'; did you mean {nearest[0]!r}?' if nearest else '.'}",
                )


def _from_hub(source: Source, *, key: str, cache: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(source.hub, split=source.split, cache_dir=str(cache))
    except Exception as error:
        raise Refused(f"The data set {source.hub!r} cannot be read: {first_line(error)}", where=f"{key}.hub",
                      remedy="Check the name, the split and the network, or give files with `path`.") from None


def _splits_at_bytes(encoding: str) -> bool:
    """Whether a newline is the byte 10 in it, and nothing else is."""
    return '\n,"'.encode(encoding) == b'\n,"' and codecs.lookup(encoding).name not in ("utf-7", "hz") and not codecs.lookup(encoding).name.startswith("iso2022")


def _in_utf8(path: Path, shown: Path, encoding: str, cache: Path, *, key: str) -> Path:
    """The text of a file whose encoding cannot be cut at bytes, written as UTF-8."""
    written = cache / "utf-8" / f"{files.digest_text(str(path.absolute()))[:8]}-{path.name}"
    written.parent.mkdir(parents=True, exist_ok=True)
    decoder, place = codecs.getincrementaldecoder(encoding)(), 0
    with open(path, "rb") as stream, open(written, "wb") as plain:
        block = b"\n"
        while block:
            block = stream.read(BLOCK_BYTES)
            try:
                plain.write(decoder.decode(block, final=not block).encode("utf-8", "surrogatepass"))
            except UnicodeDecodeError as error:
                raise Refused(f"{shown} is not {encoding}: byte {place - (len(error.object) - len(block)) + error.start} cannot be decoded.",
                              where=f"{shown} ({key}.path)", remedy=f"Set `{key}.encoding` to its encoding.") from None
            place += len(block)
    return written


def _plain_name(path: Path) -> Path:
    """`pairs.jsonl.gz` -> `pairs.jsonl`."""
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _decompressed(path: Path, cache: Path, *, key: str) -> Path:
    """The file itself, or its content unpacked beside the tables that are made of it, under the same name without the last suffix."""
    if path.suffix not in COMPRESSED:
        return path
    import pyarrow as pa

    folder = cache / "unpacked" / files.digest_text(str(path.absolute()))[:8]
    unpacked = folder / _plain_name(path).name

    def blocks() -> Iterator[bytes]:
        try:
            with pa.CompressedInputStream(pa.OSFile(str(path)), COMPRESSED[path.suffix]) as packed:
                while block := packed.read(BLOCK_BYTES):
                    yield block
        except (OSError, pa.ArrowException) as error:
            raise Refused(f"{path} cannot be unpacked as {COMPRESSED[path.suffix]}: {error}", where=f"{path} ({key}.path)", remedy="Mend the file, or give it unpacked.") from None

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(unpacked, "wb") as plain:
            for block in blocks():
                plain.write(block)
    except OSError as error:
        raise Refused(f"{path} cannot be unpacked to {folder}: {error.strerror}.", where="data.dir", remedy="Make room there, or set `data.dir` to another place.") from None
    if unpacked.stat().st_size == 0:
        raise Refused(f"{path} is empty.", where=f"{key}.path", remedy="Give a file with examples.")
    return unpacked
