"""Answers to the fixed prompts of an evaluation, under both engines."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from tests.engine import work


def answers(folder: str, name: str, stages: int) -> list[tuple[int, int]]:
    """Tokens of each prompt and of its answer, which may be longer than the model."""
    from transformers import AutoTokenizer

    from harness import distributed
    from harness.data.template import Template
    from harness.engine.open import open_engine
    from harness.generation import answer_prompts
    from harness.resilience.hearing import Hearing
    from harness.testing.models import tiny_config
    from harness.world import Grid

    run, grid = work.run_file(stages=stages), Grid(stages, distributed.size(), distributed.rank())
    merged = work.ds_config(name, run, ranks=grid.dp_size, nvme="unused")
    engine = open_engine(run, tiny_config("gpt2", n_positions=24), copy.deepcopy(merged), device=torch.device("cpu"), weights=None)
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    template = Template.from_dict(json.loads((Path(folder) / "template.json").read_text()))
    found = []
    generate = engine.generate

    def seen(prompts: list[list[int]], **settings: object) -> list[list[int]]:
        found.append((len(prompts[0]), len((answered := generate(prompts, **settings))[0])))
        return answered

    engine.generate = seen
    answer_prompts(engine, tokenizer, template, ["Why?", "a b c d e f g h i j"], max_new_tokens=99, hearing=Hearing(lambda: False, engine.device))
    engine.close()
    distributed.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer and a template."""
    from harness.data.prepare import prepare
    from harness.data.sets import open_data
    from tests.data.conftest import make_run, write_pairs

    place = tmp_path_factory.mktemp("answers")
    run = make_run(place, train={"path": str(write_pairs(place / "pairs.jsonl", 40))}, shape="prompt_completion", num_processes=1)
    prepare(run, progress=False)
    data = open_data(run)
    (place / "template.json").write_text(json.dumps(data.template.to_dict()))
    (place / "tokenizer").symlink_to(data.tokenizer.absolute())
    data.close()
    return place


@pytest.mark.parametrize("name, stages", [("zero3", 1), ("zero1", 2)])
def test_an_answer_ends_where_the_positions_do(folder, ranks2, name, stages):
    first, second = ranks2.run(answers, str(folder), name, stages)
    assert first == second and len(first) == 2 and all(0 < prompt < 24 and prompt + answer <= 24 for prompt, answer in first)
