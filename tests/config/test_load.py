"""Run files: what is refused, and what is remembered."""

from __future__ import annotations

import re

import pytest

from harness.cli.main import main
from harness.config.batch import batch_equation
from harness.config.deepspeed import merge, read_deepspeed, shipped_names
from harness.config.load import fixed_keys, flatten, load
from harness.config.rules import check, check_data
from harness.errors import Refused

BASE = """\
run_dir: {run_dir}
data:
  dir: {run_dir}/data
  train: {{path: train.jsonl}}
  sequence_length: 64
  tokenizer: somewhere
model:
  architecture: {{model_type: gpt2}}
train:
  steps: 10
  global_batch_rows: 8
  micro_batch: 2
"""
FLASH = ["engine.deepspeed=zero1", "engine.pipeline_stages=2", "model.attention=flash_attention_2"]


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(BASE.format(run_dir=tmp_path / "run"))
    return path


def test_values_and_origins(run_file):
    loaded = load(run_file, ["train.steps=20", "optimizer.lr=0.1"])
    assert loaded.run.train.steps == 20
    assert loaded.origin("train.steps") == "command line"
    assert loaded.origin("optimizer.lr") == "command line"
    assert loaded.origin("train.micro_batch") == f"{run_file}:12"
    assert loaded.origin("train.clip").endswith(":9"), "a default inherits the place of its section"
    assert loaded.origin("checkpoint.keep_last") == "default"


def test_what_only_yaml_takes_for_numbers_and_dates(run_file):
    words = {"train.steps": "010", "train.micro_batch": "0x10", "train.global_batch_rows": "1_000", "optimizer.lr": "1e-4", "run_dir": "2024-13-45",
             "data.dir": "2024-01-02", "launch.slurm.time": "12:00:00", "launch.slurm.account": "007", "train.clip": "0.5"}
    expected = {**words, "train.steps": 10, "train.micro_batch": 16, "train.global_batch_rows": 1000, "optimizer.lr": 1e-4, "train.clip": 0.5}
    given = load(run_file, [f"{key}={text}" for key, text in words.items()])
    text = run_file.read_text().replace("steps: 10", "steps: 010").replace(f"run_dir: {run_file.parent}/run", "run_dir: 2024-13-45")
    run_file.write_text(text + "launch: {slurm: {time: 12:00:00}}\n")
    written = load(run_file).run
    assert {key: flatten(given.run)[key] for key in words} == expected
    assert (written.train.steps, written.run_dir, written.launch.slurm.time) == (10, "2024-13-45", "12:00:00")
    for word in ("train.steps=1:30", "train.clip=1:30.5", "train.steps=2024-01-02", "train.steps=0b_"):
        with pytest.raises(Refused, match="unable to parse"):
            load(run_file, [word])


def test_a_tilde_is_the_home_folder_in_every_path(run_file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    keys = ("run_dir", "data.dir", "data.cache_dir", "data.tokenizer", "model.path", "engine.deepspeed", "engine.nvme_dir", "launch.hosts.file", "data.sets.a.dir")
    run = load(run_file, [*(f"{key}=~/x" for key in keys), "data.train.path=[~/x, y~]", "data.validation.path=~/x"]).run
    leaves = flatten(run)
    assert {leaves[key] for key in (*keys, "data.validation.path")} == {"/home/me/x"} and leaves["data.train.path"] == ["/home/me/x", "y~"]


def test_frozen(run_file):
    run = load(run_file).run
    with pytest.raises(Exception, match="frozen"):
        run.train.steps = 3


@pytest.mark.parametrize(
    "override, told",
    [
        ("train.stepz=3", "Did you mean `steps`?"),
        ("trane.steps=3", "Did you mean `train`?"),
        ("data.columns.promt=x", "Did you mean `prompt`?"),
        ("optimizer.learning_rate=1e-4", "`learning_rate` is `optimizer.lr` here."),
        ("train.learning-rate=1e-4", "`learning_rate` is `optimizer.lr` here."),
        ("train.lr=1e-4", "Did you mean `optimizer.lr`?"),
        ("train.gradient_accumulation_steps=4", "follows from `train.global_batch_rows`, `train.micro_batch` and the ranks"),
        ("max_seq_length=512", "`data.sequence_length`"),
        ("model.lora.r=8", "`lora`: all weights are trained"),
        ("train.dpo=true", "there is no DPO"),
        ("train.zzz=1", "Remove `zzz`; `train` has steps, epochs, "),
        ("train.steps=many", "`train.steps`"),
        ("train.steps=-1", "greater than 0"),
        ("train.precision=fp8", "`train.precision`"),
        ("optimizer.betas=[0.9]", "`optimizer.betas"),
        ("nonsense", "is not an override"),
        ("train.steps=[", "not valid YAML"),
    ],
)
def test_refused_at_load(run_file, override, told):
    with pytest.raises(Refused) as caught:
        load(run_file, [override])
    assert told in str(caught.value)
    assert "command line" in str(caught.value)


def test_what_a_name_from_elsewhere_points_to_is_a_setting():
    from harness.config import elsewhere
    from harness.config.load import _keys

    keys = set(_keys())
    for name, told in elsewhere.NAMES.items():
        assert name not in {key.rpartition(".")[2] for key in keys}, f"{name} is a setting of its own"
        named = re.findall(r"`([\w.]+)[^`]*`", told)[1:]
        assert all(key in keys for key in named if "." in key and key != "metrics.jsonl"), told


@pytest.mark.parametrize("text", ["", "just words", "a: [", "run_dir: x\nrun_dir: y\n"])
def test_unreadable_files(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(Refused) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("override", ["train.micro_batch=1", "data.packing=none", "model.attention=sdpa", "engine.pipeline_stages=1"])
def test_flash_attention_in_stages_that_keeps_documents_apart(run_file, override):
    check(load(run_file, [*FLASH, override]), ranks=2, has_gpu=False)


def test_missing_and_binary_file(tmp_path):
    with pytest.raises(Refused, match="no run file"):
        load(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"run_dir: \xff\xfe")
    with pytest.raises(Refused, match="byte 9"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["model.path=x"], "Exactly one of `model.path` and `model.architecture`"),
        (["model.architecture=null"], "Exactly one of"),
        (["train.epochs=1"], "Exactly one of `train.steps` and `train.epochs`"),
        (["data.train.hub=x"], "Exactly one of"),
        (["data.tokenizer=null"], "no tokenizer"),
        (["data.train_tokenizer.vocab_size=300"], "both set"),
        (["data.train={}"], "none of them are"),
        (["data.train.path=[]"], "`data.train.path` names no file"),
        (["data.validation.path=''"], "`data.validation.path` names no file"),
        (["data.shape=prompt_completion", "data.template.prompt='Q: {question} '"], "{question}, which stands for nothing"),
        (["data.shape=prompt_completion", "data.template.prompt='Q: {prompt} in {context} '"], "{context}, which stands for nothing"),
        (["data.shape=prompt_completion", "data.template.completion=yes!"], "does not hold {completion}"),
        (["train.global_batch_rows=7"], "does not divide"),
        (["train.global_batch_tokens=64"], "exactly one of"),
        (["train.global_batch_rows=null", "train.global_batch_tokens=100"], "not a multiple"),
        (["launch.ranks=4"], "asks for 4 ranks, but 2 met"),
        (["engine.deepspeed=zero9"], "no DeepSpeed configuration"),
        (["engine.deepspeed=zero3", "engine.pipeline_stages=2"], "cannot be used inside 2 pipeline stages"),
        (["engine.pipeline_stages=3"], "do not divide into pipelines"),
        (FLASH, "lets the documents of a packed row see each other"),
        ([*FLASH, "train.micro_batch=1", "evaluation.micro_batch=2"], "lets the documents"),
        (["engine.deepspeed=zero3_offload_nvme"], "needs a folder"),
        (["train.precision=fp16"], "fp16 needs a GPU"),
        (["engine.device=cuda"], "torch sees none"),
        (["optimizer.warmup_steps=11"], "longer than the run"),
        (["optimizer.schedule=warmup_stable_decay", "optimizer.warmup_steps=6", "optimizer.decay_steps=5"], "reaches into the warm-up of 6"),
        (["evaluation.patience=2"], "only the one at the end"),
        (["optimizer.warmup_steps=1", "optimizer.warmup_epochs=1"], "both set"),
        (["run_dir=/dev/null/x"], "is a file"),
    ],
)
def test_rules(run_file, overrides, told):
    with pytest.raises(Refused) as caught:
        check(load(run_file, overrides), ranks=2, has_gpu=False)
    assert told in str(caught.value)
    assert caught.value.where and caught.value.remedy


def test_braces_that_are_text_are_no_mistake_in_a_template(run_file):
    words = ["data.shape=prompt_completion", r"data.template.prompt='{prompt} As {''a'': 1}, in \boxed{answer}'", r"data.template.completion='\boxed{{completion}}'"]
    check_data(load(run_file, words))


@pytest.mark.parametrize("override", ["data.train={max_rows: 5}", "data.train.builtin=python-qa", "data.template.completion=x"])
def test_prepare_refuses_what_training_would(run_file, override, capsys):
    assert main(["prepare", str(run_file), "data.shape=prompt_completion", override]) == 2
    assert "command line" in capsys.readouterr().err and not (run_file.parent / "run").exists()


@pytest.mark.parametrize(
    "key", ["gradient_clipping", "train_micro_batch_size_per_gpu", "optimizer", "bf16", "data_types", "tensor_parallel", "expert_parallel"]
)
def test_a_key_that_is_not_for_this_file(run_file, tmp_path, key):
    config = tmp_path / "ds.json"
    config.write_text(f'{{"{key}": 1}}')
    with pytest.raises(Refused) as caught:
        read_deepspeed(load(run_file, [f"engine.deepspeed={config}"]))
    assert key in str(caught.value) and str(config) in str(caught.value)


def test_merge_of_every_shipped_configuration(run_file):
    assert shipped_names() == ["zero1", "zero1_offload_cpu", "zero2", "zero3", "zero3_offload_cpu", "zero3_offload_nvme"]
    for name in shipped_names():
        loaded = load(run_file, [f"engine.deepspeed={name}", "engine.nvme_dir=/somewhere"])
        merged = merge(loaded, batch_equation(loaded, 2), nvme_path="/somewhere/run/host")
        assert merged["train_micro_batch_size_per_gpu"] == 2
        assert merged["gradient_accumulation_steps"] == 2
        assert merged["gradient_clipping"] == 1.0
        assert merged["data_types"] == {"grad_accum_dtype": "fp32"}
        assert merged["bf16"] == {"enabled": True}
        assert ("nvme_path" in str(merged)) == ("nvme" in name)


def test_batch_equation(run_file):
    equation = batch_equation(load(run_file, ["train.global_batch_rows=null", "train.global_batch_tokens=1024"]), 4)
    assert (equation.rows, equation.accumulation) == (16, 2)


def test_every_leaf_says_whether_it_may_change(run_file):
    from harness.config.schema import RunFile

    def leaves(model, prefix=""):
        for name, field in model.model_fields.items():
            extra = field.json_schema_extra
            yield f"{prefix}{name}", bool(isinstance(extra, dict) and extra.get("resume") in ("fixed", "free"))

    run = load(run_file).run
    for section in ("data", "model", "train", "optimizer", "engine", "evaluation", "checkpoint", "launch"):
        for key, said in leaves(type(getattr(run, section)), f"{section}."):
            assert said, f"{key} does not say whether it may change on resume"
    assert "train.seed" in fixed_keys(RunFile) and "train.steps" not in fixed_keys(RunFile)
    assert "data.columns.prompt" in flatten(run)
