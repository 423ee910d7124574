"""All that can be known wrong before a model is built, refused in the order in which it gets expensive."""

from __future__ import annotations

from typing import Any

from harness.config import rules
from harness.config.load import Loaded
from harness.data.prepare import prepared_index
from harness.data.rows import RowTable
from harness.errors import Refused
from harness.formats.index import ShardSetIndex
from harness.log import say
from harness.model.configure import check_fit, load_config


def check(loaded: Loaded, *, ranks: int, has_gpu: bool, speak: bool = True) -> dict[str, Any]:
    """Check everything; prepare the data when they are not prepared yet.

    Args:
        loaded: the run file.
        ranks: ranks that will train.
        has_gpu: whether they have GPUs.
        speak: announce the preparation.

    Returns:
        facts that `plan` shows: the model's configuration, both row tables.

    Raises:
        Refused: with the first thing that is wrong.
    """
    rules.check(loaded, ranks=ranks, has_gpu=has_gpu)
    config = load_config(loaded)
    index = prepared_index(loaded.run)
    if index is None:
        index = _prepare(loaded, speak=speak)
    check_fit(config, vocab_size=index.vocab_size, loaded=loaded)
    tables = {which: _table(loaded, which) for which in ("train", "validation")}
    _stages(loaded, config)
    if loaded.run.model.path is not None:
        from harness.model.build import check_weights

        check_weights(loaded.run.model.path, config, where=f"model.path ({loaded.origin('model.path')})", trust_code=loaded.run.model.trust_code)
    return {"config": config, **tables}


def _stages(loaded: Loaded, config: Any) -> None:
    """What only a pipeline asks of the model."""
    stages = loaded.run.engine.pipeline_stages
    if stages == 1:
        return
    from harness.model.families import family_of
    from harness.model.partition import check_stages, skeleton
    from harness.model.stage import safetensors_folder

    where = f"engine.pipeline_stages ({loaded.origin('engine.pipeline_stages')})"
    family_of(config, where=where)
    check_stages(skeleton(config), stages, where=where)
    if loaded.run.model.path is not None:
        safetensors_folder(loaded.run.model.path, where=f"model.path ({loaded.origin('model.path')})")


def _prepare(loaded: Loaded, *, speak: bool) -> ShardSetIndex:
    from harness.data.prepare import prepare

    if speak:
        say(f"Preparing {loaded.run.data.dir} (once; `harness prepare` does it beforehand) ...")
    prepare(loaded.run, progress=speak)
    index = prepared_index(loaded.run)
    assert index is not None, "prepare() leaves an index"
    return index


def _table(loaded: Loaded, which: str) -> RowTable:
    table = RowTable.of_run(loaded.run, which)
    if table.num_rows == 0:
        raise Refused(
            f"The {which} set has no rows.", where=f"{table.folder} (data.{which}: {loaded.origin(f'data.{which}')})",
            remedy="Give it examples, or a larger data.validation_share.",
        )
    return table
