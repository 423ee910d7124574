"""All that can be known wrong before a model is built, refused in the order in which it gets expensive."""

from __future__ import annotations

import math
from typing import Any

from harness.config import rules
from harness.config.batch import batch_equation
from harness.config.load import Loaded
from harness.data import in_use, losses
from harness.data.mixture import MixedTable
from harness.data.prepare import prepared_index
from harness.data.sets import RunData, open_data
from harness.errors import Refused
from harness.log import say
from harness.model.configure import check_length, check_vocabulary, load_config, load_tokenizer, max_positions


def check(
    loaded: Loaded, *, ranks: int, has_gpu: bool, here: bool = True, speak: bool = True, ahead: bool = False, makes: bool = True
) -> dict[str, Any]:
    """Check everything; prepare the data when they are not prepared yet.

    Args:
        loaded: the run file.
        ranks: ranks that will train.
        has_gpu: whether they have GPUs.
        here: the run is on this machine; otherwise only the folders of data and model are looked at.
        speak: announce the preparation.
        ahead: let it go on in the background where training can begin before it is done.
        makes: prepare them; otherwise what only prepared data tell is left out.

    Returns:
        facts that `plan` shows: the model's configuration, and the data, or None where they are not prepared.

    Raises:
        Refused: with the first thing that is wrong.
    """
    rules.check(loaded, ranks=ranks, has_gpu=has_gpu, here=here)
    config = load_config(loaded)
    check_length(config, loaded=loaded)
    _stages(loaded, config)
    if loaded.run.model.path is not None:
        from harness.model.build import check_weights

        check_weights(loaded.run.model.path, config, where=f"model.path ({loaded.origin('model.path')})", trust_code=loaded.run.model.trust_code)
    if loaded.run.data.sets is None and prepared_index(loaded.run) is None:
        if not makes:
            return {"config": config, "data": None}
        _prepare(loaded, speak=speak, ahead=ahead)
    data = open_data(loaded.run)
    check_vocabulary(config, vocab_size=data.train.vocab_size, loaded=loaded)
    _rows(data, loaded)
    _prompts(data, config, loaded)
    return {"config": config, "data": data}


def _prompts(data: RunData, config: Any, loaded: Loaded) -> None:
    """The fixed prompts must leave room for an answer."""
    positions, prompts = max_positions(config.get_text_config()), loaded.run.evaluation.prompts
    if positions is None or not prompts:
        return
    tokenizer = load_tokenizer(str(data.tokenizer), where="data", trust_code=loaded.run.model.trust_code)
    longest = max(len(data.template.prompt_ids(prompt, tokenizer)) for prompt in prompts)
    if longest >= positions:
        raise Refused(
            f"A prompt has {longest} tokens; the model has {positions} positions.", where=f"evaluation.prompts ({loaded.origin('evaluation.prompts')})",
            remedy="Shorten it.",
        )


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


def _prepare(loaded: Loaded, *, speak: bool, ahead: bool) -> None:
    from harness.data import background
    from harness.data.prepare import prepare

    in_use.refuse_replacing(loaded.run.data, where=f"data.dir ({loaded.origin('data.dir')})")
    if ahead and background.worth_it(loaded.run):
        say(f"Preparing {loaded.run.data.dir} while training begins on its first shards; {loaded.run.data.dir}/{background.LOG} tells how far it is.")
        background.start(loaded.run)
        return
    if speak:
        say(f"Preparing {loaded.run.data.dir} (once; `harness prepare` does it beforehand) ...")
    prepare(loaded.run, progress=speak)


def _rows(data: RunData, loaded: Loaded) -> None:
    """Every set must have rows of which little was lost, and a mixture enough of them."""
    if not data.train.is_whole:
        return
    tables = {"train": data.train} | {f"validation {name}".strip(): table for name, table in data.validation.items()}
    for which, table in tables.items():
        if table.num_rows == 0:
            raise Refused(f"The {which} set has no rows.", where=f"data ({loaded.origin('data')})", remedy="Give it examples, or a larger data.validation_share.")
        parts = {f"{which} {share.name}": part for share, part in zip(table.shares, table.tables, strict=True)} if isinstance(table, MixedTable) else {which: table}
        for name, part in parts.items():
            losses.refuse(loaded.run.data, name, part.index, part.summary)
    if not isinstance(data.train, MixedTable):
        return
    run = loaded.run
    available = data.train.order(seed=run.train.seed, window_shards=run.data.window_shards).total_rows
    wanted = run.train.steps * batch_equation(loaded, 1).rows if run.train.steps is not None else math.ceil(run.train.epochs * data.train.num_rows)
    if available is not None and wanted > available:
        raise Refused(f"The run asks for {wanted:,} rows, but all sets are used up after {available:,}.",
                      where=f"data.sets ({loaded.origin('data.sets')})", remedy="Train shorter, or raise max_epochs of a set.")
