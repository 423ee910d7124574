"""Special tokens in what rows say themselves: a tokenizer reads them as the control tokens that they name."""

from __future__ import annotations

import re

import numpy as np

from harness.data.backends import Backend
from harness.data.examples import Conversation
from harness.data.template import Template

OWN = "special tokens in their own text"


class Specials:
    """The special tokens of a tokenizer, looked for in examples and in their tokens.

    Args:
        backend: of the tokenizer.
        template: how examples become text; what it writes itself does not count.
        ends: tokens that end an answer, which may stand at the end of what is trained.
    """

    def __init__(self, backend: Backend, template: Template, ends: list[int]):
        ids = np.asarray(sorted(backend.special), np.uint32)
        self._ranges = [(run[0], run[-1] - run[0]) for run in np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1) if len(run)]
        self._any, self._ends = re.compile("|".join(map(re.escape, sorted(backend.special.values(), key=len, reverse=True))) or r"(?!)"), ends
        blank = {"text": "", "prompt_completion": ("", "")}.get(template.kind)
        segments = template.segments(blank, None) if blank is not None else [("", False)]
        self._written = self._counts(*backend.encode([text for text, _ in segments]), np.asarray([trained for _, trained in segments]))

    def in_conversation(self, talk: Conversation) -> bool:
        """Whether there is one in any text of a conversation."""
        return self._any.search(talk.as_json()) is not None

    def in_segments(self, ids: np.ndarray, offsets: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """The numbers of the segments with more than the template writes.

        Args:
            ids: uint32 [tokens].
            offsets: int64 [segments + 1]: where each begins.
            trained: bool [segments].
        """
        return np.flatnonzero(self._counts(ids, offsets, trained) > np.resize(self._written, len(trained)))

    def _counts(self, ids: np.ndarray, offsets: np.ndarray, trained: np.ndarray) -> np.ndarray:
        """int64 [segments]: special tokens of each, without the one that ends what is trained."""
        places = np.concatenate([np.flatnonzero(ids - first <= size) for first, size in self._ranges] or [np.empty(0, np.int64)])
        segments = np.searchsorted(offsets, places, side="right") - 1
        closes = trained[segments] & np.isin(ids[places], self._ends) & (places == offsets[segments + 1] - 1)
        return np.bincount(segments[~closes], minlength=len(trained))
