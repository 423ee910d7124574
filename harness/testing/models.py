"""Tiny models of several architectures."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = ("gpt2", "llama", "qwen2")
VOCABULARY = 320


def tiny_architecture(kind: str, *, layers: int = 2, width: int = 32, vocabulary: int = VOCABULARY, dropout: float = 0.0, tied: bool | None = None, **more: Any) -> dict[str, Any]:
    """The section `model.architecture` of a tiny model; GPT-2 is tied and the others are not unless told otherwise; `more` are its own fields."""
    if kind == "gpt2":
        fields: dict[str, Any] = {"n_layer": layers, "n_embd": width, "n_head": 4, "n_positions": 256, "resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    else:
        fields = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": 4, "num_key_value_heads": 2,
                  "intermediate_size": 2 * width, "max_position_embeddings": 256, "attention_dropout": dropout}
        if kind == "qwen3":
            fields["head_dim"] = width // 4
        if kind == "gpt_neox":
            del fields["num_key_value_heads"]
            fields["hidden_dropout"] = dropout
    fields["tie_word_embeddings"] = (kind == "gpt2") if tied is None else tied
    return {"model_type": kind, "vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0, **fields, **more}


def tiny_config(kind: str, **options: Any) -> Any:
    """Its transformers configuration."""
    from transformers import CONFIG_MAPPING

    fields = tiny_architecture(kind, **options)
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    config.use_cache = False
    return config
