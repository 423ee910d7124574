"""A folder that answers: what its description takes along from the base model, and what may be asked of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.checkpoint.export import export
from harness.data.bpe import train_bpe
from harness.data.template import Template
from harness.generation import write_description
from harness.testing.models import tiny_config
from tests.checkpoint import fabricate

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(["What is it? It is a tree, a stone, a house."] * 4, vocab_size=300, folder=folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("ends", [None, 198, [0, 198]])
def test_an_export_is_sampled_as_its_base_model(tmp_path, tokenizer, ends):
    from transformers import GenerationConfig

    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    own = {"do_sample": True, "temperature": 0.7, "top_p": 0.8} | ({} if ends is None else {"eos_token_id": ends})
    (base / "generation_config.json").write_text(json.dumps(own))
    fabricate.save(run, 1)
    write_description(run / "model", tiny_config("gpt2"), tokenizer, Template("text", "text"), base=str(base))
    settings = GenerationConfig.from_pretrained(export(run, tmp_path / "out"))
    assert (settings.temperature, settings.top_p) == (0.7, 0.8)
    assert settings.eos_token_id == (0 if ends is None else [0, 198]), "the ends of training first, then those of the base model"


def test_a_base_model_without_generation_settings_gives_none(tmp_path, tokenizer):
    (tmp_path / "base").mkdir()
    write_description(tmp_path / "model", tiny_config("gpt2"), tokenizer, Template("text", "text"), base=str(tmp_path / "base"))
    write_description(tmp_path / "model", tiny_config("gpt2"), tokenizer, Template("text", "text"))
    assert (tmp_path / "model" / "config.json").is_file() and not (tmp_path / "model" / "generation_config.json").exists()
