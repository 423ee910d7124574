"""An export is the masters in a folder that plain transformers loads."""

from __future__ import annotations

import json

import pytest
import torch
from tests.checkpoint.fabricate import save_as_ranks
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from harness.checkpoint.export import export
from harness.errors import Refused
from harness.formats.manifest import KINDS
from harness.formats.tensor_file import TensorEntry, encode_header

CONFIGS = {
    "gpt2": lambda tied: GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tied
    ),
    "llama": lambda tied: LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    ),
}


def _run(run_dir, *, architecture="gpt2", tied=True, ranks=2, dtype="float32", step=1, seed=0, best_step=0):
    """A run's folder with one checkpoint of a fresh model; gives the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[architecture](tied)).eval()
    masters = {name: parameter.detach().reshape(-1).clone() for name, parameter in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    aliases = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in shapes]
    entries = {name: {"shape": shape, "dtype": dtype} for name, shape in shapes.items()}
    input_name = next(
        name for name, parameter in model.named_parameters() if parameter is model.get_input_embeddings().weight
    )
    tensors = {kind: masters for kind in KINDS}
    others = {"parameters": entries, "tied": dict.fromkeys(aliases, input_name), "state": {"best_step": best_step}}
    save_as_ranks(run_dir, tensors, ranks=ranks, step=step, shapes=shapes, **others)
    model.config.save_pretrained(run_dir / "model")
    (run_dir / "model" / "harness.json").write_text("{}")
    return model


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 3000])
def test_export_loads_and_gives_the_same_logits(tmp_path, architecture, tied, shard_bytes):
    model = _run(tmp_path / "run", architecture=architecture, tied=tied)
    assert export(tmp_path / "run", tmp_path / "out", shard_bytes=shard_bytes) == tmp_path / "out"
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert loaded.dtype == torch.float32
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied
    assert (tmp_path / "out" / "harness.json").is_file()
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file() == (shard_bytes == 3000)


@pytest.mark.parametrize("ranks", [1, 3])
def test_bf16_is_the_rounded_master(tmp_path, ranks):
    model = _run(tmp_path / "run", ranks=ranks)
    export(tmp_path / "run" / "checkpoints" / "step-000001", tmp_path / "out", dtype="bfloat16")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            assert torch.equal(file.get_tensor(name), parameter.detach().to(torch.bfloat16))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_trained_type_is_the_default(tmp_path):
    _run(tmp_path / "run", dtype="bfloat16")
    export(tmp_path / "run", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_large_tensors_are_streamed_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("harness.checkpoint.export.CHUNK_ELEMENTS", 37)
    model = _run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert all(torch.equal(file.get_tensor(name), parameter) for name, parameter in model.named_parameters())


def test_header_is_padded_with_spaces_to_eight_bytes():
    for width in range(1, 9):
        header = encode_header([TensorEntry("w" * width, "F32", (2,))])
        length = int.from_bytes(header[:8], "little")
        assert len(header) == 8 + length and length % 8 == 0
        assert header[8:].rstrip(b" ").endswith(b"}}") and json.loads(header[8:])["w" * width]["data_offsets"] == [0, 8]


def _flip_bit(run_dir):
    path = sorted((run_dir / "checkpoints" / "step-000001").glob("*.safetensors"))[0]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_is_refused_and_nothing_is_left(tmp_path):
    _run(tmp_path / "run")
    _flip_bit(tmp_path / "run")
    for source in ("run", "run/checkpoints/step-000001"):
        with pytest.raises(Refused, match="was changed since"):
            export(tmp_path / source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_refusals_name_the_place(tmp_path):
    with pytest.raises(Refused, match="no checkpoint here"):
        export(tmp_path, tmp_path / "out")
    _run(tmp_path / "run")
    with pytest.raises(Refused, match="no checkpoint 'step-000099'"):
        export(tmp_path / "run", tmp_path / "out", checkpoint="step-000099")
    with pytest.raises(Refused, match="kept no best"):
        export(tmp_path / "run", tmp_path / "out", checkpoint="best")
    with pytest.raises(Refused, match="cannot be exported as 'int8'"):
        export(tmp_path / "run", tmp_path / "out", dtype="int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(Refused, match="not empty"):
            export(tmp_path / "run", tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    _run(tmp_path / "run")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Refused, match="file/mine cannot be written: Not a directory"):
        export(tmp_path / "run", tmp_path / "file" / "mine")


def test_an_earlier_export_can_be_replaced(tmp_path):
    _run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "run", tmp_path / "out", overwrite=True, dtype="bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(("checkpoint", "seed"), [(None, 2), ("best", 1), ("step-000001", 1), ("step-000002", 2)])
def test_a_checkpoint_can_be_chosen(tmp_path, checkpoint, seed):
    models = {step: _run(tmp_path / "run", step=step, seed=step, best_step=1) for step in (1, 2)}
    export(tmp_path / "run", tmp_path / "out", checkpoint=checkpoint, dtype="fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, models[seed].get_input_embeddings().weight)
