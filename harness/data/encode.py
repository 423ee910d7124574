"""One shard: a range of examples tokenised and written as an Arrow file with its arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import files
from harness.data.template import Template, start_ids
from harness.formats.index import ShardEntry

BATCH = 256


@dataclass(frozen=True)
class ShardJob:
    """What one process needs to make one shard.

    Attributes:
        name: such as shard-00000.
        folder: of the set.
        examples: in the order of the source.
        tokenizer: folder of the tokenizer.
        template: how examples become text.
        wide: int32 instead of uint16 tokens.
        fingerprint: of the set; a finished shard of the same fingerprint is kept.
    """

    name: str
    folder: Path
    examples: list[Any]
    tokenizer: Path
    template: Template
    wide: bool
    fingerprint: str


def make_shard(job: ShardJob) -> dict[str, Any]:
    """Write the shard, or find it finished; returns its part of the index and audit."""
    part = job.folder / f"{job.name}.json"
    if part.is_file():
        done = files.read_json(part)
        if done["fingerprint"] == job.fingerprint and files.digest_file(job.folder / f"{job.name}.arrow") == done["entry"]["digest"]:
            return done
    documents, spans, dropped = _encode(job)
    entry = _write(job, documents, spans)
    result = {"fingerprint": job.fingerprint, "entry": entry.model_dump(), "dropped": dict(dropped)}
    files.write_json(part, result)
    return result


def _encode(job: ShardJob) -> tuple[list[np.ndarray], list[list[tuple[int, int]]], Counter[str]]:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(job.tokenizer)
    backend = Tokenizer.from_file(str(job.tokenizer / "tokenizer.json"))
    start, end = start_ids(fast) if not job.template.chat else [], fast.eos_token_id
    dtype = np.int32 if job.wide else np.uint16
    documents: list[np.ndarray] = []
    spans: list[list[tuple[int, int]]] = []
    dropped: Counter[str] = Counter()
    for first in range(0, len(job.examples), BATCH):
        batch = []
        for example in job.examples[first : first + BATCH]:
            try:
                batch.append(job.template.segments(example, fast))
            except Exception:  # a chat template may refuse a conversation
                dropped["refused by the chat template"] += 1
        texts = [text for segments in batch for text, _ in segments]
        encoded = iter(backend.encode_batch(texts, add_special_tokens=False))
        for segments in batch:
            ids, trained = assemble([(next(encoded).ids, train) for _, train in segments], start=start, end=end)
            if not any(stop > max(begin, 1) for begin, stop in trained):
                dropped["no trained token"] += 1
                continue
            documents.append(np.asarray(ids, dtype=dtype))
            spans.append(trained)
    return documents, spans, dropped


def assemble(parts: list[tuple[list[int], bool]], *, start: list[int], end: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Join tokenised segments; each trained one is closed by the end-of-text token unless it already ends with it.

    Returns:
        (token ids, trained spans as (start, stop)).
    """
    ids, spans = list(start), []
    for tokens, trained in parts:
        begin = len(ids)
        ids += tokens
        if trained:
            if end not in tokens[-2:]:
                ids.append(end)
            if tokens:
                spans.append((begin, len(ids)))
    return ids, spans


def _write(job: ShardJob, documents: list[np.ndarray], spans: list[list[tuple[int, int]]]) -> ShardEntry:
    import pyarrow as pa

    value = pa.int32() if job.wide else pa.uint16()
    lengths = np.asarray([len(d) for d in documents], dtype=np.int32)
    flat = np.concatenate(documents) if documents else np.zeros(0, np.int32 if job.wide else np.uint16)
    numbered = np.asarray([(i, a, b) for i, row in enumerate(spans) for a, b in row], dtype=np.int32).reshape(-1, 3)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    counts = np.bincount(numbered[:, 0], minlength=len(documents)) if len(numbered) else np.zeros(len(documents), int)
    span_offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)

    def listed(values: np.ndarray, kind: pa.DataType, at: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(at, pa.int32()), pa.array(values, kind))

    table = {
        "input_ids": listed(flat, value, offsets),
        "trained_starts": listed(numbered[:, 1], pa.int32(), span_offsets),
        "trained_stops": listed(numbered[:, 2], pa.int32(), span_offsets),
    }
    path = job.folder / f"{job.name}.arrow"
    aside = path.with_suffix(".tmp")
    batch = pa.RecordBatch.from_pydict(table)
    with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    files.sync_file(aside)
    aside.replace(path)
    _save_array(job.folder / f"{job.name}.lengths.npy", lengths)
    _save_array(job.folder / f"{job.name}.spans.npy", numbered)
    trained = int((numbered[:, 2] - np.maximum(numbered[:, 1], 1)).sum()) if len(numbered) else 0
    return ShardEntry(name=job.name, rows=len(documents), tokens=int(lengths.sum()), trained_tokens=trained,
                      bytes=path.stat().st_size, digest=files.digest_file(path))


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as stream:
        np.save(stream, array)
