"""Which engine a run is trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.engine.at_start import hasten

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from harness.config.schema import RunFile
    from harness.engine.common import CommonEngine


def open_engine(
    run: RunFile, config: PretrainedConfig, ds_config: dict[str, Any], *, device: torch.device, weights: str | None, fresh: bool = True
) -> CommonEngine:
    """The pipeline engine when the run file asks for more than one stage, else the ZeRO engine.

    Args:
        run: the run file.
        config: configuration of the model.
        ds_config: the merged DeepSpeed configuration.
        device: where this rank computes.
        weights: folder or hub name to load from, or None for fresh weights.
        fresh: False where a checkpoint follows, so that no weights need be made.
    """
    hasten()
    if run.engine.pipeline_stages > 1:
        from harness.engine.pipeline import PipelineEngine

        return PipelineEngine(run, config, ds_config, device=device, weights=weights, fresh=fresh)
    from harness.engine.zero import ZeroEngine

    return ZeroEngine(run, config, ds_config, device=device, weights=weights, fresh=fresh)
