"""Whether two states of a run are the same: seals of every tensor, groups of hyper-parameters, rows to come, a probe loss.

All of it is independent of ranks, ZeRO stage, offload and pipeline stages. Masters and moments are fp32 everywhere and are
copied bit for bit, so they are held to their checksums, without a tolerance; norms say by how much they differ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.data.passed import Passed
from harness.formats import digest
from harness.formats.certificate import Certificate, Group, NextRows, Probe, Seal

if TYPE_CHECKING:
    from harness.engine.holdings import SliceGroup

HYPER = ("weight_decay", "betas", "eps")
SHOWN = 5
PROBE_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3, "fp16": 5e-3}
"""Relative, of the probe loss."""
OTHER_DEVICE_TOLERANCE = 1e-3
"""The least that is allowed between two kinds of device, which may round the products of a matrix product otherwise (TF32)."""

Sums = dict[tuple[str, str], tuple[float, int]]
"""(kind, parameter) -> sum of squares, checksum."""

_BLOCK = 8192  # below the size from which OpenBLAS wakes threads, which on busy cores takes a thousand times longer
_ODD = 2 * np.arange(_BLOCK, dtype=np.uint64) + np.uint64(1)
_MASK = (1 << 64) - 1


def sums_of(values: np.ndarray, offset: int) -> tuple[float, int]:
    """Sum of squares and checksum of a slice; those of slices add up to those of the parameter.

    Args:
        values: fp32 [n].
        offset: of the first one in the flattened parameter.
    """
    squares, checksum = 0.0, 0
    with np.errstate(all="ignore"):
        for begin in range(0, len(values), _BLOCK):
            block = values[begin : begin + _BLOCK]
            wide, bits = block.astype(np.float64), block.view(np.uint32).astype(np.uint64)
            squares += float(np.dot(wide, wide))
            checksum += int(np.dot(bits, _ODD[: len(bits)])) + 2 * (offset + begin) * int(bits.sum())
    return squares, checksum & _MASK


def sums_of_group(group: SliceGroup) -> Sums:
    """Of every slice of a group, which has at most one of a parameter."""
    return {
        (kind, part.name): sums_of(group.tensors[kind][part.name].contiguous().numpy(), part.offset)
        for kind in group.tensors for part in group.slices
    }


def add(parts: Iterable[Sums]) -> Sums:
    """Over slices, groups or ranks."""
    total: Sums = {}
    for part in parts:
        for key, (squares, checksum) in part.items():
            before = total.get(key, (0.0, 0))
            total[key] = before[0] + squares, (before[1] + checksum) & _MASK
    return total


def seals(total: Sums) -> dict[str, dict[str, Seal]]:
    """As a certificate has them."""
    found: dict[str, dict[str, Seal]] = {}
    for (kind, name), (squares, checksum) in sorted(total.items()):
        found.setdefault(name, {})[kind] = Seal(norm=math.sqrt(squares), checksum=f"{checksum:016x}")
    return found


def groups_of(parts: Iterable[Mapping[str, Mapping[str, Any]]]) -> tuple[Group, ...]:
    """Groups of all ranks together, from each rank's parameter -> hyper-parameters."""
    names: dict[tuple[Any, ...], set[str]] = {}
    for part in parts:
        for name, values in part.items():
            names.setdefault((values["lr"], values["weight_decay"], tuple(values["betas"]), values["eps"]), set()).add(name)
    return tuple(
        Group(lr=lr, weight_decay=decay, betas=betas, eps=eps, parameters=tuple(sorted(held)))
        for (lr, decay, betas, eps), held in sorted(names.items())
    )


def next_rows(order: Any, *, first: int, count: int, begin: int = 0, passed: Passed = Passed()) -> NextRows:
    """What the next rows are.

    Args:
        order: an `Order` or a `Mixture`.
        first: the cursor.
        count: number of rows; fewer where a mixture ends before.
        begin: rows that were consumed before this order began.
        passed: positions that are left out.
    """
    total = getattr(order, "total_rows", None)
    if total is not None:
        count = max(0, min(count, passed.trained(first, begin + total)))
    ids = passed.rows(order, first, count, begin=begin)
    return NextRows(first=first, count=count, digest=digest.of_bytes(ids.astype("<i8").tobytes()))


def tensor_problems(saved: Certificate, found: Mapping[str, Mapping[str, Seal]], *, adam_step: int) -> list[str]:
    """Where masters, moments or Adam's step count are not those that were saved: a line for each kind."""
    problems = []
    if adam_step != saved.adam_step:
        problems.append(f"Adam's step count is {adam_step} instead of {saved.adam_step}")
    strangers = sorted(saved.tensors.keys() ^ found.keys())
    if strangers:
        problems.append(f"parameters that only one side has: {_listed(strangers)}")
    for kind in sorted({kind for held in saved.tensors.values() for kind in held}):
        other = [
            _difference(name, found[name][kind], held[kind]) for name, held in saved.tensors.items()
            if name in found and found[name][kind].checksum != held[kind].checksum
        ]
        if other:
            problems.append(f"{kind} of {len(other)} of {len(saved.tensors)} parameters has other bits: {_listed(other)}")
    return problems


def _difference(name: str, found: Seal, saved: Seal) -> str:
    share = abs(found.norm - saved.norm) / (saved.norm or 1.0)
    return f"{name} (norm {found.norm:.9g} instead of {saved.norm:.9g}, relative difference {share:.1e}, tolerance 0)"


def group_problems(saved: Iterable[Group], found: Iterable[Group], *, keys: Iterable[str]) -> list[str]:
    """Where a parameter is updated with other hyper-parameters; `keys` are those of which the setting is unchanged."""
    problems = []
    for key in keys:
        before, now = _by_name(saved, key), _by_name(found, key)
        other = [name for name in sorted(before) if now.get(name) != before[name]]
        if other:
            told = [f"{name} ({_values(now.get(name))} instead of {_values(before[name])})" for name in other]
            problems.append(f"{key} of {len(other)} of {len(before)} parameters is another: {_listed(told)}")
    return problems


def _by_name(groups: Iterable[Group], key: str) -> dict[str, set[Any]]:
    found: dict[str, set[Any]] = {}
    for group in groups:
        for name in group.parameters:
            found.setdefault(name, set()).add(getattr(group, key))
    return found


def _values(values: set[Any] | None) -> str:
    return " and ".join(str(value) for value in sorted(values)) if values else "none"


def row_problems(saved: NextRows, found: NextRows) -> list[str]:
    """Where other rows would come next."""
    if found == saved:
        return []
    where = f"from row {found.first:,} instead of {saved.first:,}" if found.first != saved.first else f"from row {saved.first:,} on"
    return [
        f"the next two global batches ({saved.count} rows {where}) are other rows, or in another order "
        f"(digest {found.digest} instead of {saved.digest})"
    ]


def probe_problems(saved: Probe, found: Probe, *, precision: str) -> list[str]:
    """Where the model answers otherwise on the same rows; other validation rows are not compared."""
    if (saved.data_fingerprint, saved.rows) != (found.data_fingerprint, found.rows):
        return []
    if saved.tokens != found.tokens:
        return [f"the probe has {found.tokens} trained tokens instead of {saved.tokens}"]
    if not math.isfinite(saved.loss) and not math.isfinite(found.loss):
        return []
    tolerance = PROBE_TOLERANCE[precision]
    if saved.device != found.device:
        tolerance = max(tolerance, OTHER_DEVICE_TOLERANCE)
    share = abs(found.loss - saved.loss) / (abs(saved.loss) or 1.0)
    if share <= tolerance:
        return []
    return [
        f"the loss of the probe ({saved.rows} validation rows) is {found.loss:.9g} instead of {saved.loss:.9g}: relative difference {share:.1e}, "
        f"tolerance {tolerance:.0e} in {precision} ({saved.device}, now {found.device})"
    ]


def _listed(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (f" and {len(items) - SHOWN} more" if len(items) > SHOWN else "")
