"""`index.json`: what a set of token shards holds, readable without touching a shard."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict

from harness import files
from harness.formats import digest

VERSION = 2
NAME, DRAFT = "index.json", "draft.json"


class ShardFile(BaseModel):
    """A file of a shard, as it must arrive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> ShardFile:
        """The file as it is."""
        return cls(name=path.name, bytes=path.stat().st_size, digest=digest.of_file(path))

    @classmethod
    def below(cls, folder: Path) -> list[ShardFile]:
        """All files of a folder and of those in it, by their paths from it."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return [cls.of(path).model_copy(update={"name": path.relative_to(folder).as_posix()}) for path in paths]


class ShardSource(BaseModel):
    """Where records of a shard come from.

    Attributes:
        file: as the run file names it.
        first_row: of the first record in its file, from 0.
        rows: records, those that were left out included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    first_row: int = 0
    rows: int


class ShardEntry(BaseModel):
    """One shard.

    Attributes:
        name: such as shard-00000.
        rows: documents.
        tokens: of all documents.
        trained_tokens: those that a span covers, the first of a document never.
        files: the Arrow file with a row a document; the arrays of lengths, trained spans and record numbers.
        sources: the records that it was made of, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    tokens: int
    trained_tokens: int
    files: list[ShardFile]
    sources: list[ShardSource]

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(file.bytes for file in self.files)

    @property
    def digest(self) -> str:
        """Of the Arrow file."""
        return self.files[0].digest

    def file(self, what: str) -> ShardFile:
        """Its file with the suffix `what`, such as arrow or lengths.npy."""
        return next(file for file in self.files if file.name == f"{self.name}.{what}")

    def origin(self, record: int) -> tuple[str, int]:
        """File, and row in it from 0, of a record of this shard."""
        for source in self.sources:
            if record < source.rows:
                return source.file, source.first_row + record
            record -= source.rows
        raise IndexError(record)


class Shards(Sequence[ShardEntry]):
    """The entries of a set, made from columns when they are asked for: a set of 100 million rows has 25,000 of them.

    Attributes:
        columns: `rows`, `tokens` and `trained_tokens` of all shards; `files`: by suffix, `bytes` and `digest` of all shards;
            `source_files`: names; `sources`: of each shard, lists of place in `source_files`, first row and rows.
    """

    def __init__(self, columns: dict[str, Any]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["rows"])

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        columns, name = self.columns, shard_name(number % len(self))
        return ShardEntry.model_construct(
            name=name, rows=columns["rows"][number], tokens=columns["tokens"][number], trained_tokens=columns["trained_tokens"][number],
            files=[
                ShardFile.model_construct(name=f"{name}.{suffix}", bytes=file["bytes"][number], digest=file["digest"][number])
                for suffix, file in columns["files"].items()
            ],
            sources=[
                ShardSource.model_construct(file=columns["source_files"][file], first_row=first, rows=rows)
                for file, first, rows in columns["sources"][number]
            ],
        )

    @classmethod
    def of(cls, entries: list[ShardEntry]) -> Shards:
        """The columns of some entries, which are numbered in order."""
        assert [entry.name for entry in entries] == [shard_name(number) for number in range(len(entries))]
        names = list(dict.fromkeys(source.file for entry in entries for source in entry.sources))
        place = {name: number for number, name in enumerate(names)}
        files: dict[str, Any] = {}
        for entry in entries:
            for file in entry.files:
                column = files.setdefault(file.name.removeprefix(f"{entry.name}."), {"bytes": [], "digest": []})
                column["bytes"].append(file.bytes)
                column["digest"].append(file.digest)
        return cls({
            "rows": [entry.rows for entry in entries], "tokens": [entry.tokens for entry in entries],
            "trained_tokens": [entry.trained_tokens for entry in entries], "files": files, "source_files": names,
            "sources": [[[place[source.file], source.first_row, source.rows] for source in entry.sources] for entry in entries],
        })


def shard_name(number: int) -> str:
    """The name of a shard, known before anything is in it."""
    return f"shard-{number:05d}"


class _Known(BaseModel):
    """What is known of a set before its shards are made.

    Attributes:
        fingerprint: of source, tokenizer, template, options and tokenizer backend.
        vocab_size: largest token id that the tokenizer can give, plus one.
        template: how examples became text, as `Template.to_dict` wrote it.
        tokenizer: files of the folder `../tokenizer`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    fingerprint: str
    backend: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int
    template: dict[str, Any]
    tokenizer: list[ShardFile]


class ShardSetIndex(_Known):
    """A shard set.

    Attributes:
        columns: of `shards`.
        audit: counts by cause.
    """

    columns: dict[str, Any]
    audit: dict[str, Any]

    @property
    def shards(self) -> Shards:
        """The entries, in order."""
        return Shards(self.columns)


class Draft(_Known):
    """A set whose shards are being made, and how many there will be."""

    num_shards: int

    def index(self, entries: list[ShardEntry], audit: dict[str, Any]) -> ShardSetIndex:
        """The index, now that all shards are there."""
        return ShardSetIndex(**{key: value for key, value in self if key != "num_shards"}, columns=Shards.of(entries).columns, audit=audit)


def write_index(folder: Path, index: ShardSetIndex) -> None:
    """Write the index of a set, in one step, after its shards."""
    files.write_text(folder / NAME, json.dumps(index.model_dump(), ensure_ascii=False) + "\n")


def read_index(folder: Path) -> ShardSetIndex | None:
    """The index of a set, or None when there is none or it has another version."""
    path = folder / NAME
    return parse_index(path.read_bytes()) if path.is_file() else None


def parse_index(text: bytes | None) -> ShardSetIndex | None:
    """The index in `text`, or None when there is none or it has another version."""
    values = orjson.loads(text) if text is not None else {}
    return ShardSetIndex.model_validate(values) if values.get("version") == VERSION else None
