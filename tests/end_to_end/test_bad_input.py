"""Bad input through the real launcher: one message that names the place and the remedy, exit code 2, before a model is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli.main import main
from tests.end_to_end.conftest import deepspeed, harness


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def _rows(path: Path, rows: list[dict]) -> Path:
    return _file(path, "".join(json.dumps(row) + "\n" for row in rows))


def _folder_model(folder: Path, **changes: object) -> Path:
    """A model folder whose configuration was changed after its weights were saved."""
    from harness.model.build import build
    from harness.testing.models import tiny_config

    model = build(tiny_config("gpt2"), path=None, precision="fp32", seed=0, zero3=False)
    model.save_pretrained(folder)
    if changes:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def _pickled(folder: Path) -> Path:
    """A model folder whose weights are in no safetensors file."""
    import torch
    from safetensors.torch import load_file

    weights = _folder_model(folder) / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    return folder


PAIR = {"question": "What?", "answer": "That."}
CASES = {
    "unknown key": (lambda t: ["train.stepz=3"], "Did you mean `steps`?"),
    "wrong type": (lambda t: ["train.micro_batch=few"], "`train.micro_batch`"),
    "not an override": (lambda t: ["stop"], "is not an override"),
    "two models": (lambda t: ["model.path=gpt2"], "Exactly one of"),
    "no length": (lambda t: ["train.steps=null"], "Exactly one of"),
    "batch that does not divide": (lambda t: ["train.global_batch_rows=5", "train.micro_batch=2"], "does not divide"),
    "key in both files": (lambda t: [f"engine.deepspeed={_file(t / 'ds.json', json.dumps({'gradient_clipping': 1}))}"], "the run file owns it"),
    "broken DeepSpeed file": (lambda t: [f"engine.deepspeed={_file(t / 'ds.json', '{')}"], "not valid JSON"),
    "absent DeepSpeed file": (lambda t: ["engine.deepspeed=zero4"], "no DeepSpeed configuration"),
    "stage and pipeline together": (lambda t: ["engine.deepspeed=zero3", "engine.pipeline_stages=2"], "cannot be used inside"),
    "fewer blocks than stages": (lambda t: ["engine.deepspeed=zero1", "engine.pipeline_stages=2", "model.architecture.n_layer=1"], "1 blocks, too few for 2"),
    "a family that cannot be cut": (lambda t: [
        "engine.deepspeed=zero1", "engine.pipeline_stages=2",
        "model.architecture={model_type: bloom, n_layer: 2, hidden_size: 32, n_head: 4, vocab_size: 320}",
    ], "'bloom' cannot be cut"),
    "stages from pickled weights": (lambda t: [
        "engine.deepspeed=zero1", "engine.pipeline_stages=2", "model.architecture=null", f"model.path={_pickled(t / 'model')}",
    ], "has no safetensors files"),
    "ranks that do not divide into stages": (lambda t: ["engine.deepspeed=zero1", "engine.pipeline_stages=3"], "do not divide into pipelines"),
    "no ZeRO, bf16, gradients in fp32": (lambda t: [f"engine.deepspeed={_file(t / 'ds.json', '{}')}", "train.precision=bf16"], "without ZeRO"),
    "NVMe without a folder": (lambda t: ["engine.deepspeed=zero3_offload_nvme"], "needs a folder"),
    "fp16 on a CPU": (lambda t: ["train.precision=fp16"], "fp16 needs a GPU"),
    "another world size": (lambda t: ["launch.ranks=3", "train.global_batch_rows=12"], "asks for 3 ranks"),
    "warm-up longer than the run": (lambda t: ["optimizer.warmup_steps=99"], "longer than the run"),
    "run folder under a file": (lambda t: [f"run_dir={_file(t / 'file', 'x')}/run"], "is a file"),
    "folder of something else": (lambda t: [f"run_dir={_file(t / 'pictures.txt', 'x').parent}"], "holds files, but no run"),
    "missing data file": (lambda t: [f"data.train.path={t / 'absent.jsonl'}"], "There is no file"),
    "empty data file": (lambda t: [f"data.train.path={_file(t / 'empty.jsonl', '')}"], "is empty"),
    "missing column": (lambda t: ["data.columns.prompt=questoin"], "did you mean 'question'"),
    "column unlike any": (lambda t: ["data.columns.prompt=Frage"], "Set `data.columns` to the names in the file."),
    "invalid UTF-8": (lambda t: [f"data.train.path={_file(t / 'latin.jsonl', json.dumps(PAIR).encode() + bytes([10, 0xE9, 10]))}"], "cannot be decoded"),
    "broken JSON line": (lambda t: [f"data.train.path={_file(t / 'broken.jsonl', json.dumps(PAIR) + chr(10) + '{oops')}"], "line 2 is not JSON"),
    "unknown format": (lambda t: [f"data.train.path={_file(t / 'pairs.xyz', 'x')}"], "format of"),
    "no row with a trained token": (lambda t: [f"data.train.path={_rows(t / 'mute.jsonl', [PAIR | {'answer': ''}] * 9)}"], "no row with a trained token"),
    "too many rows dropped": (lambda t: [f"data.train.path={_rows(t / 'half.jsonl', [PAIR, PAIR | {'answer': ''}] * 9)}"], "would be dropped"),
    "validation set empty": (lambda t: [f"data.validation.path={t / 'pairs.jsonl'}"], "The validation set has no row"),
    "rows longer than the positions": (lambda t: ["data.sequence_length=512"], "longer than the 256 positions"),
    "a prompt longer than the positions": (lambda t: [f"evaluation.prompts=['{'why ' * 300}']"], "the model has 256 positions"),
    "tokenizer larger than the embedding": (lambda t: ["model.architecture.vocab_size=300"], "the embedding of the model has 300"),
    "unknown architecture": (lambda t: ["model.architecture.model_type=gpt9"], "no architecture 'gpt9'"),
    "unknown field of the architecture": (lambda t: ["model.architecture.n_leyer=2"], "no field 'n_leyer'"),
    "absent model folder": (lambda t: ["model.architecture=null", "model.path=./absent"], "There is no folder"),
    "weights that do not fit": (lambda t: ["model.architecture=null", f"model.path={_folder_model(t / 'model', n_layer=3)}"], "do not fit its configuration"),
    "weights of other shapes": (lambda t: ["model.architecture=null", f"model.path={_folder_model(t / 'model', n_inner=99)}"], "mismatched"),
}


def _one_message(output: str, told: str) -> None:
    assert told in output, output
    assert output.count("harness: ") == 1, output
    assert "  where:" in output and "  remedy:" in output, output
    assert "Traceback" not in output, output


@pytest.mark.parametrize("case", CASES)
def test_one_rank_in_process(run_file, tmp_path, monkeypatch, capfd, case):
    overrides, told = CASES[case]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("harness.train.compose.train", _no_model)
    assert main(["train", str(run_file), *overrides(tmp_path)]) == 2
    _one_message("".join(capfd.readouterr()), told)


def _no_model(*_: object, **__: object) -> None:
    raise AssertionError("a model would have been built")


FEW = ["unknown key", "batch that does not divide", "invalid UTF-8", "weights that do not fit"]


@pytest.mark.parametrize("case", [c if c in FEW[:2] else pytest.param(c, marks=pytest.mark.slow) for c in FEW])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_through_the_launcher(run_file, tmp_path, case, ranks):
    overrides, told = CASES[case]
    done = deepspeed("train", run_file, f"launch.ranks={ranks}", *overrides(tmp_path), ranks=ranks)
    assert done.code == 2, done.output
    _one_message(done.output, told)


def test_rank_zero_three_seconds_late(run_file, tmp_path, monkeypatch):
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0': time.sleep(3)\n")
    monkeypatch.setenv("PYTHONPATH", f"{late}:{Path(__file__).resolve().parents[2]}")
    done = deepspeed("train", run_file, "train.stepz=3")
    assert done.code == 2, done.output
    _one_message(done.output, "Did you mean `steps`?")


@pytest.mark.slow
def test_a_fixed_field_changed_on_resume(run_file, tmp_path):
    done = harness("launch", run_file, "train.steps=1", "launch.ranks=1")
    assert done.code == 0, done.output
    for override, told in ((["train.seed=7"], "`train.seed` is 7"), (["model.dropout=0.5"], "`model.dropout`"), (["data.sequence_length=32"], "`data.sequence_length`")):
        again = harness("launch", run_file, "train.steps=2", "launch.ranks=1", *override)
        assert again.code == 2, again.output
        _one_message(again.output, told)
