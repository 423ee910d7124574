"""What is said at the end of an attempt: which checkpoints there are, and the commands for them."""

from __future__ import annotations

import shlex

from harness.cli.main import build_parser
from harness.train.closing import closing
from harness.world import World
from tests.checkpoint import fabricate


def _save(run_dir, step, *, best_step, loss=None):
    fields = fabricate.fields(step, state={"best_step": best_step}, metrics={} if loss is None else {"eval/loss": loss})
    fabricate.commit_groups(fabricate.groups(fabricate.state(), rank=0, ranks=1), run_dir=run_dir, fields=fields, attempt=1, world=World())


def _commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("  harness ")]


def test_the_newest_and_the_best_are_named_with_commands_that_parse(tmp_path):
    run_dir = tmp_path / "my run"
    _save(run_dir, 20, best_step=20, loss=2.5)
    _save(run_dir, 30, best_step=20)
    (run_dir / "metrics.jsonl").write_text('{"attempt": 1, "step": 31, "train/loss": 2.0}\n')
    text = closing(str(run_dir), state="stopped")
    assert text.startswith("Stopped at step 31, ")
    assert "newest checkpoint: step-000030, not evaluated" in text and "best checkpoint:   step-000020, evaluation loss 2.5000" in text
    export, review = (build_parser().parse_args(words) for words in _commands(text))
    assert (export.run_dir, export.checkpoint, review.run_dirs) == (str(run_dir), "best", [str(run_dir)])


def test_where_the_newest_is_the_best_it_is_named_once(tmp_path):
    _save(tmp_path, 30, best_step=30, loss=2.5)
    text = closing(str(tmp_path), state="done")
    assert text.startswith("Done at step ") and "newest checkpoint: step-000030, evaluation loss 2.5000" in text
    assert "best" not in text and len(_commands(text)) == 2


def test_without_a_checkpoint_nothing_is_offered(tmp_path):
    text = closing(str(tmp_path), state="stopped")
    assert text.endswith("There is no checkpoint.") and not _commands(text)
