"""Raw examples from files, the hub or Python itself, as one memory-mapped table of strings."""

from __future__ import annotations

import difflib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import files
from harness.config.schema import Data, Source
from harness.data import builtin
from harness.errors import Refused

if TYPE_CHECKING:
    from datasets import Dataset

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 20
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text", ".md": "text"}


def columns_of(data: Data) -> list[str]:
    """The columns that the shape of the examples needs."""
    names = {"text": ["text"], "prompt_completion": ["prompt", "completion"], "messages": ["messages"]}[data.shape]
    return [getattr(data.columns, name) for name in names]


def source_paths(source: Source, *, key: str) -> list[Path]:
    """The files of a source, in order.

    Raises:
        Refused: missing or empty files.
    """
    patterns = [source.path] if isinstance(source.path, str) else source.path or []
    paths: list[Path] = []
    for pattern in patterns:
        found = [Path(p) for p in sorted(glob.glob(pattern))] or ([Path(pattern)] if Path(pattern).exists() else [])
        if not found:
            raise Refused(f"There is no file {pattern}.", where=f"{key}.path", remedy="Give the path of a file that exists; it is relative to the current folder.")
        paths += found
    for path in paths:
        if path.is_dir():
            raise Refused(f"{path} is a folder.", where=f"{key}.path", remedy=f"Name its files, such as {path}/*.jsonl.")
        if path.stat().st_size == 0:
            raise Refused(f"{path} is empty.", where=f"{key}.path", remedy="Give a file with examples.")
    return paths


def source_digest(source: Source, *, key: str) -> str:
    """What identifies the bytes of a source."""
    if source.path is not None:
        return files.digest_text(*(files.digest_file(path) for path in source_paths(source, key=key)), source.encoding)
    if source.builtin is not None:
        texts = builtin.python_prose() if source.builtin == "python-prose" else [f"{q}\n{a}" for q, a in builtin.python_questions()]
        return files.digest_text(*texts)
    return files.digest_text("hub", str(source.hub), source.split)


def open_source(source: Source, data: Data, *, key: str, cache: Path) -> Dataset:
    """Open a source.

    Args:
        source: where it is.
        data: the section of the run file, for shape and columns.
        key: dotted key of the source, for messages.
        cache: folder for the tables that `datasets` makes of text formats.

    Raises:
        Refused: whatever is wrong with a file, with the file and the place in it.
    """
    import datasets

    datasets.disable_progress_bars()
    if source.builtin is not None:
        table = _builtin(source, data)
    elif source.hub is not None:
        table = _from_hub(source, key=key, cache=cache)
    else:
        table = _from_files(source, data, key=key, cache=cache)
    if source.max_rows is not None:
        table = table.select(range(min(source.max_rows, len(table))))
    for name in columns_of(data):
        if name not in table.column_names:
            nearest = difflib.get_close_matches(name, table.column_names, n=1, cutoff=0.0)
            raise Refused(
                f"The source has no column {name!r}; it has {', '.join(table.column_names)}.",
                where=f"{key} ({source.path or source.hub or source.builtin}), data.columns",
                remedy=f"Set `data.columns` to the names in the file; did you mean {nearest[0]!r}?" if nearest else "Set `data.columns`.",
            )
    if len(table) == 0:
        raise Refused("The source has no rows.", where=f"{key} ({source.path or source.hub})", remedy="Give a file with examples.")
    return table.select_columns(columns_of(data))


def _builtin(source: Source, data: Data) -> Dataset:
    from datasets import Dataset

    if source.builtin == "python-prose":
        return Dataset.from_dict({data.columns.text: builtin.python_prose()})
    pairs = builtin.python_questions()
    return Dataset.from_dict({data.columns.prompt: [q for q, _ in pairs], data.columns.completion: [a for _, a in pairs]})


def _from_hub(source: Source, *, key: str, cache: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_dataset(source.hub, split=source.split, cache_dir=str(cache))
    except Exception as error:
        raise Refused(f"The data set {source.hub!r} cannot be read: {str(error).splitlines()[0][:200]}", where=f"{key}.hub",
                      remedy="Check the name, the split and the network, or give files with `path`.") from None


def _from_files(source: Source, data: Data, *, key: str, cache: Path) -> Dataset:
    import datasets

    given = source_paths(source, key=key)
    kind = source.format or SUFFIXES.get(_plain_name(given[0]).suffix)
    if kind is None:
        raise Refused(f"The format of {given[0]} is not known from its suffix.", where=f"{key}.path", remedy=f"Set `{key}.format` to jsonl, csv, parquet or text.")
    paths = [_decompressed(path, cache, key=key) for path in given]
    if kind != "parquet":
        for path, shown in zip(paths, given, strict=True):
            _check_encoding(path, source.encoding, key, shown=shown)
    if kind == "jsonl":
        for path, shown in zip(paths, given, strict=True):
            _check_json_lines(path, columns_of(data), source.encoding, shown=shown)
    if kind == "text":
        rows = [{data.columns.text: text} for path in paths for text in _documents(path, source.encoding)]
        return datasets.Dataset.from_list(rows)
    builder = {"jsonl": "json", "csv": "csv", "parquet": "parquet"}[kind]
    options = {"encoding": source.encoding} if kind in ("jsonl", "csv") else {}
    if kind == "csv":
        options["keep_default_na"] = False
    try:
        return datasets.load_dataset(builder, data_files=[str(p) for p in paths], split="train", cache_dir=str(cache), **options)
    except Exception as error:
        cause = str(error.__cause__ or error).strip().splitlines()[0][:200]
        raise Refused(f"{given[0]} cannot be read as {kind}: {cause}", where=f"{key}.path", remedy="Mend the file, or set the right format.") from None


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


def _check_encoding(path: Path, encoding: str, key: str, *, shown: Path) -> None:
    import codecs

    decoder, place = codecs.getincrementaldecoder(encoding)(), 0
    with open(path, "rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            try:
                decoder.decode(block)
            except UnicodeDecodeError as error:
                pending = len(error.object) - len(block)
                likely = _likely_encoding(path)
                raise Refused(
                    f"{shown} is not {encoding}: byte {place - pending + error.start} cannot be decoded.", where=f"{shown} ({key}.path)",
                    remedy=f"Save the file as {encoding}, or set `{key}.encoding` to its encoding" + (f"; it looks like {likely}." if likely else "."),
                ) from None
            place += len(block)


def _likely_encoding(path: Path) -> str | None:
    """What the first MiB looks like; GB18030 for all that it contains (GB2312, GBK)."""
    from charset_normalizer import from_bytes

    with open(path, "rb") as stream:
        found = from_bytes(stream.read(BLOCK_BYTES)).best()
    if found is None:
        return None
    return "gb18030" if found.encoding in ("gb2312", "gbk", "hz") else found.encoding


def _check_json_lines(path: Path, needed: list[str], encoding: str, *, shown: Path) -> None:
    with open(path, encoding=encoding) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise Refused(f"{shown} line {number} is not JSON: {error.msg}.", where=f"{shown}:{number}", remedy="Mend or remove the line.") from None
            if not isinstance(value, dict):
                raise Refused(f"{shown} line {number} is not a JSON object.", where=f"{shown}:{number}", remedy=f"Write it as {{{', '.join(needed)}: ...}}.")


def _documents(path: Path, encoding: str) -> Iterator[str]:
    """A plain text file as documents of some 4,000 characters, cut at empty lines."""
    yield from builtin.cut_at_paragraphs(path.read_text(encoding=encoding), builtin.LONGEST_DOCUMENT)


def example_of(row: dict[str, Any], data: Data) -> Any:
    """The example in a row: a string, a pair or a list of turns; None where a part is missing or empty."""
    values = [row[name] for name in columns_of(data)]
    if data.shape == "messages":
        turns = values[0]
        valid = bool(turns) and all(isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns)
        return turns if valid else None
    texts = [value if isinstance(value, str) else ("" if value is None else str(value)) for value in values]
    if data.shape == "text":
        return texts[0] if texts[0].strip() else None
    return (texts[0], texts[1]) if texts[0].strip() and texts[1].strip() else None


def key_of(example: Any) -> str:
    """What must not stand on both sides of a split: the question, or the whole text."""
    if isinstance(example, str):
        text = example
    elif isinstance(example, tuple):
        text = example[0]
    else:
        text = next((turn["content"] for turn in example if turn["role"] == "user"), json.dumps(example, sort_keys=True))
    return files.digest_text(" ".join(text.lower().split()))
