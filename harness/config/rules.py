"""What a run file may not combine: every rule that needs neither data nor a model nor a GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from harness.config.batch import batch_equation
from harness.config.deepspeed import offload_device, read_deepspeed, zero
from harness.config.load import Loaded
from harness.errors import Refused

PLACEHOLDER = re.compile(r"(?<![\w{])\{[A-Za-z_]\w*\}(?!\})")


def check(loaded: Loaded, *, ranks: int, has_gpu: bool, here: bool = True) -> None:
    """Refuse what is known wrong from the run file alone.

    Args:
        loaded: the run file.
        ranks: the ranks that met, or that are planned.
        has_gpu: whether the machine trains on a GPU.
        here: the run is on this machine; otherwise its folders are not looked at.

    Raises:
        Refused: with the first rule that is broken.
    """
    _one_of(loaded, "model", ("path", "architecture"))
    check_data(loaded)
    _one_of(loaded, "train", ("steps", "epochs"))
    _world(loaded, ranks)
    batch_equation(loaded, ranks // loaded.run.engine.pipeline_stages or 1)
    _schedule(loaded)
    _patience(loaded)
    config, path = read_deepspeed(loaded)
    _stage_and_pipeline(loaded, config, path)
    _nvme(loaded, config, here)
    _precision(loaded, has_gpu)
    if here:
        _run_dir(loaded)


def check_data(loaded: Loaded) -> None:
    """Those of the section `data`.

    Raises:
        Refused: with the first rule that is broken.
    """
    _one_of(loaded, "data", ("train", "sets"))
    _sets(loaded)
    for key in ("train", "validation"):
        if getattr(loaded.run.data, key) is not None:
            _source(loaded, key)
    _tokenizer(loaded)
    if loaded.run.data.shape == "prompt_completion":
        _template(loaded)


def _one_of(loaded: Loaded, section: str, names: tuple[str, ...]) -> None:
    value: Any = loaded.run
    for part in section.split("."):
        value = getattr(value, part)
    given = [name for name in names if getattr(value, name) is not None]
    if len(given) != 1:
        keys = " and ".join(f"`{section}.{name}`" for name in names)
        problem = f"Exactly one of {keys} must be set; {'all' if len(given) == len(names) else len(given) or 'none'} of them are."
        places = "; ".join(f"{section}.{name} ({loaded.origin(f'{section}.{name}')})" for name in given) or loaded.origin(section)
        raise Refused(problem, where=places, remedy="Keep one (an override `KEY=null` removes a key)." if given else f"Set {keys.replace(' and ', ' or ')}.")


def _sets(loaded: Loaded) -> None:
    data = loaded.run.data
    if data.sets is None:
        if data.dir is None:
            raise Refused("There is no folder for the prepared sets.", where=loaded.origin("data"), remedy="Set `data.dir`.")
        return
    if not data.sets:
        raise Refused("`data.sets` names no set.", where=f"data.sets ({loaded.origin('data.sets')})", remedy="Name at least one prepared set.")
    for key in ("validation", "tokenizer", "train_tokenizer"):
        if getattr(data, key) is not None:
            raise Refused(f"`data.sets` and `data.{key}` are both set: prepared sets bring their own.", where=f"data.{key} ({loaded.origin(f'data.{key}')})",
                          remedy=f"Remove `data.{key}` (an override `data.{key}=null` does).")


def _source(loaded: Loaded, key: str) -> None:
    _one_of(loaded, f"data.{key}", ("path", "hub", "builtin"))
    if getattr(loaded.run.data, key).path in ("", []):
        raise Refused(f"`data.{key}.path` names no file.", where=f"data.{key}.path ({loaded.origin(f'data.{key}.path')})", remedy="Give a file, a list of files or a glob.")


def _template(loaded: Loaded) -> None:
    """Each part holds its own placeholder and no other; the braces of LaTeX's `\\boxed{answer}` are text."""
    for part in ("prompt", "completion"):
        key, own = f"data.template.{part}", f"{{{part}}}"
        text = getattr(loaded.run.data.template, part)
        other = next((found for found in PLACEHOLDER.findall(text) if found != own), None)
        if own not in text or other:
            problem = f"`{key}` holds {other}, which stands for nothing" if other else f"`{key}` does not hold {own}, so every row would read the same"
            raise Refused(f"{problem}.", where=f"{key} ({loaded.origin(key)})", remedy=f"Write {own} where the column named by `data.columns.{part}` is to stand.")


def _tokenizer(loaded: Loaded) -> None:
    data, model = loaded.run.data, loaded.run.model
    if data.tokenizer and data.train_tokenizer:
        raise Refused("`data.tokenizer` and `data.train_tokenizer` are both set.", where=loaded.origin("data.train_tokenizer"), remedy="Keep one.")
    if data.sets is None and not data.tokenizer and not data.train_tokenizer and not model.path:
        raise Refused(
            "There is no tokenizer: the model is built from scratch and none is named.", where=loaded.origin("data"),
            remedy="Set `data.tokenizer` to a folder or name, or `data.train_tokenizer` to train one.",
        )


def _world(loaded: Loaded, ranks: int) -> None:
    expected = loaded.run.launch.ranks
    if expected is not None and expected != ranks:
        raise Refused(
            f"The run file asks for {expected} ranks, but {ranks} met.", where=f"launch.ranks ({loaded.origin('launch.ranks')})",
            remedy=f"Start {expected} ranks, or set launch.ranks={ranks}.",
        )
    stages = loaded.run.engine.pipeline_stages
    if ranks % stages:
        raise Refused(
            f"{ranks} ranks do not divide into pipelines of {stages} stages.",
            where=f"engine.pipeline_stages ({loaded.origin('engine.pipeline_stages')})", remedy="Use a number of ranks that is a multiple of it.",
        )


def _schedule(loaded: Loaded) -> None:
    optimizer = loaded.run.optimizer
    if optimizer.warmup_steps is not None and optimizer.warmup_epochs is not None:
        raise Refused(
            "`optimizer.warmup_steps` and `optimizer.warmup_epochs` are both set.",
            where=loaded.origin("optimizer.warmup_epochs"), remedy="Keep one.",
        )
    steps = loaded.run.train.steps
    if steps is not None and (optimizer.warmup_steps or 0) > steps:
        raise Refused(
            f"The warm-up of {optimizer.warmup_steps} steps is longer than the run of {steps} steps.",
            where=f"optimizer.warmup_steps ({loaded.origin('optimizer.warmup_steps')})", remedy="Shorten it, or train longer.",
        )
    falls = optimizer.schedule == "warmup_stable_decay" and optimizer.decay_steps
    if steps is not None and falls and (optimizer.warmup_steps or 0) + falls > steps:
        raise Refused(
            f"The fall over the last {falls} of {steps} steps reaches into the warm-up of {optimizer.warmup_steps or 0} steps.",
            where=f"optimizer.decay_steps ({loaded.origin('optimizer.decay_steps')})", remedy="Shorten one of them, or train longer.",
        )


def _patience(loaded: Loaded) -> None:
    evaluation = loaded.run.evaluation
    if evaluation.patience is not None and evaluation.every_steps is None:
        raise Refused(
            "`evaluation.patience` counts evaluations, but there is only the one at the end.",
            where=f"evaluation.patience ({loaded.origin('evaluation.patience')})", remedy="Set `evaluation.every_steps`, or remove it.",
        )


def _stage_and_pipeline(loaded: Loaded, config: dict[str, Any], path: Path) -> None:
    stage, stages = zero(config).get("stage", 0), loaded.run.engine.pipeline_stages
    where = f"engine.pipeline_stages ({loaded.origin('engine.pipeline_stages')}) and {path}"
    if stages > 1 and stage > 1:
        raise Refused(
            f"ZeRO-{stage} cannot be used inside {stages} pipeline stages: DeepSpeed reduces gradients once, after the last micro-batch.",
            where=where, remedy="Use engine.deepspeed=zero1 or zero1_offload_cpu with stages, or engine.pipeline_stages=1 with ZeRO-2/3.",
        )
    if stages > 1 and loaded.run.train.precision == "fp16":
        raise Refused(
            "The pipeline trains in bf16 and fp32; loss scaling over stages is not proved.",
            where=f"train.precision ({loaded.origin('train.precision')})", remedy="Set train.precision=bf16, or engine.pipeline_stages=1.",
        )
    if stages > 1 and loaded.run.model.trust_code:
        raise Refused(
            "Code that ships with a model cannot be cut into pipeline stages.", where=f"model.trust_code ({loaded.origin('model.trust_code')})",
            remedy="Set model.trust_code=false, or engine.pipeline_stages=1.",
        )
    if stages > 1:
        _flash_in_stages(loaded)
    if stage == 0 and loaded.run.train.precision != "fp32" and loaded.run.train.accumulate_in == "fp32":
        raise Refused(
            f"DeepSpeed cannot accumulate {loaded.run.train.precision} gradients in fp32 without ZeRO.", where=f"{path} and train.accumulate_in",
            remedy="Use engine.deepspeed=zero1, or set train.accumulate_in=model.",
        )
    if stage not in (0, 1, 2, 3):
        raise Refused(f"There is no ZeRO stage {stage!r}.", where=str(path), remedy="Use 0, 1, 2 or 3.")
    if stage < 3 and offload_device(config, "param") != "none":
        raise Refused("Offload of parameters needs ZeRO-3.", where=str(path), remedy='Set "stage": 3 or remove "offload_param".')
    if stage == 0 and offload_device(config, "optimizer") != "none":
        raise Refused("Offload of the optimizer needs ZeRO-1 or higher.", where=str(path), remedy='Set "stage" or remove "offload_optimizer".')
    if stage < 3 and offload_device(config, "optimizer") == "nvme":
        raise Refused("Offload of the optimizer to NVMe needs ZeRO-3.", where=str(path), remedy='Set "stage": 3 or use "device": "cpu".')


def _flash_in_stages(loaded: Loaded) -> None:
    """transformers tells flash attention of packed documents only where a micro-batch is one row; without stages the model itself is tried."""
    run = loaded.run
    if run.model.attention == "flash_attention_2" and run.data.packing != "none" and max(run.train.micro_batch, run.evaluation.micro_batch or 1) > 1:
        raise Refused(
            f"In pipeline stages {run.model.attention} lets the documents of a packed row see each other where a micro-batch has several rows.",
            where=f"model.attention ({loaded.origin('model.attention')})",
            remedy="Set model.attention=auto, or train.micro_batch=1 and evaluation.micro_batch=1, or data.packing=none.",
        )


def _nvme(loaded: Loaded, config: dict[str, Any], here: bool) -> None:
    if "nvme" not in (offload_device(config, "optimizer"), offload_device(config, "param")):
        return
    folder = loaded.run.engine.nvme_dir
    where = f"engine.nvme_dir ({loaded.origin('engine.nvme_dir')})"
    if folder is None:
        raise Refused("NVMe offload needs a folder on a local disk.", where="engine.nvme_dir", remedy="Set `engine.nvme_dir`.")
    if here:
        _writable(Path(folder), where, "engine.nvme_dir")


def _precision(loaded: Loaded, has_gpu: bool) -> None:
    if loaded.run.train.precision == "fp16" and not has_gpu:
        raise Refused(
            "fp16 needs a GPU; on a CPU there is bf16 and fp32.", where=f"train.precision ({loaded.origin('train.precision')})",
            remedy="Set train.precision=bf16.",
        )
    if loaded.run.engine.device == "cuda" and not has_gpu:
        raise Refused(
            "A GPU is asked for, but torch sees none.", where=f"engine.device ({loaded.origin('engine.device')})",
            remedy="Check the driver and the torch build, or set engine.device=cpu.",
        )


def _run_dir(loaded: Loaded) -> None:
    _writable(loaded.run.run_path, f"run_dir ({loaded.origin('run_dir')})", "run_dir")


def _writable(folder: Path, where: str, key: str) -> None:
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise Refused(f"{folder} cannot be a folder: {existing} is a file.", where=where, remedy=f"Set `{key}` to another place.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Refused(f"{folder} cannot be written: {existing} is read-only for this user.", where=where, remedy=f"Set `{key}` to another place.")
