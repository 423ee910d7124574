"""Pipeline stages give the numbers of one process, from the same weights, and every uneven shape trains or is refused by name."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from tests.engine import work
from tests.engine.test_parity import LOSS, NORM, WEIGHT, differences

LAYERS = 4
MODELS = [("gpt2", True), ("llama", False), ("qwen2", True), ("qwen2", False)]
SLOW = pytest.mark.slow


@cache
def reference(kind: str, tied: bool, layers: int = LAYERS) -> dict:
    return work.plain(kind, layers=layers, tied=tied)


def check(answers: list[dict], theirs: dict) -> None:
    losses, norms, weights = differences(answers[0], theirs)
    assert losses <= LOSS and norms <= NORM and weights <= WEIGHT, f"losses {losses:.1e}, norms {norms:.1e}, weights {weights:.1e}"


@pytest.mark.parametrize("kind, tied", [MODELS[0], *(pytest.param(*model, marks=SLOW) for model in MODELS[1:])])
def test_stages_equal_one_process(ranks4, kind, tied):
    """2 stages x 2 copies, 4 stages and ZeRO-3: packed rows, uneven prompts, accumulation 4, clip active, from the same weights."""
    options = {"layers": LAYERS, "tied": tied}
    for name, stages, micro_batch in (("zero3", 1, 1), ("zero1", 2, 1), ("zero1", 4, 2)):
        check(ranks4.run(work.train, name, kind, micro_batch, options | {"stages": stages, "checkpointing": stages // 2}), reference(kind, tied))


@pytest.mark.parametrize("kind, tied", [*MODELS[:2], *(pytest.param(*model, marks=SLOW) for model in MODELS[2:])])
def test_two_stages_on_two_ranks_equal_one_process(ranks2, kind, tied):
    for name in ("zero1", "zero1_offload_cpu"):
        check(ranks2.run(work.train, name, kind, 2, {"layers": LAYERS, "tied": tied, "stages": 2, "checkpointing": 2}), reference(kind, tied))


@pytest.mark.parametrize("kind, tied", MODELS[:2])
def test_a_loss_in_chunks(ranks2, kind, tied):
    check(ranks2.run(work.train, "zero1", kind, 2, {"layers": LAYERS, "tied": tied, "stages": 2, "loss": "chunked"}), reference(kind, tied))


def evaluation(stages: int, loss: str) -> list[float]:
    engine = opened("zero1", "gpt2", stages=stages, loss=loss)
    rows = random_rows(1, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
    sums = engine.eval_sums(cut(rows, micro_batch=2, rank=0, ranks=1).micro_batches)
    engine.close()
    return sums.tolist()


def test_an_evaluation_in_chunks(ranks1, ranks2):
    """Sum of losses, tokens, and tokens that are right: on the last stage those of one rank."""
    expected = ranks1.run(evaluation, 1, "plain")[0]
    assert expected[1] > 0 and ranks1.run(evaluation, 1, "chunked")[0] == pytest.approx(expected, rel=1e-6)
    assert ranks2.run(evaluation, 2, "chunked")[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind, options", [
    ("gpt_neox", {}), ("qwen3", {}), ("mistral", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
])
def test_other_families_and_windows(ranks2, tmp_path, kind, options):
    """Loaded from a folder: the logits through two stages are those of plain transformers, boundaries and windows of attention included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(tiny_config(kind, layers=LAYERS, **options)).eval()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    ids, positions, labels = (torch.as_tensor(a) for a in random_rows(5, rows=4, length=work.LENGTH, vocabulary=VOCABULARY))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
    sums = ranks2.run(evaluated, kind, str(tmp_path), options)
    assert sums[0] == [0.0, 0.0, 0.0], "only the last stage sees the loss"
    assert sums[1][0] == pytest.approx(loss, rel=1e-5) and sums[1][1] == int((labels[:, 1:] != -100).sum())


def evaluated(kind: str, weights: str | None, options: dict[str, Any]) -> list[float]:
    engine = opened("zero1", kind, stages=2, weights=weights, **options)
    batch = cut(random_rows(5, rows=4, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=4, rank=0, ranks=1)
    answer = engine.eval_sums(batch.micro_batches).tolist()
    engine.close()
    return answer


def opened(name: str, kind: str, *, stages: int, weights: str | None = None, micro_batch: int = 2, precision: str = "fp32", layers: int = LAYERS,
           loss: str = "auto", **options: Any) -> Any:
    from harness import distributed
    from harness.engine.open import open_engine

    run = work.run_file(micro_batch=micro_batch, stages=stages, precision=precision, loss=loss)
    merged = work.ds_config(name, run, ranks=distributed.size() // stages, nvme="unused")
    return open_engine(run, tiny_config(kind, layers=layers, **options), copy.deepcopy(merged), device=torch.device("cpu"), weights=weights)


def step_of(engine: Any, step: int, *, micro_batch: int = 2) -> Any:
    rows = random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY)
    return engine.train_step(cut(rows, micro_batch=micro_batch, rank=engine.grid.dp_rank, ranks=engine.grid.dp_size), step=step, lr=work.LR)


@pytest.mark.parametrize("fault", ["mean of means", "decay on norms", "no decay", "16-bit weights"])
def test_a_planted_fault_is_seen(ranks2, fault):
    losses, norms, weights = differences(ranks2.run(work.train, "zero1", "gpt2", 2, {"layers": LAYERS, "stages": 2, "fault": fault})[0], reference("gpt2", True))
    assert losses > LOSS or norms > NORM or weights > WEIGHT


def tied_copies(name: str, accumulate_with_stock: bool) -> list[np.ndarray]:
    """The shared embedding of this stage after each of 20 steps in bf16 with gradients accumulated in fp32."""
    from deepspeed.runtime.pipe import schedule

    engine = opened(name, "gpt2", stages=2, precision="bf16")
    if accumulate_with_stock:
        stock = type(engine.deepspeed)._INSTRUCTION_MAP
        engine.deepspeed._INSTRUCTION_MAP[schedule.ReduceTiedGrads] = stock[schedule.ReduceTiedGrads]
    copies = []
    for step in range(1, 21):
        assert step_of(engine, step).applied
        copies.append(engine.layer.shared_embedding.detach().view(torch.int16).numpy().copy())
    engine.close()
    return copies


@pytest.mark.parametrize("name", ["zero1", "zero1_offload_cpu"])
def test_tied_copies_stay_equal_bit_for_bit(ranks2, name):
    first, last = ranks2.run(tied_copies, name, False)
    assert all(np.array_equal(a, b) for a, b in zip(first, last, strict=True))


def test_tied_copies_drift_apart_as_deepspeed_reduces_them(ranks2):
    """DeepSpeed 0.19.8: tied weights, ZeRO-1, CPU offload, bf16 and fp32 accumulation. Once this fails, `reduce_tied_gradients` may go."""
    first, last = ranks2.run(tied_copies, "zero1_offload_cpu", True)
    assert not np.array_equal(first[-1], last[-1])


def test_zero0_clips_by_the_norm_of_all_stages(ranks2, tmp_path):
    path = tmp_path / "zero0.json"
    path.write_text("{}")
    check(ranks2.run(work.train, str(path), "gpt2", 2, {"layers": LAYERS, "stages": 2}), reference("gpt2", True))


@pytest.mark.parametrize("micro_batch, layers", [(8, 4), (4, 3), (2, 5)])
def test_uneven_shapes(ranks2, micro_batch, layers):
    """One micro-batch a step, and blocks that do not divide by the stages."""
    check(ranks2.run(work.train, "zero1", "llama", micro_batch, {"layers": layers, "stages": 2, "tied": False}), reference("llama", False, layers))


def test_fewer_micro_batches_than_stages(ranks4):
    check(ranks4.run(work.train, "zero1", "gpt2", 4, {"layers": LAYERS, "stages": 4}), reference("gpt2", True))


def one_stage() -> tuple[list[float], list[float]]:
    """Losses of the pipeline engine with a single stage, which needs no peer, and the sums of an evaluation."""
    from harness.engine.pipeline import PipelineEngine

    run = work.run_file(micro_batch=2)
    engine = PipelineEngine(run, tiny_config("gpt2", layers=LAYERS), work.ds_config("zero1", run, ranks=1, nvme=""), device=torch.device("cpu"), weights=None)
    losses = []
    for step in range(1, 6):
        result = step_of(engine, step)
        losses.append(result.loss_sum.item() / result.trained_tokens)
    rows = cut(random_rows(9, rows=70, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=1, rank=0, ranks=1)
    sums = engine.eval_sums(rows.micro_batches).tolist()
    assert engine.eval_sums(rows.micro_batches[:1]).tolist()[1] > 0, "an evaluation may be smaller than a step"
    engine.close()
    return losses, [sums[1], float(rows.trained_tokens)]


def test_a_pipeline_of_one_stage_is_the_same_code(ranks1):
    losses, (counted, trained) = ranks1.run(one_stage)[0]
    assert losses == pytest.approx(reference("gpt2", True)["losses"][:5], rel=LOSS)
    assert counted == trained, "more micro-batches than go through together, each once"


def not_finite(name: str) -> list[Any]:
    engine = opened(name, "gpt2", stages=2)
    before = work.masters(engine)
    if engine.grid.is_last:
        engine.layer.loss = lambda logits, labels, *, tokens: logits.sum() * float("nan")
    applied = step_of(engine, 1).applied
    same = all(np.array_equal(before[name], after) for name, after in work.masters(engine).items())
    engine.close()
    return [applied, same]


def test_a_non_finite_step_is_skipped_on_every_stage(ranks2, tmp_path):
    path = tmp_path / "zero0.json"
    path.write_text("{}")
    for name in ("zero1", "zero1_offload_cpu", str(path)):
        assert ranks2.run(not_finite, name) == [[False, True], [False, True]], name


def frozen(pp_stage: int) -> str:
    import harness.engine.pipeline as pipeline
    from harness.errors import Refused

    build = pipeline.build_stage

    def without_gradients(config: Any, bounds: Any, stage: int, **options: Any) -> Any:
        built = build(config, bounds, stage, **options)
        return built.requires_grad_(stage != pp_stage)

    pipeline.build_stage = without_gradients
    try:
        opened("zero1", "gpt2", stages=2)
    except Refused as refusal:
        return str(refusal)
    finally:
        pipeline.build_stage = build
    return "built"


def test_a_stage_without_trained_parameters_is_refused_by_every_rank(ranks2):
    for answer in ranks2.run(frozen, 0):
        assert "Pipeline stage 0 (blocks 0 to" in answer and "no parameter that is trained" in answer


def generated(weights: str, prompts: list[list[int]], loss: str) -> list[list[int]]:
    engine = opened("zero1", "gpt2", stages=2, weights=weights, loss=loss)
    step_of(engine, 1)  # the shapes of training and of generation do not disturb each other
    engine.close()
    engine = opened("zero1", "gpt2", stages=2, weights=weights, loss=loss)
    answers = engine.generate(prompts, stop_ids=[0], max_new_tokens=12)
    step_of(engine, 1)
    engine.close()
    return answers


def test_prompts_are_answered_as_by_plain_transformers(ranks2, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt2", layers=LAYERS)).eval()
    model.save_pretrained(tmp_path)
    prompts = [[5, 9, 3], [200, 17]]
    expected = [model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0)[0, len(p):].tolist() for p in prompts]
    for loss in ("plain", "chunked"):
        for answers in ranks2.run(generated, str(tmp_path), prompts, loss):
            assert answers == expected


def idle_shares(slow_stages: list[int]) -> tuple[float, str]:
    """The median idle share of a few steps, and what the engine says of its balance, with a sleep planted in the forward of some stages."""
    import statistics
    import time

    from harness.resilience.agreement import Agreement

    engine = opened("zero1", "llama", stages=2, tied=False)
    agreement = Agreement(engine.device)
    if engine.grid.pp_stage in slow_stages:
        engine.layer.register_forward_pre_hook(lambda *_: time.sleep(0.08))
    shares = []
    for step in range(1, 6):
        result = step_of(engine, step)
        agreement.offer(result.loss_sum, result.aux_loss_sum, stop=False, save=False, busy_s=result.busy_s, window_s=result.window_s)
        shares.append(agreement.collect().idle_share)
        if step == 2:
            engine.balance()  # the first steps, with their imports, are nobody's fault
    text = engine.balance()
    engine.close()
    return statistics.median(shares[2:]), text


@pytest.mark.slow
def test_the_idle_share_is_that_of_the_schedule_and_a_slow_stage_is_named(ranks2):
    """The sleeps outweigh all else, so that with equal stages (p - 1) / (m + p - 1) is left: 1 of 5 slots with 4 micro-batches."""
    answers = ranks2.run(idle_shares, [0, 1])
    assert answers[0] == answers[1], "all ranks know it"
    assert answers[0][0] == pytest.approx(0.2, abs=0.08) and answers[0][1] == ""
    for stage in (0, 1):
        share, text = ranks2.run(idle_shares, [stage])[0]
        assert share > 0.4 and f"Pipeline stage {stage} (blocks" in text, (share, text)
