"""`index.json`: what a set of token shards holds, readable without touching a shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from harness import files

VERSION = 1
NAME = "index.json"


class ShardEntry(BaseModel):
    """One shard: an Arrow file with a row a document, and its arrays of lengths and trained spans."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    rows: int
    tokens: int
    trained_tokens: int
    bytes: int
    digest: str


class ShardSetIndex(BaseModel):
    """A shard set.

    Attributes:
        fingerprint: of source, tokenizer, template, options and tokenizer backend.
        vocab_size: largest token id that the tokenizer can give, plus one.
        template: how examples became text, as `Template.to_dict` wrote it.
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
    shards: list[ShardEntry]
    audit: dict[str, Any]


def write_index(folder: Path, index: ShardSetIndex) -> None:
    """Write the index of a set, in one step, after its shards."""
    files.write_json(folder / NAME, index.model_dump())


def read_index(folder: Path) -> ShardSetIndex | None:
    """The index of a set, or None when there is none or it has another version."""
    path = folder / NAME
    if not path.is_file():
        return None
    values = files.read_json(path)
    return ShardSetIndex.model_validate(values) if values.get("version") == VERSION else None
