"""Documents stay apart: in a packed row every piece has the logits that it has alone, whatever computes attention and however the model is cut."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.model.attention import use_attention
from harness.model.build import build
from harness.model.stage import build_stage
from harness.testing.models import ARCHITECTURES, VOCABULARY, tiny_config

LENGTH, TOLERANCE = 40, 1e-5
"""The tolerance is of the largest logit."""
CUTS = st.lists(st.sets(st.integers(1, LENGTH - 1), max_size=12), min_size=1, max_size=3)
"""For each row where a new piece begins; the last piece is padding."""


def config_of(kind: str, attention: str, **options: Any) -> Any:
    """A tiny configuration whose weights are large enough for attention to matter."""
    config = tiny_config(kind, **{"initializer_range": 0.3, **options})
    use_attention(config, attention, device_type="cpu", precision="fp32", sequence_length=LENGTH)
    return config


@cache
def whole(kind: str, attention: str) -> Any:
    """(ids, positions) -> logits of the whole model."""
    model = build(config_of(kind, attention), path=None, precision="fp32", seed=0, zero3=False).eval()
    return lambda ids, positions: model(input_ids=ids, position_ids=positions, use_cache=False).logits


@cache
def staged(kind: str, attention: str) -> Any:
    """The same through two pipeline stages."""
    config = config_of(kind, attention)
    first, last = (build_stage(config, (0, 1, 2), stage, weights=None, precision="fp32", seed=0).eval() for stage in (0, 1))
    return lambda ids, positions: last(first((ids, positions)))


def packed(cuts: list[set[int]], *, length: int = LENGTH, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
    """Rows of pieces.

    Returns:
        ids, positions [rows, length], and (row, begin, end) of each piece.
    """
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, (len(cuts), length))
    positions, pieces = np.zeros_like(ids), []
    for row, inner in enumerate(cuts):
        for begin, end in pairwise([0, *sorted(inner), length]):
            positions[row, begin:end] = np.arange(end - begin)
            pieces.append((row, begin, end))
        ids[row, begin:] = 0
    return torch.as_tensor(ids), torch.as_tensor(positions), pieces


@torch.no_grad()
def difference(logits_of: Any, ids: torch.Tensor, positions: torch.Tensor, pieces: list[tuple[int, int, int]]) -> float:
    """Largest between the pieces in their rows and each alone, as a share of the largest logit."""
    together = logits_of(ids, positions)
    alone = ((row, begin, end, logits_of(ids[row : row + 1, begin:end], torch.arange(end - begin)[None])) for row, begin, end in pieces)
    return max((together[row, begin:end] - logits[0]).abs().max().item() for row, begin, end, logits in alone) / together.abs().max().item()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@settings(max_examples=12, deadline=None)
@given(cuts=CUTS)
def test_a_piece_has_the_logits_that_it_has_alone(kind, attention, cuts):
    assert difference(whole(kind, attention), *packed(cuts)) <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@settings(max_examples=6, deadline=None)
@given(cuts=CUTS)
def test_also_through_pipeline_stages(kind, attention, cuts):
    ids, positions, pieces = packed(cuts)
    assert difference(staged(kind, attention), ids, positions, pieces) <= TOLERANCE
    with torch.no_grad():
        one, two = whole(kind, attention)(ids, positions), staged(kind, attention)(ids, positions)
    assert (one - two).abs().max() <= TOLERANCE * one.abs().max()


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("logits_of", [whole, staged])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_pieces_of_one_token(kind, logits_of, attention):
    assert difference(logits_of(kind, attention), *packed([{1, 2, 3, 20, 21, 39}, set(range(1, LENGTH)), set()])) <= TOLERANCE


@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen"])
@pytest.mark.parametrize("logits_of", [whole, staged])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_positions_that_do_not_restart_are_noticed(kind, logits_of, attention):
    ids, positions, pieces = packed([{7, 20}, {31}])
    assert difference(logits_of(kind, attention), ids, torch.arange(LENGTH).expand_as(positions), pieces) > 1000 * TOLERANCE
