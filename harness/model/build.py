"""A causal language model with its weights, whole or partitioned, the same for every ZeRO stage."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import Failure, Refused, first_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def check_weights(path: str, config: PretrainedConfig, *, where: str, trust_code: bool = False) -> None:
    """Refuse weights that do not fit the configuration, without reading them.

    transformers drops this check under ZeRO-3 and would train fresh tensors in silence.

    Raises:
        Refused: naming missing, unexpected and mismatched tensors.
    """
    from transformers import AutoModelForCausalLM

    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            path, config=config, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=trust_code
        )
    except Exception as error:
        raise Refused(f"The weights of {path!r} cannot be read: {first_line(error)}", where=where,
                      remedy="Give a folder with config.json and safetensors files.") from None
    problems = []
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(_name(item) for item in info.get(kind) or ())
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(f"{kind.split('_')[0]}: {shown}")
    if problems:
        raise Refused(f"The weights of {path!r} do not fit its configuration ({'; '.join(problems)}).", where=where,
                      remedy="Use the config.json that was saved with these weights.")


def _name(item: Any) -> str:
    if isinstance(item, str):
        return item
    name, *shapes = item
    return f"{name} {' against '.join(str(tuple(shape)) for shape in shapes if shape is not None)}"


def build(
    config: PretrainedConfig, *, path: str | None, precision: str, seed: int, zero3: bool, trust_code: bool = False, fresh: bool = True
) -> PreTrainedModel:
    """Build the model on CPU, or partitioned over the ranks under ZeRO-3.

    Args:
        config: what to build.
        path: folder or hub name of the weights, or None for fresh ones keyed by (seed, module name).
        precision: fp32, bf16 or fp16: the dtype of every floating-point parameter.
        seed: of the fresh weights.
        zero3: whether a `HfDeepSpeedConfig` of stage 3 is alive, so that parameters are partitioned as they are built.
        trust_code: run code that ships with the model.
        fresh: without a path, whether weights are made; else they are whatever memory held, for a checkpoint to follow.

    Raises:
        Failure: when a parameter came out in another dtype.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    dtype = DTYPES[precision]
    if path is not None:
        model = AutoModelForCausalLM.from_pretrained(path, config=config, dtype=dtype, trust_remote_code=trust_code)
    else:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_code)
        model.tie_weights()  # it belongs to what was left out
        if fresh:
            initialize(model, seed=seed, zero3=zero3)
    fuse_activations(model)
    model.loss_type = model.loss_type or "ForCausalLM"  # GPT2LMHeadModel's name gives none, and transformers warns
    for name, parameter in model.named_parameters():
        held = getattr(parameter, "ds_tensor", parameter).dtype if zero3 else parameter.dtype
        if held != dtype:
            raise Failure(f"{name} was built as {held}, not {dtype}.")
    return model


@torch.no_grad()
def initialize(model: PreTrainedModel, *, seed: int, zero3: bool) -> None:
    """Give every module fresh weights from a generator of its own, children first, by the model's own `_init_weights`.

    The result does not depend on ranks, stages or the order of construction. One module is whole at a time; modules
    whose parameters are all on torch's meta device, as those of other pipeline stages, are passed over.
    """
    for name, module, owner in _children_first(model, "", model):
        parameters = _near_parameters(module)
        if parameters and all(parameter.is_meta for parameter in parameters):
            continue
        with _whole(module, zero3=zero3) as writes:
            if writes:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(derive_seed(seed, "init", name))
                    owner._init_weights(module)


def _children_first(module: torch.nn.Module, name: str, owner: Any) -> Iterator[tuple[str, torch.nn.Module, Any]]:
    from transformers import PreTrainedModel

    for child_name, child in module.named_children():
        child_owner = child if isinstance(child, PreTrainedModel) else owner
        yield from _children_first(child, f"{name}.{child_name}".lstrip("."), child_owner)
    yield name, module, owner


def _near_parameters(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The module's own parameters and its direct children's."""
    return [parameter for near in (module, *module.children()) for parameter in near.parameters(recurse=False)]


@contextlib.contextmanager
def _whole(module: torch.nn.Module, *, zero3: bool) -> Iterator[bool]:
    """Make the module's own and its direct children's parameters whole; yields whether this rank writes."""
    parameters = _near_parameters(module)
    if not zero3 or not parameters:
        yield True
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
        if deepspeed.comm.get_rank() != 0:
            yield False
            return
        gathered = [parameter.data for parameter in parameters]
        for parameter in parameters:
            parameter.data = parameter.data.cpu()  # a GPU's generator draws other numbers than the CPU's
        yield True
        for parameter, data in zip(parameters, gathered, strict=True):
            data.copy_(parameter.data)
            parameter.data = data


def fuse_activations(model: torch.nn.Module) -> None:
    """Compute GPT-2's GELU with torch's one kernel for it, where transformers writes the same formula out in eight."""
    from transformers.activations import NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, torch.nn.GELU(approximate="tanh"))


def enable_activation_checkpointing(model: PreTrainedModel, every: int, *, first_block: int = 0) -> int:
    """Recompute every n-th block in the backward pass.

    Args:
        model: a model of transformers.
        every: 0 for none, 1 for every block, n for every n-th.
        first_block: number of the model's first block, where it is a pipeline stage.

    Returns:
        the number of blocks that are recomputed.

    Raises:
        Refused: when the model does not support it.
    """
    if every == 0:
        return 0
    from transformers.modeling_layers import GradientCheckpointingLayer

    try:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise Refused(str(error), where="train.activation_checkpointing", remedy="Set train.activation_checkpointing=0.") from None
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for number, block in enumerate(blocks, first_block):
        block.gradient_checkpointing = number % every == 0
    return sum(block.gradient_checkpointing for block in blocks)


def decay_groups(model: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which decay, and biases and norms, which do not."""
    matrices, rest = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) >= 2 else rest).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def num_parameters(model: PreTrainedModel) -> int:
    """Parameters of the whole model, tied ones once, also when they are partitioned."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
