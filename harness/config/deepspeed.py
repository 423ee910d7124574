"""The one place where a DeepSpeed JSON and the run file become one configuration."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from harness.config.batch import BatchEquation
from harness.config.load import Loaded
from harness.errors import Refused

OWNED_BY_RUN_FILE = {
    "train_batch_size": "train.global_batch_rows",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch_rows",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "data_types": "train.accumulate_in",
    "gradient_clipping": "train.clip",
    "activation_checkpointing": "train.activation_checkpointing",
    "pipeline": "engine.pipeline_stages",
    "tensorboard": "nothing: the harness writes TensorBoard itself",
    "checkpoint": "checkpoint",
}


def shipped_folder() -> Path:
    """The folder of the configurations that ship with the harness."""
    beside = Path(__file__).resolve().parents[2] / "ds_configs"
    return beside if beside.is_dir() else Path(__file__).resolve().parents[1] / "ds_configs"


def shipped_names() -> list[str]:
    """The names that `engine.deepspeed` takes."""
    return sorted(path.stem for path in shipped_folder().glob("*.json"))


def read_deepspeed(loaded: Loaded) -> tuple[dict[str, Any], Path]:
    """The DeepSpeed JSON that the run file names, and its path.

    Raises:
        Refused: when it is missing, not JSON, or sets what the run file owns.
    """
    name, where = loaded.run.engine.deepspeed, loaded.origin("engine.deepspeed")
    path = Path(name) if name.endswith(".json") else shipped_folder() / f"{name}.json"
    if not path.is_file():
        raise Refused(
            f"There is no DeepSpeed configuration {name!r}.", where=f"engine.deepspeed ({where})",
            remedy=f"Use one of {', '.join(shipped_names())}, or the path of a .json file.",
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise Refused(f"The DeepSpeed configuration is not valid JSON: {error}", where=str(path), remedy="Mend the file.") from None
    if not isinstance(config, dict):
        raise Refused("The DeepSpeed configuration is not a JSON object.", where=str(path), remedy="Write it as {...}.")
    _refuse_doubles(config, path, loaded)
    return config, path


def _refuse_doubles(config: dict[str, Any], path: Path, loaded: Loaded) -> None:
    for key, owner in OWNED_BY_RUN_FILE.items():
        if key in config:
            section = owner.partition(":")[0]
            raise Refused(
                f"`{key}` stands in the DeepSpeed configuration, but the run file owns it as `{owner}`.",
                where=f"{path} and {section} ({loaded.origin(section)})", remedy=f"Remove `{key}` from {path.name}.",
            )
    for key in ("tensor_parallel", "expert_parallel"):
        if key in config:
            raise Refused(
                f"`{key}` lets ranks share a row, but here each of them trains on rows of its own.",
                where=str(path), remedy="Remove the key; ZeRO-3 and `engine.pipeline_stages` share a model among ranks.",
            )
    for device in ("offload_optimizer", "offload_param"):
        if "nvme_path" in (zero(config).get(device) or {}):
            raise Refused(
                f"`zero_optimization.{device}.nvme_path` stands in the DeepSpeed configuration; it belongs to the machine.",
                where=str(path), remedy="Remove it and set `engine.nvme_dir`.",
            )
    if zero(config).get("round_robin_gradients"):
        raise Refused(
            "`round_robin_gradients` moves gradients between ranks so that a checkpoint would hold wrong names.",
            where=str(path), remedy="Remove the key.",
        )


def zero(config: dict[str, Any]) -> dict[str, Any]:
    """The `zero_optimization` part of a DeepSpeed configuration."""
    return config.get("zero_optimization") or {}


def offload_device(config: dict[str, Any], what: str) -> str:
    """`none`, `cpu` or `nvme` for `what` of `optimizer` and `param`."""
    return (zero(config).get(f"offload_{what}") or {}).get("device", "none")


def merge(loaded: Loaded, batch: BatchEquation, *, nvme_path: str | None = None) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a run.

    Args:
        loaded: the run file.
        batch: the cut of the global batch.
        nvme_path: folder of this run on this host's NVMe; rank folders are DeepSpeed's own.

    Returns:
        a configuration for `deepspeed.initialize`, without optimizer and scheduler, which the harness builds.
    """
    base, _ = read_deepspeed(loaded)
    train = loaded.run.train
    config = copy.deepcopy(base)
    config |= {
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": train.clip,
        "zero_allow_untested_optimizer": True,
    }
    config.setdefault("steps_per_print", 2**31 - 1)
    config.setdefault("wall_clock_breakdown", False)
    config.setdefault("timers", {"throughput": {"enabled": False}})
    if train.precision in ("bf16", "fp16"):
        config[train.precision] = {"enabled": True}
    if train.accumulate_in == "fp32":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    for what in ("optimizer", "param"):
        if offload_device(config, what) == "nvme":
            config["zero_optimization"][f"offload_{what}"]["nvme_path"] = nvme_path or loaded.run.engine.nvme_dir
    return config
