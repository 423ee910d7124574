"""Any Hugging Face folder answers, also one whose tokenizer has no token that ends a text."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from harness.errors import Refused
from harness.generation import Generator
from harness.testing.models import tiny_config


def test_a_folder_without_an_end(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    config = tiny_config("llama", vocabulary=3)
    config.eos_token_id = config.bos_token_id = None
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    generator = Generator.load(tmp_path)
    assert set(generator.answer("a b", max_new_tokens=4).split()) <= {"a", "b"}
    with pytest.raises(Refused, match="no token"):
        generator.answer("", max_new_tokens=4)
