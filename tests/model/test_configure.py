"""`model.dropout` sets every dropout of a configuration, wherever it stands, and is refused where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from harness.config.load import Loaded
from harness.config.schema import RunFile
from harness.errors import Refused
from harness.model.configure import load_config


def configured(kind: str, dropout: float) -> Any:
    return load_config(Loaded(RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}}, "model": {"architecture": {"model_type": kind}, "dropout": dropout},
        "train": {"steps": 1, "global_batch_rows": 1},
    }), {}))


@pytest.mark.parametrize("kind, names", [
    ("gpt2", ["attn_pdrop", "embd_pdrop", "resid_pdrop"]), ("llama", ["attention_dropout"]), ("seed_oss", ["attention_dropout", "residual_dropout"]),
    ("starcoder2", ["attention_dropout", "residual_dropout", "embedding_dropout"]), ("gpt_neo", ["attention_dropout", "resid_dropout", "embed_dropout"]),
    ("qwen3_5", ["text_config.attention_dropout"]),
])
def test_every_dropout_is_set(kind, names):
    for share in (0.0, 0.25):
        config = configured(kind, share)
        for name in names:
            holder, _, field = name.rpartition(".")
            assert getattr(getattr(config, holder) if holder else config, field) == share, name


def test_a_dropout_within_the_configuration_of_attention():
    config = configured("mpt", 0.0)
    assert (config.attn_config.attn_pdrop, config.emb_pdrop, config.resid_pdrop) == (0, 0, 0)
    with pytest.raises(Refused, match="dropout of the model cannot be set.*attn_pdrop"):
        configured("mpt", 0.25)


def test_a_model_without_dropout():
    assert configured("mamba", 0.0).model_type == "mamba"
    with pytest.raises(Refused, match="'mamba' has no dropout"):
        configured("mamba", 0.1)
