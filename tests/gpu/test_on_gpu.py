"""What only a GPU shows: FusedAdam, fp16 with loss scaling, bf16, attention by pieces, and the same numbers as plain PyTorch on the same device."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.model import attention, head, pieces
from harness.model.attention import VARLEN, choose_attention, use_attention
from harness.model.build import build
from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from tests.engine import work
from tests.model.test_packing import packed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
STEPS = 10


@pytest.fixture(scope="module")
def device():
    from harness import distributed, world

    torch.backends.cuda.matmul.allow_tf32 = False
    yield distributed.init(world.World(), use_gpu=True, timeout_minutes=2)
    distributed.shutdown()


def trained(device: torch.device, name: str, precision: str, nvme: str, **options: Any) -> list[float]:
    """Losses of one rank under a shipped configuration."""
    from harness.engine.zero import ZeroEngine

    run = work.run_file(micro_batch=2, precision=precision, **options)
    merged = work.ds_config(name, run, ranks=1, nvme=nvme)
    with closing(ZeroEngine(run, tiny_config("gpt2"), copy.deepcopy(merged), device=device, weights=None)) as engine:
        losses = []
        for step in range(1, STEPS + 1):
            batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
            result = engine.train_step(batch, step=step, lr=work.LR)
            losses.append(result.loss_sum.item() / batch.trained_tokens)
        return losses


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero1_offload_cpu", "zero3_offload_cpu", "zero3_offload_nvme"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_losses_are_those_of_plain_pytorch(device, tmp_path, name, precision, tolerance):
    if name.endswith("nvme") and not Path("/usr/include/libaio.h").exists():
        pytest.skip("libaio's headers are missing")
    expected = work.plain("gpt2")["losses"][:STEPS]
    assert trained(device, name, precision, str(tmp_path)) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_losses_without_chunks(device, tmp_path, name):
    """What `model.loss: plain` gives; the others have their loss in chunks, compiled."""
    found = trained(device, name, "fp32", str(tmp_path), loss="plain")
    assert found == pytest.approx(trained(device, name, "fp32", str(tmp_path)), rel=1e-5)


@torch.no_grad()
def test_a_compiled_chunk_is_the_chunk(device):
    """Of a vocabulary that is padded, in bf16: losses in float32, and gradients but for their rounding."""
    logits = torch.randn(500, 1024, device=device).mul(4).bfloat16()
    targets = torch.randint(0, 1000, (500,), device=device)
    targets[::7] = -100
    for learns in (True, False):
        compiled, plain = (judge(logits, targets, 1000, learns) for judge in (head._compiled(), head._judge))
        assert torch.allclose(compiled[0], plain[0], rtol=1e-5, atol=1e-5) and torch.equal(compiled[1], plain[1])
        assert (compiled[2].float() - plain[2].float()).abs().max() <= 2**-8
        assert not learns or not compiled[2][:, 1000:].any()


@pytest.mark.parametrize("name", ["zero1", "zero1_offload_cpu"])
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_a_pipeline_of_one_stage(device, name, precision, tolerance):
    """The pipeline's code path on a GPU, its clocks included; what travels between stages needs two."""
    from harness.engine.pipeline import PipelineEngine

    run = work.run_file(micro_batch=2, precision=precision)
    engine = PipelineEngine(run, tiny_config("gpt2"), work.ds_config(name, run, ranks=1, nvme=""), device=device, weights=None)
    losses = []
    for step in range(1, STEPS + 1):
        batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
        result = engine.train_step(batch, step=step, lr=work.LR)
        assert 0 < result.busy_s <= result.window_s
        losses.append(result.loss_sum.item() / batch.trained_tokens)
    engine.close()
    assert losses == pytest.approx(work.plain("gpt2")["losses"][:STEPS], rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one rank a GPU: two stages need two GPUs")
def test_two_stages_on_two_gpus(tmp_path):
    """Through the launcher, on its own process group."""
    import subprocess
    import sys

    program = tmp_path / "stages.py"
    program.write_text(TWO_STAGES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(word) for word in done.stdout.split("losses:")[1].split()[:STEPS]]
    assert losses == pytest.approx(work.plain("gpt2")["losses"][:STEPS], rel=1e-4)


TWO_STAGES = f"""
import torch
from harness import distributed, world
from tests.engine import work
from harness.testing.models import VOCABULARY, tiny_config
from harness.testing.rows import cut, random_rows
from harness.engine.pipeline import PipelineEngine

torch.backends.cuda.matmul.allow_tf32 = False
device = distributed.init(world.current(), use_gpu=True, timeout_minutes=2)
run = work.run_file(micro_batch=2, stages=2)
engine = PipelineEngine(run, tiny_config("gpt2"), work.ds_config("zero1", run, ranks=1, nvme=""), device=device, weights=None)
losses = []
for step in range(1, {STEPS} + 1):
    batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=0, ranks=1)
    total = engine.train_step(batch, step=step, lr=work.LR).loss_sum.clone()
    distributed.all_reduce_sum(total)
    losses.append(total.item() / batch.trained_tokens)
if distributed.rank() == 0:
    print("losses:", *losses)
engine.close()
distributed.shutdown()
"""


def test_a_rank_that_sees_its_own_gpu_alone_takes_it():
    """As under `srun --gpus-per-task=1`: the second of its host, and its GPU is the first that it sees."""
    code = "import os; from harness import distributed, world; print(distributed.init(world.World(local_rank=1), use_gpu=True, timeout_minutes=1), os.environ['LOCAL_RANK'])"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["cuda:0 0"], done.stderr


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_fp16_with_loss_scaling_learns(device, tmp_path, name):
    losses = trained(device, name, "fp16", str(tmp_path))
    assert all(math.isfinite(loss) for loss in losses)


PACKED = 320
"""Tokens of a row in which pieces are packed."""
CUTS = [{1, 2, 100, 163}, {255}, set()]
LONG = 16_384
"""Tokens of a row whose dense mask takes 256 MiB at a byte an entry."""


def packed_config(kind: str, name: str, precision: str, *, length: int = PACKED, layers: int = 2, width: int = 128) -> Any:
    """Four heads, and weights large enough for attention to matter."""
    positions = {"n_positions": length} if kind == "gpt2" else {"max_position_embeddings": length}
    config = tiny_config(kind, width=width, layers=layers, initializer_range=0.1, **positions)
    use_attention(config, name, device_type="cuda", precision=precision, sequence_length=length)
    return config


def packed_models(device: torch.device, kind: str, *settings: tuple[str, str]) -> list[Any]:
    """A model for each (attention, precision), all of the same weights, which 16 bit hold exactly."""
    models = [
        build(packed_config(kind, name, precision), path=None, precision=precision, seed=0, zero3=False).to(device) for name, precision in settings
    ]
    weights = {name: tensor.bfloat16().half().float() for name, tensor in models[0].state_dict().items()}
    for model in models:
        model.load_state_dict(weights)
    return models


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of the second's size."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def needs(name: str, kind: str = "llama") -> None:
    """Skip where this GPU or this machine cannot do it."""
    config = tiny_config(kind, width=128)
    missing = attention.gpu_obstacle(config) if name == "varlen" else not attention.flex_fits(config) and f"no flex attention for {kind}"
    if missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("kind, precision, name", [
    ("gpt2", "bf16", "varlen"), ("gpt2", "fp16", "varlen"), ("llama", "bf16", "varlen"), ("llama", "fp16", "varlen"),
    ("llama", "bf16", "flex_attention"),
])
@torch.no_grad()
def test_packed_pieces_have_the_logits_that_they_have_alone(device, monkeypatch, kind, precision, name):
    """Rounding in bf16 makes 1% of them here, and a piece that saw another more than 20%."""
    needs(name, kind)
    monkeypatch.setattr(pieces, "_by_piece", None)  # on a GPU in 16 bit it is the kernel that answers
    ours, dense, exact = (model.eval() for model in packed_models(device, kind, (name, precision), ("sdpa", precision), ("sdpa", "fp32")))
    ids, positions, borders = (tensor.to(device) if torch.is_tensor(tensor) else tensor for tensor in packed(CUTS, length=PACKED))

    def logits(model: Any, positions: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits

    def alone(model: Any) -> torch.Tensor:
        parts = [model(input_ids=ids[row, a:b][None], position_ids=positions[row, a:b][None], use_cache=False).logits[0] for row, a, b in borders]
        return torch.cat(parts).view(len(ids), PACKED, -1)

    together, reference = logits(ours, positions), alone(exact)
    assert error(together, reference) <= 2e-2 and error(together, alone(dense)) <= 2e-2
    assert error(logits(ours, torch.arange(PACKED, device=device).expand_as(ids)), reference) > 0.2, "else nothing was compared"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_packed_gradients_are_those_of_the_dense_mask(device, monkeypatch, kind, checkpointing):
    needs("varlen", kind)
    monkeypatch.setattr(pieces, "_by_piece", None)
    ids, positions, _ = packed(CUTS, length=PACKED)
    ids, positions = ids.to(device), positions.to(device)
    gradients = []
    for model in packed_models(device, kind, ("varlen", "bf16"), ("sdpa", "bf16"), ("sdpa", "fp32")):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    ours, dense, exact = gradients
    assert error(dense, exact) <= 0.1, "what bf16 alone makes of them"
    assert error(ours, exact) <= 1.5 * error(dense, exact) and error(ours, dense) <= 2 * error(dense, exact)


def test_in_fp32_each_piece_is_a_call_of_sdpa(device):
    ours, dense = packed_models(device, "llama", ("varlen", "fp32"), ("sdpa", "fp32"))
    ids, positions, _ = (tensor.to(device) if torch.is_tensor(tensor) else tensor for tensor in packed(CUTS, length=PACKED))
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids, position_ids=positions, use_cache=False).logits for model in (ours, dense)]
    assert error(*logits) <= 1e-5


def peak_bytes(device: torch.device, name: str) -> int:
    """What one forward and backward pass of a long packed row adds to the memory in use, without a head."""
    config = packed_config("llama", name, "bf16", length=LONG, layers=1, width=64)
    model = build(config, path=None, precision="bf16", seed=0, zero3=False).to(device).train()
    ids, positions, _ = packed([set(range(1000, LONG, 1000))], length=LONG)
    ids, positions = ids.to(device), positions.to(device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float().sum().backward()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def test_no_mask_grows_with_the_square_of_the_row(device):
    needs("varlen")
    assert peak_bytes(device, "varlen") < LONG * LONG <= peak_bytes(device, "sdpa")


def test_auto_takes_the_kernel_where_there_is_one(device):
    config = tiny_config("llama", width=128)
    needs("varlen")
    for precision, expected in (("bf16", VARLEN), ("fp16", VARLEN), ("fp32", "sdpa")):
        assert choose_attention("auto", config, device_type="cuda", precision=precision, sequence_length=PACKED) == expected
