"""Attention within the pieces of packed rows, without a mask that grows with the square of their length, behind transformers' interfaces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True, eq=False)
class Pieces:
    """What models of transformers carry to their layers in the place of a mask; computed once a forward pass.

    Attributes:
        bounds: int32 [pieces + 1] on the device: where each piece of the rows, laid end to end, begins, and the end of the last.
        lengths: of each piece, in tokens.
    """

    bounds: torch.Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest piece."""
        return max(self.lengths)

    @classmethod
    def between(cls, begins: torch.Tensor) -> Pieces:
        """From bool [rows, length], true where a piece begins.

        The kernel needs the number of pieces and the longest on the host, so this waits for the device once a forward pass. So did
        transformers just before, to see whether the rows are packed at all; there is little left to wait for.
        """
        starts = begins.flatten().cpu().nonzero().flatten()
        bounds = torch.cat([starts, starts.new_tensor([begins.numel()])])
        return cls(bounds.to(begins.device, torch.int32), tuple(bounds.diff().tolist()))


def pieces_mask(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: Callable[..., torch.Tensor], q_offset: Any = 0,
    attention_mask: torch.Tensor | None = None, local_size: int | None = None, allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None, use_vmap: bool = False, device: Any = "cpu", **more: Any,
) -> Pieces | torch.Tensor | None:
    """transformers' mask interface: pieces for packed rows; for all else, such as generation with a cache, what sdpa gets.

    A piece begins where a token does not see the one before it; that is asked of transformers' own mask function.

    Args:
        batch_size: rows.
        q_length: tokens of a row that ask.
        kv_length: tokens that are asked, those of a cache included.
        mask_function: (row, head, asking, asked) -> whether it sees it.
        q_offset: position of the first that asks.
        attention_mask: bool [rows, kv_length], where the rows are padded.
        local_size: of a sliding window or chunk; one that holds a whole row bounds nothing.
        allow_is_causal_skip: whether the mask is plainly causal, one piece a row.
        allow_is_bidirectional_skip: given only where the mask is not causal.
        use_vmap: whether a model added a pattern of its own.
        device: of the rows.
        more: what other masks need.
    """
    cached_or_padded = attention_mask is not None or q_length != kv_length or isinstance(q_offset, torch.Tensor) or q_offset != 0
    unusual = use_vmap or allow_is_bidirectional_skip is not None or (local_size is not None and local_size < kv_length)
    if allow_is_causal_skip or cached_or_padded or unusual:
        from transformers.masking_utils import sdpa_mask

        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset=q_offset, mask_function=mask_function, attention_mask=attention_mask,
            local_size=local_size, allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip), use_vmap=use_vmap, device=device, **more,
        )
    rows, asking = torch.arange(batch_size, device=device)[:, None], torch.arange(1, q_length, device=device)[None]
    begins = torch.ones((batch_size, q_length), dtype=torch.bool, device=device)
    begins[:, 1:] = ~mask_function(rows, torch.zeros_like(rows), asking, asking - 1)
    return Pieces.between(begins)


def pieces_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, *, dropout: float = 0.0,
    scaling: float | None = None, **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: within the pieces, or sdpa where the mask is none.

    Args:
        module: the attention of a layer.
        query: [rows, heads, length, width].
        key: [rows, key heads, length, width].
        value: as `key`.
        attention_mask: what `pieces_mask` gave.
        dropout: of the weights; 0 with pieces.
        scaling: of the scores.
        more: what other implementations need.

    Returns:
        [rows, length, heads, width], and no weights.
    """
    if not isinstance(attention_mask, Pieces):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    assert dropout == 0.0, "harness.model.attention refuses it"
    rows, heads, length, width = query.shape
    flat = (tensor.transpose(1, 2).reshape(rows * length, -1, width) for tensor in (query, key, value))
    return _attend(*flat, attention_mask, scaling).view(rows, length, heads, width), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Pieces, scale: float | None) -> torch.Tensor:
    """Causal attention within each piece: one kernel for all in 16 bit on a GPU, else one call of sdpa for each.

    Args:
        query: [tokens, heads, width].
        key: [tokens, key heads, width], where the key heads divide the heads.
        value: as `key`.
        pieces: of the tokens.
        scale: of the scores.

    Returns:
        as `query`.
    """
    fused = kernel() if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) else None
    if fused is None:
        return _by_piece(query, key, value, pieces, scale)
    return fused(query, key, value, pieces.bounds, pieces.longest, scale)


def _by_piece(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Pieces, scale: float | None) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    parts = zip(*(tensor.transpose(0, 1).split(pieces.lengths, dim=1) for tensor in (query, key, value)), strict=True)
    answers = [scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=grouped)[0] for q, k, v in parts]
    return torch.cat(answers, dim=1).transpose(0, 1).contiguous()


@cache
def kernel() -> Callable[..., torch.Tensor] | None:
    """torch's attention of variable length, on a GPU in 16 bit; None where this torch has none that takes a scale (2.10 and older).

    Returns:
        (query [tokens, heads, width], key, value, bounds of the pieces, tokens of the longest, scale) -> as the query; causal.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float | None) -> torch.Tensor:
        grouped: dict[str, bool] = {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                grouped["enable_gqa"] = True
            else:  # torch 2.11
                key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
        return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0), **grouped)

    return attend
