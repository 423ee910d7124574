"""Where the parts of a Hugging Face causal language model are, for each family that can be cut into pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.errors import Refused

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Family:
    """One table; the modules themselves, their masks and their rotary embeddings are transformers' own.

    Attributes:
        base: the decoder in the causal language model; the head is the model's own output embedding.
        blocks: the list of blocks in the decoder.
        norm: the decoder's last norm.
        token_embedding: of the decoder.
        position_embedding: of the decoder, added to the tokens' where there is one.
        dropout: of the decoder, applied to the embedded tokens where there is one.
        rotary: the decoder's module of rotary embeddings, which holds buffers only, where there is one.
        older_names: beginnings of tensor names in older files -> what they are called now.
    """

    base: str
    blocks: str
    norm: str
    token_embedding: str
    position_embedding: str | None = None
    dropout: str | None = None
    rotary: str | None = None
    older_names: dict[str, str] = field(default_factory=dict)

    @property
    def embeddings(self) -> list[str]:
        """What only the first stage runs, in the decoder."""
        return [name for name in (self.token_embedding, self.position_embedding, self.dropout) if name]


_LLAMA = Family(base="model", blocks="layers", norm="norm", token_embedding="embed_tokens", rotary="rotary_emb")

FAMILIES: dict[str, Family] = {
    "gpt2": Family(base="transformer", blocks="h", norm="ln_f", token_embedding="wte", position_embedding="wpe", dropout="drop"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": Family(
        base="gpt_neox", blocks="layers", norm="final_layer_norm", token_embedding="embed_in", dropout="emb_dropout", rotary="rotary_emb",
        older_names={"embed_out.": "lm_head."},
    ),
}


def family_of(config: PretrainedConfig, *, where: str = "engine.pipeline_stages") -> Family:
    """The table of a model's family.

    Raises:
        Refused: when there is none.
    """
    if config.model_type not in FAMILIES:
        raise Refused(
            f"A model of type {config.model_type!r} cannot be cut into pipeline stages.", where=where,
            remedy=f"Set engine.pipeline_stages=1, or take a model of one of these types: {', '.join(sorted(FAMILIES))}.",
        )
    return FAMILIES[config.model_type]
