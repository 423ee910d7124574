"""Text to token ids in bulk: fastokens where it gives what `tokenizers` gives, which is asked about a sample of every shard."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from harness.data.leads import Leads

FAST, ORACLE = "fastokens", "tokenizers"
SAMPLE_TEXTS, SAMPLE_CHARACTERS = 8, 256
PROBES = (
    "", " ", "  two  spaces ", "\n\n\t tabs\r\nand returns\r", "It's we'll I'M they'd",
    "1234567890 3.14159 1,000,000 ２０２４ ½", "naïve café Ångström ﬁ ǅ e\u0301 İ",
    "Привет, мир! Γειά σου שלום עולם مرحبا بالعالم नमस्ते", "你好，世界。こんにちは 안녕하세요", "👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0\ufeff\x00\x7f\u2028",
    "def f(x):\n    return x ** 2  # ok\n", "https://example.org/a?b=c&d=%20 user@example.org", "a" * 300, "— “quoted” … ‘single’",
)
"""What two tokenizers may read differently: spaces, marks, digits, scripts, controls."""


class Differs(Exception):
    """The fast backend gave other ids than `tokenizers`; the text is the message."""


class Backend:
    """A tokenizer without truncation, padding and special tokens.

    Args:
        folder: that holds tokenizer.json.
        name: fastokens or tokenizers.

    Attributes:
        leads: for tokenizers that begin every text with a space; else None.
        special: the text of each special token by its id.
    """

    def __init__(self, folder: Path, name: str):
        self.name, self._oracle = name, _oracle(folder)
        self._fast = _fast(folder) if name == FAST else None
        self.leads = Leads.of(self._oracle)
        self.special = {number: token.content for number, token in self._oracle.get_added_tokens_decoder().items() if token.special}

    def encode_amid(self, texts: Sequence[str], before: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise segments as they stand in their documents, where the tokenizer needs leads for that.

        Args:
            texts: the segments.
            before: the segment before each one in its document; empty before the first.

        Returns:
            as `encode`.

        Raises:
            Differs: when a sample shows other ids than the oracle's.
        """
        assert self.leads is not None
        found: list[np.ndarray] = [np.empty(0, np.uint32)] * len(texts)
        leads, left = [self.leads.before(text) for text in before], list(range(len(texts)))
        while left:
            ids, offsets = self.encode([leads[place][0] + texts[place] for place in left])
            again = []
            for place, (start, stop) in zip(left, pairwise(offsets.tolist()), strict=True):
                lead = self.leads.tokens(leads[place].pop(0))
                found[place] = ids[start + len(lead) : stop]
                if ids[start:stop][: len(lead)].tolist() != lead:
                    again.append(place)
            left = again
        return np.concatenate([*found, np.empty(0, np.uint32)]), np.cumsum([0, *map(len, found)])

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise each text apart.

        Returns:
            (uint32 [tokens], int64 [texts + 1]: where each text's tokens begin).

        Raises:
            Differs: when a sample shows other ids than the oracle's.
        """
        if self._fast is None:
            ids = [encoding.ids for encoding in self._oracle.encode_batch_fast(texts, add_special_tokens=False)]
            offsets = np.concatenate([[0], np.cumsum([len(one) for one in ids], dtype=np.int64)])
            return np.fromiter((token for one in ids for token in one), np.uint32, count=int(offsets[-1])), offsets
        self.check([texts[place][:SAMPLE_CHARACTERS] for place in np.linspace(0, len(texts) - 1, min(SAMPLE_TEXTS, len(texts)), dtype=int)])
        return _encode_fast(self._fast, texts)

    def check(self, texts: Sequence[str]) -> None:
        """Compare both on these texts.

        Raises:
            Differs: with the first text that they read differently.
        """
        ids, offsets = _encode_fast(self._fast, texts)
        for place, encoding in enumerate(self._oracle.encode_batch_fast(list(texts), add_special_tokens=False)):
            if not np.array_equal(ids[offsets[place] : offsets[place + 1]], encoding.ids):
                raise Differs(texts[place])


@lru_cache(maxsize=1)
def open_backend(folder: Path, name: str) -> Backend:
    """A backend; loading one takes longer than a small shard."""
    return Backend(folder, name)


def warm(folder: Path) -> None:
    """Open the fast backend in this process, where that can be done, before somebody waits for it."""
    with suppress(Exception):  # `choose` finds the same, and decides what follows from it
        open_backend(folder, FAST)


def choose(folder: Path) -> str:
    """The fast backend if it reads this tokenizer and agrees with the oracle on hard text and on every added token."""
    try:
        open_backend.cache_clear()
        backend = open_backend(folder, FAST)
        added = [token.content for token in backend._oracle.get_added_tokens_decoder().values()]
        backend.check([*PROBES, *(f"a {token} b{token}c\n{token}" for token in added)])
    except Exception:  # not installed, a kind of tokenizer that it lacks, or Differs
        return ORACLE
    return FAST


def _oracle(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return _plain(Tokenizer.from_file(str(folder / "tokenizer.json")))


def _fast(folder: Path) -> Any:
    from fastokens import Tokenizer

    return _plain(Tokenizer.from_file(str(folder / "tokenizer.json")))


def _plain(tokenizer: Any) -> Any:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encode_fast(tokenizer: Any, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    ids, offsets = tokenizer.encode_batch_flat(list(texts))
    return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.uint64).astype(np.int64)
