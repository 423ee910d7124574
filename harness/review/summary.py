"""A run in some twenty numbers, from its own files: what it learned, how fast it was, and what it took."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.errors import Refused
from harness.formats import ledger
from harness.review.goodput import Goodput, goodput
from harness.telemetry.read import read_metrics
from harness.units import format_bytes, format_count, format_seconds

WARM_UP = 2
"""First steps of an attempt that tell nothing of the others: kernels are chosen and memory is taken in them."""
OUTLIER = 1.5
"""A step that took so many times the median is shown by itself."""
SPANS = ("data_wait", "forward", "backward", "update")
Line = dict[str, Any]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _speed(value: float) -> str:
    return f"{format_count(round(value))}/s"


def _flops(value: float) -> str:
    return next(f"{value / size:,.1f} {unit}FLOP/s" for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= size or unit == "M")


@dataclass(frozen=True)
class Fact:
    """One number of a run.

    Attributes:
        label: for people.
        text: writes a value with its unit.
        is_compared: runs side by side are told how many times the first one's it is.
    """

    label: str
    text: Callable[[float], str]
    is_compared: bool = False


FACTS: dict[str, Fact] = {
    "ranks": Fact("ranks, last attempt", format_count),
    "steps": Fact("steps", format_count),
    "trained_tokens": Fact("trained tokens", format_count),
    "train_loss": Fact("training loss, last tenth of the steps", _loss, True),
    "eval_loss_first": Fact("evaluation loss, first", _loss),
    "eval_loss_best": Fact("evaluation loss, best", _loss, True),
    "eval_loss_best_step": Fact("  of step", format_count),
    "eval_loss": Fact("evaluation loss, last", _loss, True),
    "tokens_per_second": Fact("tokens, median", _speed, True),
    "tokens_per_second_per_rank": Fact("  of a rank", _speed, True),
    "flops_per_rank": Fact("model FLOPs of a rank, median", _flops, True),
    "mfu": Fact("model FLOPs utilisation (MFU)", _share, True),
    "step_seconds": Fact("step, median", format_seconds, True),
    "step_seconds_p90": Fact("  a tenth take longer than", format_seconds, True),
    "data_wait_share": Fact("  waiting for data", _share),
    "forward_share": Fact("  forward", _share),
    "backward_share": Fact("  backward", _share),
    "update_share": Fact("  update", _share),
    "other_share": Fact("  all else", _share),
    "pipeline_idle_share": Fact("pipeline stages idle", _share),
    "host_memory_bytes": Fact("memory of rank 0, host", format_bytes, True),
    "device_memory_bytes": Fact("memory of rank 0, GPU", format_bytes, True),
    "checkpoint_stall_seconds": Fact("training stood still for a checkpoint, median", format_seconds, True),
    "checkpoint_seconds": Fact("  until it was written", format_seconds, True),
    "skipped_steps": Fact("steps skipped", format_count),
    "anomalies": Fact("spikes of the loss", format_count),
    "attempts": Fact("attempts", format_count),
    "wall_seconds": Fact("wall clock", format_seconds, True),
    "goodput": Fact("goodput", _share, True),
}


@dataclass(frozen=True)
class Summary:
    """A run as it stands.

    Attributes:
        name: its folder, as it was named.
        settings: leaves of its last resolved run file.
        time: what its wall clock went to.
        lines: its metrics, an object a step.
        facts: its numbers by the names of FACTS; those that it does not have are left out.
    """

    name: str
    settings: dict[str, Any]
    time: Goodput
    lines: list[Line]
    facts: dict[str, float]

    def text(self, name: str) -> str:
        """A number as people read it; empty where the run does not have it."""
        return FACTS[name].text(self.facts[name]) if name in self.facts else ""

    def slowest(self, count: int = 3) -> list[tuple[int, float, str, float]]:
        """The steps that took far longer than the median, longest first.

        Returns:
            step, seconds, the span in which most of the excess lies ("all else" where none is), and the seconds of that span.
        """
        steps = _steady(self.lines)
        if not steps:
            return []
        usual = {name: statistics.median(_parts(line)[name] for line in steps) for name in (*SPANS, "all else")}
        median = statistics.median(_column(steps, "speed/step_seconds"))
        slow = sorted((line for line in steps if line["speed/step_seconds"] > OUTLIER * median), key=lambda line: -line["speed/step_seconds"])
        found = []
        for line in slow[:count]:
            parts = _parts(line)
            where = max(parts, key=lambda name: parts[name] - usual[name])
            found.append((line["step"], line["speed/step_seconds"], where.replace("_", " "), parts[where]))
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it but the lines, with names that `--fail-if` knows."""
        return {"run_dir": self.name} | self.time.as_json() | {"summary": self.facts, "settings": self.settings}


def summarize(run_dir: Path) -> Summary:
    """Read a run, also one that still goes on.

    Args:
        run_dir: folder of the run.

    Raises:
        Refused: when there is none.
    """
    time, lines, events = goodput(run_dir), read_metrics(run_dir), ledger.read(run_dir)
    starts = [event for event in events if event["kind"] == "start"]
    facts = _learned(lines) | _sped(lines) | _took(lines)
    facts["anomalies"] = float(sum(event["kind"] == "anomaly" for event in events))
    facts |= {"attempts": float(len(time.starts)), "wall_seconds": time.wall_s, "goodput": time.share}
    if starts and "ranks" in starts[-1]:
        facts["ranks"] = float(starts[-1]["ranks"])
        if "tokens_per_second" in facts:
            facts["tokens_per_second_per_rank"] = facts["tokens_per_second"] / facts["ranks"]
    return Summary(str(run_dir), read_settings(run_dir), time, lines, {name: facts[name] for name in FACTS if name in facts})


def read_settings(run_dir: Path) -> dict[str, Any]:
    """Leaves of the run file that the last attempt resolved, by dotted key."""
    found = sorted(run_dir.glob("attempts/[0-9]*/run.yaml"))
    if not found:
        return {}
    try:
        values = yaml.safe_load(found[-1].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise Refused(f"{found[-1]} is no YAML: {error}", where="RUN_DIR", remedy="Copy it again from where the run is.") from None
    return dict(_leaves(values, "")) if isinstance(values, dict) else {}


def comparison(summaries: list[Summary]) -> list[list[str]]:
    """All numbers side by side: a row of names, then a row for each number that a run has; after every run but the first, how many times the first's it is."""
    first, *others = summaries
    rows = [["", first.name, *(cell for number, one in enumerate(others, 2) for cell in (one.name, f"{number} / 1"))]]
    for name, fact in FACTS.items():
        if not any(name in one.facts for one in summaries):
            continue
        row = [fact.label, first.text(name)]
        for one in others:
            base, value = first.facts.get(name), one.facts.get(name)
            row += [one.text(name), f"{value / base:.3f}" if fact.is_compared and base and value is not None else ""]
        rows.append(row)
    return rows


def differences(summaries: list[Summary]) -> list[tuple[str, list[Any]]]:
    """Settings in which the runs differ, by key, with the value of each run; folders of the runs are left out."""
    keys = dict.fromkeys(key for one in summaries for key in one.settings if key != "run_dir")
    rows = [(key, [one.settings.get(key) for one in summaries]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _leaves(values: dict[str, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _column(lines: list[Line], tag: str) -> list[float]:
    return [float(line[tag]) for line in lines if line.get(tag) is not None]


def _steps(lines: list[Line]) -> list[Line]:
    return [line for line in lines if "train/loss" in line]


def _steady(lines: list[Line]) -> list[Line]:
    """Steps without the first of each attempt, or all where there are no others."""
    steps, kept, seen = [line for line in _steps(lines) if "speed/step_seconds" in line], [], dict[int, int]()
    for line in steps:
        seen[line["attempt"]] = seen.get(line["attempt"], 0) + 1
        if seen[line["attempt"]] > WARM_UP:
            kept.append(line)
    return kept or steps


def _parts(line: Line) -> dict[str, float]:
    """Seconds of a step by span."""
    parts = {name: float(line.get(f"speed/{name}_seconds", 0.0)) for name in SPANS}
    return parts | {"all else": max(0.0, line["speed/step_seconds"] - sum(parts.values()))}


def _learned(lines: list[Line]) -> dict[str, float]:
    facts: dict[str, float] = {}
    if steps := _steps(lines):
        facts |= {"steps": float(steps[-1]["step"]), "trained_tokens": sum(_column(steps, "train/tokens")), "skipped_steps": sum(_column(steps, "optim/skipped"))}
        tail = _column(steps[-max(1, len(steps) // 10):], "train/loss")
        facts["train_loss"] = statistics.fmean(tail) if tail else float("nan")
    if evaluations := [line for line in lines if "eval/loss" in line]:
        best = min(evaluations, key=lambda line: line["eval/loss"])
        facts |= {"eval_loss_first": evaluations[0]["eval/loss"], "eval_loss": evaluations[-1]["eval/loss"]}
        facts |= {"eval_loss_best": best["eval/loss"], "eval_loss_best_step": float(best["step"])}
    return facts


def _sped(lines: list[Line]) -> dict[str, float]:
    steps = _steady(lines)
    seconds = _column(steps, "speed/step_seconds")
    if not seconds:
        return {}
    facts = {"step_seconds": statistics.median(seconds), "tokens_per_second": statistics.median(_column(steps, "speed/tokens_per_second"))}
    facts["step_seconds_p90"] = statistics.quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    for name in ("flops_per_rank", "mfu", "pipeline_idle_share"):
        if found := _column(steps, f"speed/{name}"):
            facts[name] = statistics.median(found)
    whole, parts = sum(seconds), [_parts(line) for line in steps]
    facts["data_wait_share"] = sum(part["data_wait"] for part in parts) / whole
    if any("speed/forward_seconds" in line for line in steps):
        facts |= {f"{name}_share": sum(part[name] for part in parts) / whole for name in SPANS[1:]}
        facts["other_share"] = sum(part["all else"] for part in parts) / whole
    return facts


def _took(lines: list[Line]) -> dict[str, float]:
    facts = {}
    for name, tag in (("host_memory_bytes", "memory/host_bytes"), ("device_memory_bytes", "memory/device_peak_bytes")):
        if found := _column(lines, tag):
            facts[name] = max(found)
    for name, tag in (("checkpoint_stall_seconds", "checkpoint/stall_seconds"), ("checkpoint_seconds", "checkpoint/save_seconds")):
        if found := _column(lines, tag):
            facts[name] = statistics.median(found)
    return facts
