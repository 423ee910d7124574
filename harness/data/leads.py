"""What stands before a segment while it is tokenised, where a tokenizer begins every text with a space: amid a document a segment gets none."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

VERSION = 1
SPACE = "▁"
SENTINELS = ("☺", "\n", "|")
IN_NO_VOCABULARY = "\U000f1234"
OPENINGS = re.compile(rb'"normalizer":.*?"post_processor":', re.DOTALL)


class Leads:
    """The leads of one tokenizer, and their tokens.

    A segment that follows an added token, such as the end of a turn, is tokenised behind that token; any other behind a character whose tokens
    stand apart from those that follow it. The tokens of the lead are cut off again.

    Args:
        tokenizer: of the library `tokenizers`.
    """

    def __init__(self, tokenizer: Any):
        self.tokens = lru_cache(maxsize=1024)(lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
        self._added = tuple(token.content for token in tokenizer.get_added_tokens_decoder().values())
        self._sentinel = next((text for text in SENTINELS if self._stands_apart(text, tokenizer)), "")

    @classmethod
    def of(cls, tokenizer: Any) -> Leads | None:
        """Those that a tokenizer needs; None where a text begins as it would go on."""
        first = tokenizer.encode("a", add_special_tokens=False).tokens[:1]
        return cls(tokenizer) if first and first[0].startswith(SPACE) else None

    def before(self, text: str) -> list[str]:
        """What a segment after `text` may be tokenised behind, the best first; the last, nothing, always fits."""
        bare = text.rstrip()
        ending = max((token for token in self._added if bare.endswith(token)), key=len) if bare.endswith(self._added) else ""
        return [ending + text[len(bare) :], self._sentinel, ""] if ending else [self._sentinel, ""] if text else [""]

    def _stands_apart(self, text: str, tokenizer: Any) -> bool:
        """Whether it has tokens of its own, which are still there when a letter follows."""
        known, followed = self.tokens(text), tokenizer.encode(f"{text}a", add_special_tokens=False)
        return known != self.tokens(IN_NO_VOCABULARY) and followed.ids[: len(known)] == known and not followed.tokens[-1].startswith(SPACE)


def may_be_needed(folder: Path) -> bool:
    """Whether the tokenizer in a folder may begin texts with a space, as its file says; reading that takes no time."""
    path = folder / "tokenizer.json"
    found = OPENINGS.search(path.read_bytes()) if path.is_file() else None
    return bool(found) and SPACE.encode() in found.group()
