"""What a newcomer does with data of their own: plan, train with overrides alone, export, ask."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from harness.formats.outcome import read_outcome
from harness.telemetry.read import read_metrics
from tests.end_to_end.conftest import QUESTIONS, harness

RUNS = Path(__file__).resolve().parents[2] / "launch" / "runs"


def test_plan_prints_the_merged_configuration_the_batch_and_the_memory(run_file):
    data = run_file.parent / "data"
    assert "not prepared yet" in harness("plan", run_file).output and not data.exists(), "a plan writes nothing"
    assert harness("prepare", run_file).code == 0
    planned = harness("plan", run_file, "train.global_batch_rows=8", "engine.deepspeed=zero3_offload_cpu")
    assert planned.code == 0, planned.output
    assert "8 rows = micro-batch 1 x accumulation 4 x 2 ranks" in " ".join(planned.output.replace("\u2502", " ").split())
    assert "'plain' of data.template" in planned.output
    merged = json.loads(planned.output[planned.output.index("{") : planned.output.rindex("}") + 1])
    assert (merged["train_micro_batch_size_per_gpu"], merged["gradient_accumulation_steps"]) == (1, 4)
    assert merged["zero_optimization"]["stage"] == 3 and merged["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert merged["gradient_clipping"] == 1.0
    assert not (run_file.parent / "run" / "attempts").exists(), "a plan starts nothing"


def test_plan_refuses_what_train_would_refuse(run_file):
    planned = harness("plan", run_file, "train.micro_batch=3")
    assert planned.code == 2 and "does not divide" in planned.output, planned.output


def test_what_may_not_change_on_resume_is_refused_before_anything_starts(run_file):
    assert harness("launch", run_file, "train.steps=2", "launch.ranks=1").code == 0
    before = (run_file.parent / "run" / "events.jsonl").read_text()
    for verb in ("plan", "launch"):
        refused = harness(verb, run_file, "train.steps=2", "launch.ranks=1", "train.seed=5", "data.template.prompt=Ask {prompt}")
        assert refused.code == 2 and "may not change on resume" in refused.output, refused.output
    assert (run_file.parent / "run" / "events.jsonl").read_text() == before, "no attempt was made"


def test_launch_print_shows_the_command_and_starts_nothing(run_file):
    shown = harness("launch", run_file, "--print", "train.steps=3")
    assert shown.code == 0, shown.output
    assert "-m harness.launch.node --slots 2" in shown.output and shown.output.rstrip().endswith(f"{run_file} train.steps=3")
    assert not (run_file.parent / "run").exists()


def test_patience_ends_a_run_that_no_longer_learns(run_file, tmp_path):
    done = harness("launch", run_file, "optimizer.lr=1e-30", "train.steps=200", "evaluation.every_steps=2", "evaluation.patience=2", "launch.ranks=1")
    assert done.code == 0, done.output
    steps = [line["step"] for line in read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert steps == [0, 2, 4, 6], "the first evaluation with nothing better sets the record, two more end the run"
    assert read_outcome(tmp_path / "run").state == "done"


@pytest.fixture
def model_folder(run_file, tmp_path) -> Path:
    """A small GPT-2 with its tokenizer in a Hugging Face folder, as somebody may have it."""
    done = harness("launch", run_file, "train.steps=2", "launch.ranks=1", f"run_dir={tmp_path / 'before'}")
    assert done.code == 0, done.output
    exported = harness("export", tmp_path / "before", "--to", tmp_path / "my-gpt")
    assert exported.code == 0, exported.output
    return tmp_path / "my-gpt"


def test_a_strangers_data(model_folder, tmp_path):
    """A CSV in columns of its own and a model folder, on a shipped run file with overrides alone, end in a folder that answers."""
    table = tmp_path / "faq.csv"
    with open(table, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["Nr", "Frage", "Antwort"])
        writer.writerows([number, f"{question} F\u00fcr Gr\u00f6\u00dfe {number}?", f"{answer}, \"sagt\" man."] for number, (question, answer) in enumerate(QUESTIONS * 2))
    words = [
        f"run_dir={tmp_path / 'mine'}", f"data.dir={tmp_path / 'mine-data'}", f"data.train.path={table}", "data.validation=null", "data.validation_share=0.2",
        "data.columns.prompt=Frage", "data.columns.completion=Antwort", "data.sequence_length=128", f"model.path={model_folder}",
        "train.epochs=12", "optimizer.warmup_steps=2", "optimizer.lr=3e-3", "evaluation.every_steps=20", "evaluation.max_new_tokens=8",
    ]
    done = harness("launch", RUNS / "medical_qa.yaml", *words)
    assert done.code == 0, done.output
    evaluations = [line["eval/loss"] for line in read_metrics(tmp_path / "mine") if "eval/loss" in line]
    assert evaluations[-1] < 0.8 * evaluations[0]
    exported = harness("export", tmp_path / "mine", "--to", tmp_path / "my-model")
    assert exported.code == 0, exported.output
    question = f"{QUESTIONS[3][0]} F\u00fcr Gr\u00f6\u00dfe 3?"
    answered = harness("generate", tmp_path / "my-model", "--prompt", question, "--prompt", question, "--max-new-tokens", 24)
    assert answered.code == 0, answered.output
    assert answered.output.count(f"> {question}\nIt is ") == 2, answered.output



@pytest.mark.slow
def test_a_chinese_corpus_in_its_own_encoding(run_file, tmp_path):
    """GB18030 as CSV: named wrong at first, then right, with a broken row on the way; trained, exported, and every step accounted for."""
    rows = [f"什么是第{n}号药物？,它是第{n * 7 % 23}类药物，每日服用{n % 4 + 1}次。" for n in range(24)]
    path = tmp_path / "药物.csv"
    path.write_bytes("\n".join(["问题,回答", *rows]).encode("gb18030"))
    words = [f"data.train.path={path}", "data.validation=null", "data.validation_share=0.2", "data.columns.prompt=问题", "data.columns.completion=回答",
             "train.steps=3", "launch.ranks=1", "evaluation.every_steps=null", "checkpoint.every_steps=null"]
    wrong = harness("prepare", run_file, *words)
    assert wrong.code == 2 and "is not utf-8: byte 0 cannot be decoded" in wrong.output and "it looks like gb18030" in wrong.output, wrong.output
    words.append("data.train.encoding=gb18030")
    path.write_bytes("\n".join(["问题,回答", *rows[:9], "a,b,c", *rows[9:]]).encode("gb18030"))
    broken = harness("prepare", run_file, *words)
    assert broken.code == 2 and "line 11" in broken.output and path.name in broken.output and "Traceback" not in broken.output, broken.output
    path.write_bytes("\n".join(["问题,回答", *rows]).encode("gb18030"))
    done = harness("launch", run_file, *words)
    assert done.code == 0, done.output
    assert harness("export", tmp_path / "run", "--to", tmp_path / "folder").code == 0
    shown = harness("data", "show", tmp_path / "data" / "train", "--step", "2", "--run", tmp_path / "run")
    assert shown.code == 0 and "shard-00000" in shown.output and "什么是" in shown.output, shown.output
    where = harness("data", "where", tmp_path / "data" / "train", "0", "--run", tmp_path / "run")
    assert where.code == 0 and "row 0, epoch 0: position" in where.output, where.output


@pytest.mark.slow
def test_the_end_of_a_run_says_what_to_do_with_it(run_file, tmp_path):
    """Also where the run had ended before: what is evaluated then is told, and what was recorded stands."""
    words = ("train.steps=2", "launch.ranks=1", "checkpoint.every_steps=1")
    done = harness("launch", run_file, *words)
    assert done.code == 0 and "step 1: checkpoint saved in " in done.output and "step 2: checkpoint saved in " in done.output, done.output
    line = next(line for line in done.output.splitlines() if line.startswith("step 2: evaluation loss"))
    assert f"  harness export {tmp_path / 'run'} --to FOLDER" in done.output.split("Done at step 2, ")[1], done.output
    recorded = (tmp_path / "run" / "metrics.jsonl").read_text()
    again = harness("launch", run_file, *words)
    assert again.code == 0 and line in again.output and "Done at step 2, " in again.output, again.output
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == recorded
