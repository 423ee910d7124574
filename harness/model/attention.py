"""Which attention a model computes with: the fastest that keeps the pieces of a row apart and is right for model, device and precision."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Refused
from harness.model.pieces import kernel, pieces_attention, pieces_mask

if TYPE_CHECKING:
    from transformers import PretrainedConfig

VARLEN = "harness_varlen"
"""What our attention is called in transformers' registry."""

PLAIN = frozenset({
    "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo", "olmo2", "olmoe", "phi", "phi3", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "starcoder2",
})
"""Model types whose attention was compared with the dense mask's: causal, and over all that came before unless a window says otherwise."""

_HALF = ("bf16", "fp16")
_MAX_HEAD_WIDTH = 256
_WINDOWS = ("sliding_window", "attention_chunk_size")
_ATTENTION_DROPOUTS = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")


def use_attention(
    config: PretrainedConfig, setting: str, *, device_type: str, precision: str, sequence_length: int, where: str = "model.attention"
) -> None:
    """Set in `config` what `choose_attention` chose, before the model is built.

    Raises:
        Refused: when the model or the device cannot do what was asked for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, pieces_attention)
    AttentionMaskInterface.register(VARLEN, pieces_mask)
    config._attn_implementation = choose_attention(
        setting, config, device_type=device_type, precision=precision, sequence_length=sequence_length, where=where
    )


def choose_attention(
    setting: str, config: PretrainedConfig, *, device_type: str, precision: str, sequence_length: int, where: str = "model.attention"
) -> str:
    """The name of an implementation in transformers that keeps the pieces of a row apart and is right for the model.

    Args:
        setting: `model.attention`: a name of transformers is taken as it is, `varlen` is ours, `auto` is on a GPU in 16 bit the first
            of ours, flex attention and sdpa that can do what the model needs, and elsewhere sdpa; eager where that is not known to fit.
        config: of the model, with its dropout.
        device_type: cuda or cpu.
        precision: fp32, bf16 or fp16.
        sequence_length: tokens of a row.
        where: the key and its origin.

    Raises:
        Refused: for `varlen`, where the mask is more than causal, attention has dropout, or the GPU has no such kernel.
    """
    if setting not in ("auto", "varlen"):
        return setting
    on_gpu = device_type == "cuda" and precision in _HALF
    obstacle = _obstacle(config, sequence_length) or (gpu_obstacle(config) if on_gpu else None)
    if setting == "varlen":
        if obstacle:
            raise Refused(f"Attention of variable length does not fit: {obstacle}.", where=where, remedy="Set model.attention=auto.")
        return VARLEN
    if on_gpu and obstacle is None:
        return VARLEN
    if on_gpu and flex_fits(config):
        return "flex_attention"
    return "sdpa" if getattr(_model_class(config), "_supports_sdpa", False) else "eager"


def _obstacle(config: PretrainedConfig, sequence_length: int) -> str | None:
    """Why the model asks for more than causal attention within pieces."""
    text = config.get_text_config()
    if config.model_type not in PLAIN:
        return f"it was not tried with a model of type {config.model_type!r}"
    for name in _WINDOWS:
        window = getattr(text, name, None)
        if window is not None and window < sequence_length:
            return f"{name}={window} is shorter than a row of {sequence_length} tokens"
    if (dropout := _attention_dropout(text)) > 0:
        return f"it has no dropout, and the model drops {dropout:g} of its attention (model.dropout=0 turns that off)"
    return None


def _attention_dropout(text: PretrainedConfig) -> float:
    return max(float(getattr(text, name, None) or 0.0) for name in _ATTENTION_DROPOUTS)


def layer_heads(config: PretrainedConfig) -> list[tuple[int, int]]:
    """Attention heads of each layer and their width, which some models have another of in some layers; 0 and 0 without heads."""
    text = config.get_text_config()
    return [_heads(layer) for layer in (text.per_layer_config if text.is_heterogeneous else [text] * text.num_hidden_layers)]


def _heads(layer: PretrainedConfig) -> tuple[int, int]:
    heads = getattr(layer, "num_attention_heads", None) or 0
    return heads, getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)


def gpu_obstacle(config: PretrainedConfig) -> str | None:
    """Why the kernel does not run on this GPU."""
    width = max(width for _, width in layer_heads(config))
    if kernel() is None:
        return f"torch {torch.__version__} has no kernel for it"
    if torch.version.cuda is None or torch.cuda.get_device_capability() < (8, 0):
        return "its kernel needs an NVIDIA GPU of compute capability 8.0 or more"
    if width % 8 or width > _MAX_HEAD_WIDTH:
        return f"its kernel takes heads of a multiple of 8 up to {_MAX_HEAD_WIDTH}, and these are {width} wide"
    return None


def flex_fits(config: PretrainedConfig) -> bool:
    """Whether flex attention, which is compiled when first used, can do what the model needs; it has no dropout."""
    compiles = find_spec("triton") is not None and any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "cc", "clang") if name)
    if not compiles or not getattr(_model_class(config), "_supports_flex_attn", False) or _attention_dropout(config.get_text_config()) > 0:
        return False
    width, *others = {width for _, width in layer_heads(config)}
    return not others and width >= 16 and width & (width - 1) == 0


def _model_class(config: PretrainedConfig) -> Any:
    """transformers' class of the model, or None for code that ships with it."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)] if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None
