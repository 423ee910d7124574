"""Training on two sets behind a server that fails: the same losses whatever happens on the way, or a clear end."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from harness.config.load import load
from harness.telemetry.read import read_metrics
from harness.testing.server import Server, serving
from tests.data.conftest import make_run, write_pairs
from tests.end_to_end.conftest import harness
from tests.end_to_end.faults import assert_same, launched, losses, running
from tests.end_to_end.test_whole_chain import _kill_after

pytest.importorskip("aiohttp", reason="fsspec reads http:// through aiohttp")
GIB = 1 << 30


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """Two sets of a dozen shards with one tokenizer."""
    from harness.data import prepare

    folder = tmp_path_factory.mktemp("sets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "SHARD_TEXT_BYTES", 2500)
        for number, name in enumerate(("drugs", "prose")):
            source = write_pairs(folder / f"{name}.jsonl", 120 + 60 * number, seed=number)
            tokenizer = {"train_tokenizer": None, "tokenizer": str(folder / "drugs" / "data" / "tokenizer")} if number else {"train_tokenizer": {"vocab_size": 320}}
            (folder / name).mkdir()
            prepare.prepare(make_run(folder / name, train={"path": str(source)}, shape="prompt_completion", sequence_length=64, **tokenizer), progress=False)
    return folder


@pytest.fixture
def server(sets):
    with serving() as it:
        for name in ("drugs", "prose"):
            it.add_folder(sets / name / "data", name)
        yield it


@pytest.fixture
def mixture_file(run_file, tmp_path, server) -> Path:
    """The tiny run on both sets, through a cache that holds a few shards of each."""
    values = yaml.safe_load(run_file.read_text())
    values["data"] = {
        "sets": {"drugs": {"dir": f"{server.url}/drugs", "weight": 2}, "prose": {"dir": f"{server.url}/prose", "weight": 1, "max_epochs": 2}},
        "sequence_length": 64, "window_shards": 2, "cache_dir": str(tmp_path / "cache"), "cache_gib": 60_000 / GIB,
    }
    values["train"]["steps"] = 30
    values["optimizer"]["lr"] = 3e-4  # at ten times that, thirty steps make 1e-3 of a difference in the last digit
    values["checkpoint"] = {"every_steps": 5}
    values["evaluation"] = {"every_steps": 15}
    path = tmp_path / "mixture.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Watched:
    """Samples how much a folder takes."""

    def __init__(self, folder: Path):
        self.folder, self.most, self._over = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        """Sizes change under the lock of the cache alone, so a sum that is taken under it is one that was there."""
        while not self._over.wait(0.02):
            if not (self.folder / ".lock").exists():
                continue
            with open(self.folder / ".lock") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.most = max(self.most, sum(path.stat().st_size for path in self.folder.glob("*/**/*") if path.is_file() and "tokenizers" not in path.parts))


def break_some(server: Server) -> None:
    """Every third shard file fails once in another way before it is served."""
    faults = [[500, 503], ["truncate"], ["wrong"], ["slow"]]
    shards = sorted(name for name in server.content if re.search(r"train/(shard-\d+\.arrow|rows-\w+/shard-\d+\.npy)$", name))
    for number, name in enumerate(shards[::3]):
        server.faults[name] = list(faults[number % len(faults)])


@pytest.mark.slow
def test_a_server_that_fails_changes_no_loss_and_the_cache_keeps_its_bound(mixture_file, tmp_path, server, sets):
    """Against the same sets in folders; every set is evaluated apart."""
    words = ["train.steps=12", "evaluation.every_steps=6", "checkpoint.every_steps=null"]
    local = harness("launch", mixture_file, *words, f"run_dir={tmp_path / 'local'}", *(f"data.sets.{name}.dir={sets / name / 'data'}" for name in ("drugs", "prose")))
    assert local.code == 0, local.output
    break_some(server)
    with Watched(tmp_path / "cache") as cache:
        far = harness("launch", mixture_file, *words)
    assert far.code == 0, far.output
    assert "fetching" in far.output and "again" in far.output, "faults were met"
    assert losses(tmp_path / "run") == losses(tmp_path / "local") and len(losses(tmp_path / "run")) == 12
    last = [line for line in read_metrics(tmp_path / "run") if "eval/loss" in line][-1]
    assert last["eval/drugs/loss"] != last["eval/prose/loss"]
    assert min(last["eval/drugs/loss"], last["eval/prose/loss"]) < last["eval/loss"] < max(last["eval/drugs/loss"], last["eval/prose/loss"])
    assert 0 < cache.most <= 60_000
    shown = harness("data", "show", f"{server.url}/prose/train", "--step", "3", "--run", tmp_path / "run")
    assert shown.code == 0 and "prose.jsonl:" in shown.output, shown.output
    where = harness("data", "where", f"{server.url}/drugs/train", "0", "--run", tmp_path / "run")
    assert where.code == 0 and "row 0, epoch 0: position" in where.output, where.output


@pytest.mark.slow
def test_a_shard_that_is_gone_in_the_middle_ends_with_its_name(mixture_file, tmp_path, server):
    run = load(mixture_file).run
    from harness.data.sets import open_data

    data = open_data(run)
    order = data.train.order(seed=run.train.seed, window_shards=2)
    late = next(shards for which, shards in order.shards_from(4 * 8).items() if which == 0)
    gone = data.train.tables[0].index.shards[list(dict.fromkeys(next(late) for _ in range(6)))[-1]].name
    data.close()
    del server.content[f"drugs/train/{gone}.arrow"]
    ended = harness("launch", mixture_file)
    assert ended.code == 1, ended.output
    assert f"{gone}.arrow" in ended.output and f"{server.url}/drugs/train" in ended.output and "tart the same command again" in ended.output
    assert "Traceback" not in ended.output
    assert 0 < len(losses(tmp_path / "run")) < 30, "it was in the middle"


@pytest.mark.slow
def test_changed_data_are_refused_with_the_difference_and_a_small_cache_before_anything(mixture_file, tmp_path, server):
    words = ["train.steps=4", "evaluation.every_steps=null", "launch.ranks=1"]
    small = harness("launch", mixture_file, *words, f"data.cache_gib={9000 / GIB}")
    assert small.code == 2 and "cache" in small.output and "is too small" in small.output, small.output
    assert harness("launch", mixture_file, *words).code == 0
    changed = harness("launch", mixture_file, *words, "train.steps=8", f"data.sets.drugs.dir={server.url}/prose")
    assert changed.code == 2 and "drugs had" in changed.output and "rows and has" in changed.output, changed.output


@pytest.mark.slow
def test_killed_and_resumed_on_one_then_on_four_ranks(mixture_file, tmp_path, server):
    whole = harness("launch", mixture_file, f"run_dir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.output
    break_some(server)
    killed = _kill_after(mixture_file, tmp_path / "run", 8, signal.SIGKILL)
    assert killed not in (0, 2)
    killed = _kill_after(mixture_file, tmp_path / "run", 17, signal.SIGKILL, "launch.ranks=1")
    assert killed not in (0, 2)
    done = harness("launch", mixture_file, "launch.ranks=4", timeout=400)
    assert done.code == 0 and "Resuming from step-0000" in done.output, done.output
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert len(expected) == 30 and found == pytest.approx(expected, rel=1e-5)
    attempts = {line["attempt"] for line in read_metrics(tmp_path / "run")}
    assert attempts == {1, 2, 3}, "all three attempts trained"


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_stop_is_heard_while_rows_are_waited_for(mixture_file, tmp_path, server, part):
    """A shard that does not come, for training or in an evaluation: code 75 within seconds, and the same losses after the resume."""
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    words = ["train.steps=20", "evaluation.every_steps=10"]
    launched(mixture_file, whole, *words)
    fetched = [name for name in server.gets if re.search(rf"drugs/{part}/shard-\d+\.arrow$", name)]
    late = fetched[len(fetched) // 2]
    shutil.rmtree(tmp_path / "cache")
    server.faults[late] = ["stall", "stall", "stall"]
    with running(mixture_file, run_dir, *words) as it:
        it.until(lambda: not server.faults[late] or len(server.faults[late]) < 3)
        seen: dict[int, float] = {}

        def waits() -> bool:
            before, now = dict(seen), losses(run_dir)
            seen.update(now)
            time.sleep(2.0)
            return before == now

        it.until(waits)
        started = time.monotonic()
        it.strike(signal.SIGTERM)
        assert it.end() == 75 and time.monotonic() - started < 12, it.output
        assert it.outcome().state == "stopped" and "Traceback" not in it.output
        assert 20 not in losses(run_dir)
    server.faults[late] = []
    launched(mixture_file, run_dir, *words)
    assert_same(run_dir, whole)
