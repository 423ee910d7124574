"""One pipeline stage of a Hugging Face causal language model: transformers' own modules, cut, with only this stage's weights in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import Failure, Refused, first_line
from harness.files import read_json
from harness.model.build import DTYPES, fuse_activations, initialize
from harness.model.families import Family, family_of
from harness.model.head import ChunkedHead
from harness.model.partition import skeleton

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class _NoPositions(nn.Module):
    """What stands in for the position embedding behind the first stage, where positions were added already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """A zero that takes the type of what it is added to."""
        return torch.zeros((), device=position_ids.device)


class Stage(nn.Module):
    """Consecutive blocks of a model, with the embeddings in front of the first ones and norm and head behind the last.

    Args:
        model: the whole model, of which this stage's parameters are in memory and the others on torch's meta device.
        family: where its parts are.
        bounds: first block and the one after the last.
        names: identity of each of this stage's parameters -> its Hugging Face name.

    Attributes:
        is_first: whether it takes token ids rather than hidden states.
        is_last: whether it gives logits rather than hidden states.
        names: its own name of each parameter -> the Hugging Face name, tied ones once.
        judged: what `head` answered last.
    """

    judged: torch.Tensor | None = None

    def __init__(self, model: Any, family: Family, bounds: tuple[int, int], names: dict[int, str]):
        super().__init__()
        self.family, self.bounds = family, bounds
        num_blocks = len(getattr(getattr(model, family.base), family.blocks))
        self.is_first, self.is_last = bounds[0] == 0, bounds[1] == num_blocks
        self.model = model
        self._cut()
        self.names = {name: names[id(parameter)] for name, parameter in self.named_parameters()}

    def _cut(self) -> None:
        """Take out what other stages compute; the decoder's own forward runs what is left."""
        base, (first, stop) = getattr(self.model, self.family.base), self.bounds
        base.config = copy.deepcopy(base.config)
        if getattr(base.config, "layer_types", None):
            base.config.layer_types = list(base.config.layer_types)[first:stop]
        base.config.num_hidden_layers = stop - first
        setattr(base, self.family.blocks, nn.ModuleList(list(getattr(base, self.family.blocks))[first:stop]))
        if not self.is_first:
            for name in self.family.embeddings:
                setattr(base, name, _NoPositions() if name == self.family.position_embedding else nn.Identity())
        if not self.is_last:
            setattr(base, self.family.norm, nn.Identity())
            self.model.set_output_embeddings(nn.Identity())

    def forward(self, inputs: tuple[torch.Tensor, torch.Tensor]) -> Any:
        """One micro-batch.

        Args:
            inputs: token ids int64 [rows, length] on the first stage, else hidden states [rows, length, width]; and the
                positions, int64 [rows, length], from 0 in each piece: by them every stage builds its own mask.

        Returns:
            hidden states and positions, or on the last stage what `loss` and `logits` take.
        """
        carried, positions = inputs
        key = "input_ids" if self.is_first else "inputs_embeds"
        hidden = getattr(self.model, self.family.base)(**{key: carried}, position_ids=positions, use_cache=False).last_hidden_state
        if not self.is_last:
            return hidden, positions
        return hidden if self.head is not None else self.model.get_output_embeddings()(hidden)

    @property
    def head(self) -> ChunkedHead | None:
        """What computes the loss in chunks, on the last stage where it does; then the stage's output are hidden states."""
        found = self.model.get_output_embeddings() if self.is_last else None
        return found if isinstance(found, ChunkedHead) else None

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """Logits [rows, length, vocabulary], from the last stage's output."""
        return output if self.head is None else self.head(output)

    def loss(self, output: torch.Tensor, labels: torch.Tensor, *, tokens: int) -> torch.Tensor:
        """The model's own loss: the sum over the trained tokens, divided by `tokens`."""
        if self.head is not None:
            with self.head.judging(labels):
                answer = self.head(output)
            self.judged = answer.detach()
            return answer[0] / tokens
        return self.model.loss_function(
            logits=output, labels=labels, vocab_size=self.model.config.get_text_config().vocab_size, num_items_in_batch=tokens
        )

    def parameter_names(self) -> dict[int, str]:
        """Identity of each parameter -> its Hugging Face name."""
        return {id(parameter): self.names[name] for name, parameter in self.named_parameters()}

    @property
    def shared_embedding(self) -> nn.Parameter | None:
        """The weight of token embedding and head on an outer stage of a tied model, else None."""
        if not getattr(self.model.config, "tie_word_embeddings", False) or self.is_first == self.is_last:
            return None
        module = getattr(getattr(self.model, self.family.base), self.family.token_embedding) if self.is_first else self.model.get_output_embeddings()
        return module.weight


def build_stage(
    config: PretrainedConfig, bounds: tuple[int, ...], pp_stage: int, *, weights: str | None, precision: str, seed: int, fresh: bool = True
) -> Stage:
    """Build one stage; at no moment is more in memory than its own parameters and one tensor.

    Args:
        config: of the model.
        bounds: of all stages.
        pp_stage: which one.
        weights: folder or hub name to read from, or None for fresh ones keyed by (seed, module name).
        precision: fp32 or bf16.
        seed: of the fresh weights.
        fresh: without a folder, whether weights are made; else they are whatever memory held, for a checkpoint to follow.

    Raises:
        Refused: when the weights are not in safetensors files.
        Failure: when a tensor of the stage is missing there.
    """
    family = family_of(config)
    model = skeleton(config, DTYPES[precision])
    model.loss_type = model.loss_type or "ForCausalLM"
    first, stop = bounds[pp_stage], bounds[pp_stage + 1]
    names = _materialize(model, family, first, stop)
    base = getattr(model, family.base)
    if family.rotary:
        setattr(base, family.rotary, type(getattr(base, family.rotary))(config=config))
    if weights is not None:
        _read(model, family, weights, list(names.values()))
    elif fresh:
        initialize(model, seed=seed, zero3=False)
    fuse_activations(model)
    return Stage(model, family, (first, stop), names)


def _materialize(model: Any, family: Family, first: int, stop: int) -> dict[int, str]:
    """Give the stage's parameters memory, tied ones once; identity -> name of each."""
    base = getattr(model, family.base)
    blocks = getattr(base, family.blocks)
    modules = list(blocks[first:stop])
    if first == 0:
        modules += [getattr(base, name) for name in family.embeddings]
    if stop == len(blocks):
        modules += [getattr(base, family.norm), model.get_output_embeddings()]
    owned = {id(parameter) for module in modules for parameter in module.parameters()}
    fresh: dict[int, nn.Parameter] = {}
    names = {}
    for name, parameter in list(model.named_parameters()):
        if id(parameter) in owned:
            fresh[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"))
            names[id(fresh[id(parameter)])] = name
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in fresh:
                module._parameters[key] = fresh[id(parameter)]
    return names


@torch.no_grad()
def _read(model: Any, family: Family, weights: str, names: list[str]) -> None:
    """Read the named tensors, one after another, straight into their place."""
    from safetensors import safe_open

    stored = _stored_names(weights, family, prefix=f"{model.base_model_prefix}.")
    missing = [name for name in names if name not in stored]
    if missing:
        raise Failure(f"{weights} holds no tensor for {', '.join(missing[:3])}.")
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name][0], []).append(name)
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt") as file:
            for name in wanted:
                model.get_parameter(name).copy_(file.get_tensor(stored[name][1]))


def _stored_names(weights: str, family: Family, *, prefix: str) -> dict[str, tuple[Path, str]]:
    """What the tensors are called now -> the file that holds each, and its name there."""
    found = {}
    for path, key in _tensors(safetensors_folder(weights)):
        name = key
        for old, new in family.older_names.items():
            name = new + name.removeprefix(old) if name.startswith(old) else name
        found[name] = found[prefix + name] = (path, key)  # files of the bare decoder leave the prefix out
    return found


def _tensors(folder: Path) -> list[tuple[Path, str]]:
    from safetensors import safe_open

    if (folder / _INDEX).is_file():
        return [(folder / file, key) for key, file in read_json(folder / _INDEX)["weight_map"].items()]
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return [(folder / _SINGLE, key) for key in file.keys()]


def safetensors_folder(weights: str, *, where: str = "model.path") -> Path:
    """The local folder of a model's safetensors files, fetched from the hub when it is a name there.

    Raises:
        Refused: when there are none.
    """
    folder = Path(weights)
    if not folder.is_dir():
        folder = _from_hub(weights, where)
    if not (folder / _INDEX).is_file() and not (folder / _SINGLE).is_file():
        raise Refused(
            f"{weights!r} has no safetensors files, from which a pipeline stage can read its own tensors alone.", where=where,
            remedy="Load and save the model once with transformers (`save_pretrained`), or set engine.pipeline_stages=1.",
        )
    return folder


def _from_hub(name: str, where: str) -> Path:
    """The folder of the files that the index of `name` lists, or of its only one; other files of the repository are left there."""
    from huggingface_hub import file_exists, hf_hub_download, snapshot_download, try_to_load_from_cache

    try:
        if isinstance(try_to_load_from_cache(name, _INDEX), str) or file_exists(name, _INDEX):
            files = sorted(set(read_json(Path(hf_hub_download(name, _INDEX)))["weight_map"].values()))
            return Path(snapshot_download(name, allow_patterns=[_INDEX, *files]))
        return Path(hf_hub_download(name, _SINGLE)).parent
    except Exception as error:
        raise Refused(
            f"The weights of {name!r} cannot be fetched: {first_line(error)}", where=where,
            remedy="Check the name and the network, or give a folder with safetensors files.",
        ) from None
