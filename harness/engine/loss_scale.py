"""The state of dynamic loss scaling: the few numbers by which fp16 training goes on as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_NUMBERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scale_state(engine: DeepSpeedEngine) -> dict[str, float]:
    """The loss scaler's numbers by name; empty where nothing is scaled."""
    scaler = _scaler(engine)
    found = {name: getattr(scaler, name, None) for name in _NUMBERS}
    return {name: value for name, value in found.items() if isinstance(value, int | float)} if _scales(engine) else {}


def restore_loss_scale(engine: DeepSpeedEngine, state: dict[str, float]) -> None:
    """Put back what `loss_scale_state` gave; a number that this engine's scaler does not have is left out."""
    scaler = _scaler(engine)
    if _scales(engine):
        for name, value in state.items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)


def _scales(engine: DeepSpeedEngine) -> bool:
    return bool(engine.fp16_enabled()) and _scaler(engine) is not None


def _scaler(engine: DeepSpeedEngine) -> object | None:
    return getattr(engine.optimizer, "loss_scaler", None) or getattr(engine.optimizer, "loss_scale_config", None)
