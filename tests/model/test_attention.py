"""Attention by pieces: the numbers of the dense mask, one set of pieces a forward pass, and refused or left alone where it does not fit."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig
from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function, sdpa_mask

from harness.config.load import Loaded
from harness.config.schema import RunFile
from harness.errors import Refused
from harness.model import attention
from harness.model import pieces as by_pieces
from harness.model.attention import PLAIN, VARLEN, choose_attention, use_attention
from harness.model.build import build, enable_activation_checkpointing
from harness.model.configure import load_config
from harness.model.pieces import Pieces, pieces_mask
from harness.testing.models import ARCHITECTURES, VOCABULARY, tiny_architecture, tiny_config
from tests.model.test_packing import LENGTH, TOLERANCE, config_of, packed

CUTS = [{1, 2, 9, 30}, {17}, set()]
OTHERS = sorted(PLAIN - set(ARCHITECTURES))
FIELDS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi3": {"pad_token_id": 0},
    "smollm3": {"pad_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
}
"""What keeps a tiny model tiny."""


def model_of(kind: str, name: str, *, checkpointing: int = 0) -> Any:
    model = build(config_of(kind, name, **FIELDS.get(kind, {})), path=None, precision="fp32", seed=0, zero3=False).train()
    enable_activation_checkpointing(model, checkpointing)
    return model


def logits_and_gradients(model: Any, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_same(kind: str, *, checkpointing: int = 0) -> None:
    """Logits and gradients by pieces are those of the dense mask."""
    ids, positions, _ = packed(CUTS)
    dense_logits, dense = logits_and_gradients(model_of(kind, "sdpa"), ids, positions)
    logits, gradients = logits_and_gradients(model_of(kind, "varlen", checkpointing=checkpointing), ids, positions)
    assert (logits - dense_logits).abs().max() <= TOLERANCE * dense_logits.abs().max()
    assert gradients.keys() == dense.keys()
    for name, gradient in gradients.items():
        assert (gradient - dense[name]).abs().max() <= TOLERANCE * max(1.0, dense[name].abs().max().item()), name
    assert max(gradient.abs().max().item() for gradient in dense.values()) > 1e-3, "there is something to compare"


@pytest.mark.parametrize("checkpointing", [0, 1])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_and_gradients_are_those_of_the_dense_mask(kind, checkpointing):
    check_same(kind, checkpointing=checkpointing)


@pytest.mark.parametrize("kind", OTHERS)
def test_every_type_that_is_said_to_be_plain(kind):
    check_same(kind)


@pytest.mark.parametrize("kind", sorted(PLAIN))
def test_pieces_are_found_once_and_used_by_every_layer(kind, monkeypatch):
    found, used = [], []
    between, attend = Pieces.between, by_pieces._attend
    monkeypatch.setattr(Pieces, "between", lambda begins: found.append(1) or between(begins))
    monkeypatch.setattr(by_pieces, "_attend", lambda *given: used.append(given[3]) or attend(*given))
    ids, positions, pieces = packed(CUTS)
    model_of(kind, "varlen")(input_ids=ids, position_ids=positions, use_cache=False)
    assert len(found) == 1 and len(used) == 2 and used[0] is used[1]
    assert used[0].lengths == tuple(end - begin for _, begin, end in pieces) and used[0].longest == LENGTH
    assert used[0].bounds.tolist() == [row * LENGTH + begin for row, begin, _ in pieces] + [3 * LENGTH] and used[0].bounds.dtype == torch.int32


@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_kernel_is_called_as_it_is_declared(kind, grouping, monkeypatch):
    """A stand-in with the declaration of torch's kernel, also of the older one that knows no groups of heads, on the way of a GPU."""
    declared = inspect.signature(varlen.varlen_attn)
    if not grouping:
        declared = declared.replace(parameters=[p for name, p in declared.parameters.items() if name != "enable_gqa"])

    def kernel(*given: Any, **named: Any) -> torch.Tensor:
        bound = declared.bind(*given, **named)
        bound.apply_defaults()
        told = bound.arguments
        assert told["window_size"] == (-1, 0) and told["cu_seq_q"] is told["cu_seq_k"] and told["cu_seq_q"].dtype == torch.int32
        assert told["max_q"] == told["max_k"] == LENGTH
        assert (told["query"].shape[1] != told["key"].shape[1]) == told.get("enable_gqa", False)
        assert all(told[name].stride(-1) == 1 for name in ("query", "key", "value")), "the kernel's own condition"
        pieces = Pieces(told["cu_seq_q"], tuple(told["cu_seq_q"].diff().tolist()))
        return by_pieces._by_piece(told["query"], told["key"], told["value"], pieces, told["scale"])

    kernel.__signature__ = declared  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    chosen = by_pieces.kernel.__wrapped__()
    assert chosen is not None
    monkeypatch.setattr(by_pieces, "_attend", lambda q, k, v, pieces, scale: chosen(q, k, v, pieces.bounds, pieces.longest, scale))
    check_same(kind)


def test_torch_s_own_kernel_takes_the_call():
    """On torch's meta device, where its declaration is checked and nothing is computed, forward and backward."""
    query, key, value = (torch.empty((640, heads, 32), dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2))
    kernel = by_pieces.kernel()
    assert kernel is not None
    answer = kernel(query, key, value, torch.empty(6, dtype=torch.int32, device="meta"), 255, 0.2)
    answer.float().sum().backward()
    assert answer.shape == query.shape and query.grad.shape == query.shape and key.grad.shape == value.grad.shape == key.shape


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        for tensor in given if isinstance(given, tuple | list) else [given]:
            if isinstance(tensor, torch.Tensor):
                self.num_bytes = max(self.num_bytes, tensor.untyped_storage().nbytes())
        return given


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_no_tensor_grows_with_the_square_of_the_row(kind):
    length, largest = 1024, {}
    ids, positions, _ = packed([set(range(90, length, 90))], length=length)
    for name in ("sdpa", "varlen"):
        config = config_of(kind, name, **{"n_positions" if kind == "gpt2" else "max_position_embeddings": length})
        model = build(config, path=None, precision="fp32", seed=0, zero3=False)
        with Largest() as seen:
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.sum().backward()
        largest[name] = seen.num_bytes
    assert largest["varlen"] < length * length <= largest["sdpa"]


def test_an_older_kernel_without_a_scale_is_passed_over(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None: query)
    assert by_pieces.kernel.__wrapped__() is None


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_generation_is_that_of_sdpa(kind):
    prompt = torch.arange(1, 12)[None]
    padded = torch.cat([torch.zeros((1, 3), dtype=torch.int64), prompt[:, 3:]], dim=1)
    for ids, mask in ((prompt, torch.ones_like(prompt)), (torch.cat([prompt, padded]), torch.cat([torch.ones_like(prompt), (padded != 0).long()]))):
        answers = [
            model_of(kind, name).eval().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=cached, pad_token_id=0)
            for name, cached in (("sdpa", True), ("varlen", True), ("varlen", False))
        ]
        assert answers[0].shape[1] > ids.shape[1]
        assert all(torch.equal(answer, answers[0]) for answer in answers[1:])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_padded_rows_get_the_dense_mask(kind):
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        dense, ours = (model_of(kind, name).eval()(input_ids=ids, attention_mask=mask).logits for name in ("sdpa", "varlen"))
    assert torch.allclose(dense, ours, atol=TOLERANCE)


UNUSUAL: dict[str, dict[str, Any]] = {
    "one piece a row": {"allow_is_causal_skip": True, "mask_function": causal_mask_function},
    "padded": {"attention_mask": torch.tensor([[True] * 6, [True] * 4 + [False] * 2])},
    "with a cache": {"q_length": 2, "q_offset": 4},
    "a longer cache": {"kv_length": 8, "mask_function": causal_mask_function},
    "a cache that keeps its place on the device": {"q_offset": torch.tensor(0)},
    "a window": {"local_size": 5},
    "a pattern of its own": {"use_vmap": True},
    "not causal": {"allow_is_bidirectional_skip": False},
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_only_packed_causal_rows_become_pieces(case):
    pieces = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2]])
    given = {"batch_size": 2, "q_length": 6, "kv_length": 6, "allow_is_causal_skip": False,
             "mask_function": and_masks(packed_sequence_mask_function(pieces), causal_mask_function)}
    assert pieces_mask(**given).lengths == (2, 4, 1, 3, 2)
    dense, ours = (mask(**given | UNUSUAL[case]) for mask in (sdpa_mask, pieces_mask))
    assert ours is None if dense is None else torch.equal(ours, dense)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_window_shorter_than_the_row_is_right_even_where_it_slips_through(kind):
    window = {"sliding_window": 6, **({"use_sliding_window": True, "max_window_layers": 1} if kind == "qwen2" else {})}
    ids, positions, _ = packed(CUTS)
    logits = []
    for name in ("sdpa", VARLEN):
        config = tiny_config(kind, initializer_range=0.3, **window)
        use_attention(config, name, device_type="cpu", precision="fp32", sequence_length=LENGTH)
        model = build(config, path=None, precision="fp32", seed=0, zero3=False).eval()
        logits.append(model(input_ids=ids, position_ids=positions, use_cache=False).logits)
    assert torch.allclose(*logits, atol=TOLERANCE)


def chosen(setting: str, kind: str, *, device: str = "cuda", precision: str = "bf16", length: int = LENGTH, **fields: Any) -> str:
    return choose_attention(setting, tiny_config(kind, **fields), device_type=device, precision=precision, sequence_length=length)


@pytest.fixture
def capable(monkeypatch):
    """A GPU that has the kernel, on a machine that compiles."""
    monkeypatch.setattr(attention, "gpu_obstacle", lambda config: None)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(attention.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_auto_takes_what_fits(capable, monkeypatch):
    assert chosen("auto", "llama") == VARLEN
    assert chosen("auto", "gpt2", precision="fp16") == VARLEN
    assert chosen("auto", "llama", precision="fp32") == "sdpa"
    assert chosen("auto", "llama", device="cpu") == "sdpa"
    assert chosen("auto", "gemma2", device="cpu", head_dim=16) == "eager", "its scores are capped, which sdpa does not know"
    assert chosen("auto", "mistral", width=64, sliding_window=LENGTH) == VARLEN
    assert chosen("auto", "mistral", width=64, sliding_window=LENGTH - 1) == "flex_attention"
    assert chosen("auto", "gemma2", head_dim=16) == "flex_attention"
    assert chosen("auto", "llama", width=64, dropout=0.1) == "sdpa", "neither has dropout"
    assert chosen("auto", "mistral", width=96, sliding_window=8) == "sdpa", "nor heads 24 wide"
    assert chosen("auto", "mistral", width=32, sliding_window=8) == "sdpa", "flex attention takes no heads 8 wide"
    assert chosen("auto", "gemma4_text", width=64, head_dim=16, global_head_dim=32) == "sdpa", "its layers have heads of two widths"
    assert chosen("auto", "gemma4_text", width=64, head_dim=16, global_head_dim=16) == "flex_attention"
    monkeypatch.setattr(attention, "gpu_obstacle", lambda config: "no kernel")
    assert chosen("auto", "llama", width=64) == "flex_attention"
    assert chosen("auto", "gpt2", width=64) == "sdpa", "transformers' GPT-2 has no flex attention"
    monkeypatch.setattr(attention.shutil, "which", lambda name: None)
    assert chosen("auto", "llama", width=64) == "sdpa"


def test_a_model_with_code_of_its_own_computes_it_as_all_can(capable):
    """transformers raises where such a class does not say that it can do sdpa."""

    class Own(PretrainedConfig):
        model_type = "own"

    assert choose_attention("auto", Own(), device_type="cuda", precision="bf16", sequence_length=LENGTH) == "eager"


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2", "flex_attention"])
def test_a_name_of_transformers_is_taken_as_it_is(name):
    assert chosen(name, "llama") == name


@pytest.mark.parametrize("kind, fields, said", [
    ("mistral", {"sliding_window": 8}, "sliding_window=8 is shorter than a row of 40 tokens"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding_window=8"),
    ("gpt2", {"dropout": 0.1}, "model.dropout=0"),
    ("llama", {"dropout": 0.1}, "model.dropout=0"),
    ("gemma2", {"head_dim": 8}, "not tried with a model of type 'gemma2'"),
])
def test_varlen_is_refused_where_it_would_be_wrong(capable, kind, fields, said):
    with pytest.raises(Refused, match="model.attention=auto") as refused:
        chosen("varlen", kind, **fields)
    assert said in str(refused.value)


def test_varlen_is_refused_where_the_gpu_lacks_it(monkeypatch):
    monkeypatch.setattr(attention, "kernel", lambda: None)
    with pytest.raises(Refused, match="has no kernel"):
        chosen("varlen", "llama")
    assert chosen("varlen", "llama", precision="fp32") == VARLEN, "there each piece is a call of sdpa"


def loaded(tmp_path: Any, **model: Any) -> Loaded:
    return Loaded(RunFile.model_validate({
        "run_dir": "unused", "data": {"dir": "unused", "train": {"path": "unused"}, "sequence_length": LENGTH},
        "model": model, "train": {"steps": 1, "global_batch_rows": 1}, "optimizer": {"lr": 1e-3},
    }), {})


def test_a_run_file_is_refused_before_a_model_is_built(tmp_path):
    with pytest.raises(Refused, match="model.attention"):
        load_config(loaded(tmp_path, architecture=tiny_architecture("gpt2", dropout=0.1), attention="varlen"))
    config = load_config(loaded(tmp_path, architecture=tiny_architecture("gpt2", dropout=0.1), attention="varlen", dropout=0.0))
    assert config._attn_implementation == VARLEN
    assert load_config(loaded(tmp_path, architecture=tiny_architecture("gpt2")))._attn_implementation == "sdpa"


def test_a_saved_configuration_does_not_know_of_it(tmp_path):
    """`write_description`, from which an export takes its config.json, saves the configuration; a model that is saved does, too."""
    from transformers import AutoModelForCausalLM

    model = model_of("llama", "varlen")
    model.config.save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "model")
    for folder in ("config", "model"):
        text = (tmp_path / folder / "config.json").read_text()
        assert VARLEN not in text and "attn_implementation" not in json.loads(text)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config._attn_implementation == "sdpa"


def engine_answers(name: str, stages: int, setting: str) -> tuple[list[float], list[list[int]], str]:
    """On a rank: losses of three steps with recomputed blocks, then an answer, and what the engine chose."""
    from harness import distributed
    from harness.engine.open import open_engine
    from harness.testing.rows import cut, random_rows
    from harness.world import Grid
    from tests.engine import work

    run = work.run_file(micro_batch=2, checkpointing=1, stages=stages)
    run = run.model_copy(update={"model": run.model.model_copy(update={"attention": setting})})
    grid = Grid(stages, distributed.size(), distributed.rank())
    config = tiny_config("llama", initializer_range=0.3)
    engine = open_engine(run, config, work.ds_config(name, run, ranks=grid.dp_size, nvme=""), device=torch.device("cpu"), weights=None)
    losses = []
    for step in (1, 2, 3):
        batch = cut(random_rows(step, rows=work.ROWS, length=work.LENGTH, vocabulary=VOCABULARY), micro_batch=2, rank=grid.dp_rank, ranks=grid.dp_size)
        total = engine.train_step(batch, step=step, lr=1e-2).loss_sum.clone()
        distributed.all_reduce_sum(total)
        losses.append(total.item() / batch.trained_tokens)
    answers = engine.generate([[5, 6, 7], [9]], stop_ids=[0], max_new_tokens=8)
    engine.close()
    distributed.barrier()
    return losses, answers, config._attn_implementation


@pytest.mark.parametrize("name, stages", [("zero3", 1), ("zero1", 2)])
def test_both_engines(ranks2, name, stages):
    """Trained and answered alike; ZeRO-3's hooks and DeepSpeed's pipeline carry the pieces."""
    dense, ours = (ranks2.run(engine_answers, name, stages, setting)[0] for setting in ("auto", "varlen"))
    assert (dense[2], ours[2]) == ("sdpa", VARLEN)
    assert ours[0] == pytest.approx(dense[0], rel=2e-6) and ours[1] == dense[1]
