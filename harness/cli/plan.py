"""`harness plan`: everything a run would do, without doing it."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.batch import batch_equation
from harness.config.deepspeed import merge
from harness.config.load import load
from harness.errors import EXIT_DONE
from harness.units import format_bytes, format_count

if TYPE_CHECKING:
    from harness.config.batch import BatchEquation
    from harness.data.sets import RunData
    from harness.preflight.stages import StagePlan


def run(arguments: argparse.Namespace) -> int:
    """Check all, then print the merged configuration, the batch equation and the memory."""
    from harness.model.build import num_parameters
    from harness.model.partition import skeleton
    from harness.preflight.check import check
    from harness.preflight.memory import plan_memory
    from harness.preflight.place import where
    from harness.preflight.stages import plan_stages
    from harness.train.attempt import check_same_run

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    loaded = load(arguments.run_file, arguments.overrides)
    place = where(loaded, arguments.ranks)
    facts = check(loaded, ranks=place.ranks, has_gpu=place.has_gpu, here=place.here, makes=False)
    check_same_run(loaded)
    stages = loaded.run.engine.pipeline_stages
    batch = batch_equation(loaded, place.ranks // stages)
    ds_config = merge(loaded, batch)
    parameters = num_parameters(skeleton(facts["config"]))
    cut = plan_stages(loaded.run, facts["config"], batch) if stages > 1 else []
    memory = plan_memory(
        max((stage.parameters for stage in cut), default=parameters), ds_config, precision=loaded.run.train.precision, ranks=batch.ranks,
        local_ranks=place.local_ranks, all_parameters=parameters,
    )
    console = Console(markup=False, emoji=False)
    table = Table("what", "value", title=f"plan of {arguments.run_file}", title_justify="left")
    table.add_row("batch", batch.text())
    table.add_row("model", f"{facts['config'].model_type}, {format_count(parameters)} parameters")
    _add_data(table, facts["data"])
    table.add_row("states on each device", format_bytes(memory.device))
    table.add_row("states on each host", format_bytes(memory.host))
    table.add_row("states on each NVMe", format_bytes(memory.nvme))
    table.add_row("one checkpoint", format_bytes(memory.checkpoint))
    if loaded.run.checkpoint.asynchronous:
        table.add_row("its copy on each host", format_bytes(memory.copy))
    console.print(table)
    if cut:
        _show_stages(console, cut, batch)
    console.print("merged DeepSpeed configuration:")
    console.print_json(json.dumps(ds_config))
    return EXIT_DONE


def _add_data(table: Table, data: RunData | None) -> None:
    if data is None:
        table.add_row("rows", "not prepared yet, or with other settings: harness prepare makes them")
        return
    for name, rows in {"train": data.train, **{f"validation {name}".strip(): rows for name, rows in data.validation.items()}}.items():
        table.add_row(f"rows of {name}", f"{rows.num_rows:,}, {rows.filled_share:.1%} filled")
    table.add_row("template", data.template.told)


def _show_stages(console: Console, cut: list[StagePlan], batch: BatchEquation) -> None:
    from harness.preflight.stages import bubble, warnings

    table = Table("stage", "blocks", "parameters", "work to mean", "activations", title="pipeline stages", title_justify="left")
    for number, stage in enumerate(cut):
        table.add_row(
            str(number), f"{stage.first} to {stage.stop - 1}", format_count(stage.parameters), f"{stage.work:.2f}", format_bytes(stage.activations)
        )
    console.print(table)
    share = bubble(batch.stages, batch.accumulation)
    console.print(f"waiting, with equal stages: ({batch.stages} - 1) / ({batch.accumulation} + {batch.stages} - 1) = {share:.1%} of a step", highlight=False)
    for warning in warnings(cut):
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"))
