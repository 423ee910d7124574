"""A folder that answers: what its description takes along from the base model, and what may be asked of it."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest

from harness.checkpoint.export import export
from harness.cli.main import main
from harness.data.bpe import train_bpe
from harness.data.template import Template
from harness.errors import Refused
from harness.generation import Generator, write_description
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


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A tiny model that was trained on pairs of prompt and completion."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(tiny_config("gpt2", initializer_range=0.5)).save_pretrained(tmp_path / "folder")
    write_description(tmp_path / "folder", tiny_config("gpt2"), tokenizer, Template("prompt_completion", "pairs", "{prompt}\n", "{completion}"))
    return tmp_path / "folder"


def _generate(capsys, *words: object) -> tuple[int, str, str]:
    code = main(["generate", *map(str, words), "--max-new-tokens", "4"])
    return code, *capsys.readouterr()


def test_prompts_come_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n\nA tree?\r\n"))
    code, out, _ = _generate(capsys, folder, "--prompt", "-")
    assert code == 0 and [line for line in out.splitlines() if line.startswith("> ")] == ["> What is it?", "> A tree?"], out
    one = _generate(capsys, folder, "--prompt", "A tree?")[1]
    assert out.endswith(f"> A tree?\n{one}") and one.strip()


def test_an_empty_answer_is_told(folder, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: torch.zeros_like(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})  # all logits are equal: the first token is taken, which ends the text
    assert _generate(capsys, folder, "--prompt", "A tree?")[:2] == (0, "(empty)\n")


def test_top_p_leaves_the_likeliest_tokens(folder, capsys):
    greedy = _generate(capsys, folder, "--prompt", "A tree?")[1]
    drawn = [_generate(capsys, folder, "--prompt", "A tree?", "--temperature", "3", "--seed", seed)[1] for seed in range(3)]
    assert set(drawn) != {greedy}
    least = [_generate(capsys, folder, "--prompt", "A tree?", "--temperature", "3", "--top-p", "1e-6", "--seed", seed)[1] for seed in range(3)]
    assert set(least) == {greedy}
    for words in (["--top-p", "0.9"], ["--top-p", "1.5", "--temperature", "1"]):
        code, _, told = _generate(capsys, folder, "--prompt", "A tree?", *words)
        assert code == 2 and "--temperature above 0" in told


def test_chat_needs_a_chat_template(folder, capsys, tokenizer):
    code, _, told = _generate(capsys, folder, "--prompt", "A tree?", "--chat")
    assert code == 2 and "has no chat template" in told and "Leave --chat out" in told
    write_description(folder, tiny_config("gpt2"), tokenizer, Template.for_messages(tokenizer))
    assert _generate(capsys, folder, "--prompt", "A tree?", "--chat")[0] == 0, "it was trained on turns"
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    write_description(folder, tiny_config("gpt2"), chatty, Template("text", "text"))
    assert _generate(capsys, folder, "--prompt", "A tree?", "--chat")[0] == 0


def test_the_folder_of_a_run_is_refused_with_the_command_that_exports_it(tmp_path, capsys):
    fabricate.save(tmp_path / "my run", 1)
    code, _, told = _generate(capsys, tmp_path / "my run", "--prompt", "A tree?")
    assert code == 2 and f"harness export '{tmp_path / 'my run'}' --to FOLDER" in told, told
    assert "holds no model" in _generate(capsys, tmp_path, "--prompt", "A tree?")[2]


def test_a_folder_without_an_end(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

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
