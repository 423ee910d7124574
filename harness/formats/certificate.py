"""What a resumed run must find again, whatever ranks and engine it goes on with: the resume certificate, version 1.

It is a field of a checkpoint's manifest, whose digest vouches for it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Seal(_Part):
    """One kind of one parameter."""

    norm: float = Field(description="L2 norm in float64, for people.")
    checksum: str = Field(description="Sum over the elements of their 32 bits times (2 * index + 1), modulo 2**64, in hex: the verdict.")


class Group(_Part):
    """Hyper-parameters, and the parameters that are updated with them."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    parameters: tuple[str, ...]


class NextRows(_Part):
    """The rows of the next two global batches, in their order."""

    first: int = Field(ge=0, description="The cursor.")
    count: int = Field(ge=0)
    digest: str = Field(description="XXH3-128 of their ids, 64-bit little-endian.")


class Probe(_Part):
    """The loss on the first rows of the first validation set."""

    data_fingerprint: str = Field(description="Of the validation set.")
    rows: int
    tokens: int
    loss: float = Field(description="Mean over the trained tokens, in nats.")
    device: str


class Certificate(_Part):
    """Version 1."""

    version: Literal[1] = VERSION
    adam_step: int
    tensors: dict[str, dict[str, Seal]] = Field(description="Parameter -> kind -> seal.")
    groups: tuple[Group, ...] = ()
    rows: NextRows | None = None
    probe: Probe | None = None
