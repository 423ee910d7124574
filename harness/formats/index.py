"""`index.json`: what a set of token shards holds, readable without touching a shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness import files

VERSION = 2
NAME = "index.json"


class ShardFile(BaseModel):
    """A file of a shard, as it must arrive."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    bytes: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> ShardFile:
        """The file as it is."""
        return cls(name=path.name, bytes=path.stat().st_size, digest=files.digest_file(path))


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


class ShardSetIndex(BaseModel):
    """A shard set.

    Attributes:
        fingerprint: of source, tokenizer, template, options and tokenizer backend.
        vocab_size: largest token id that the tokenizer can give, plus one.
        template: how examples became text, as `Template.to_dict` wrote it.
        tokenizer: files of the folder `../tokenizer`.
        audit: counts by cause.
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
    shards: list[ShardEntry]
    audit: dict[str, Any]


def write_index(folder: Path, index: ShardSetIndex) -> None:
    """Write the index of a set, in one step, after its shards."""
    files.write_json(folder / NAME, index.model_dump())


def read_index(folder: Path) -> ShardSetIndex | None:
    """The index of a set, or None when there is none or it has another version."""
    path = folder / NAME
    return parse_index(path.read_bytes()) if path.is_file() else None


def parse_index(text: bytes | None) -> ShardSetIndex | None:
    """The index in `text`, or None when there is none or it has another version."""
    values = json.loads(text) if text is not None else {}
    return ShardSetIndex.model_validate(values) if values.get("version") == VERSION else None
