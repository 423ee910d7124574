"""A preparation that was killed, at any moment, gives the bytes of an undisturbed one when it is started again."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.cli.main import main
from harness.data import prepare as module
from harness.formats.index import read_index

SHARD_BYTES = 48 << 10
FINGERPRINTED = ("index.json", "state.json", "draft.json")
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa naïve 世界".split()
CHILD = '''
import os, signal, sys
from fnmatch import fnmatch
from harness.cli.main import main
from harness.data import prepare

def die_in(step, pattern, count):
    """Kill all of this preparation when `step`, a function of os, is to do its work on a path of that pattern for the count-th time."""
    real, left = getattr(os, step), [int(count)]
    def guarded(*paths, **options):
        left[0] -= fnmatch(str(paths[-1]), pattern)
        if not left[0]:
            os.killpg(0, signal.SIGKILL)
        return real(*paths, **options)
    setattr(os, step, guarded)

if __name__ == "__main__":
    prepare.SHARD_TEXT_BYTES = int(sys.argv[2])
    if sys.argv[3:]:
        die_in(*sys.argv[3:])
    raise SystemExit(main(["prepare", sys.argv[1]]))
'''


def _rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Pairs of uneven lengths; some stand twice, some lack a part."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        if rows and draw.random() < 0.05:
            rows.append(draw.choice(rows))
        answer = "" if draw.random() < 0.01 else " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))
        rows.append({"prompt": f"{seed} {number}: " + " ".join(draw.choices(WORDS, k=draw.randint(1, 12))), "completion": answer})
    return rows


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Case:
    """A run file of its own data folder, and how it is prepared in another process."""

    folder: Path
    source: Path
    held: Path
    processes: int = 2

    @property
    def data(self) -> Path:
        """The folder of the sets."""
        return self.folder / "data"

    def run_file(self) -> Path:
        """Written anew."""
        self.folder.mkdir(exist_ok=True)
        values = {
            "run_dir": str(self.folder / "run"), "model": {"architecture": {"model_type": "gpt2"}}, "train": {"steps": 1, "global_batch_rows": 8},
            "data": {"dir": str(self.data), "train": {"path": str(self.source)}, "validation": {"path": str(self.held), "max_rows": 900},
                     "shape": "prompt_completion", "sequence_length": 64, "train_tokenizer": {"vocab_size": 400}, "num_processes": self.processes},
        }
        path = self.folder / "run.yaml"
        path.write_text(json.dumps(values))
        return path

    def start(self, *dies: str) -> subprocess.Popen[str]:
        """A preparation in a process group of its own."""
        script = self.folder.parent / "child.py"
        script.write_text(CHILD)
        return subprocess.Popen([sys.executable, str(script), str(self.run_file()), str(SHARD_BYTES), *dies],
                                start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self) -> str:
        """A preparation that nobody disturbs."""
        child = self.start()
        try:
            output, _ = child.communicate(timeout=120)
        finally:
            _kill(child)
        assert child.returncode == 0, output
        return output

    def first_part(self) -> Path:
        """Waited for: the first shard is whole, the work has begun."""
        return _wait(lambda: next(self.data.glob("train/parts/shard-*.json"), None), 60)

    def finished(self) -> dict[str, tuple[int, int]]:
        """Identity of the files of all finished shards: what must not be made again."""
        kept = {}
        for part in self.data.glob("*/parts/shard-*.json"):
            for file in module.files.read_json(part)["entry"]["files"]:
                path = part.parents[1] / file["name"]
                kept[str(path.relative_to(self.data))] = _identity(path)
        return kept

    def bytes(self) -> dict[str, str]:
        """sha256 of every file by its name, but of that which remembers times."""
        return {str(path.relative_to(self.data)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in sorted(self.data.rglob("*")) if path.is_file() and path.name != ".digests.json"}


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_ino, state.st_mtime_ns


def _wait(found, seconds: float):
    limit = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.002)
    return value


def _kill(child: subprocess.Popen[str]) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    child.communicate()


def _members(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, members = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(members) == group and state != "Z":
                found.append(int(entry.name))
    return found


def _workers(group: int) -> list[int]:
    """Those of them that make shards."""
    return [process for process in _members(group) if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes()]


@dataclass
class Undisturbed:
    """A preparation to compare with."""

    case: Case
    bytes: dict[str, str]
    working_s: float


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("restart")
    rows = _rows(9000, seed=1)
    source, held = _write(folder / "pairs.jsonl", rows), _write(folder / "held.jsonl", rows[::30] + _rows(2000, seed=2))
    case = Case(folder / "undisturbed", source, held)
    child = case.start()
    try:
        case.first_part()
        began = time.monotonic()
        output, _ = child.communicate(timeout=120)
    finally:
        _kill(child)
    assert child.returncode == 0, output
    yield Undisturbed(case, case.bytes(), time.monotonic() - began)


def _again(case: Case, undisturbed: Undisturbed, kept: dict[str, tuple[int, int]]) -> None:
    """Start again: the same bytes, nothing left over, and finished shards as they were."""
    case.finish()
    assert case.bytes() == undisturbed.bytes
    assert {name: _identity(case.data / name) for name in kept} == kept
    assert not [path for path in case.data.rglob("*") if path.name in ("parts", ".sources") or path.suffix == ".tmp"]


def _killed_after(delay_s: float, case: Case, undisturbed: Undisturbed) -> int:
    """Kill all of it some seconds after its first shard, and start again; the number of shards that were finished."""
    child = case.start()
    try:
        case.first_part()
        time.sleep(delay_s)
    finally:
        _kill(child)
    kept = case.finished()
    _again(case, undisturbed, kept)
    shutil.rmtree(case.folder)
    return len(kept) // 4


def _moments(number: int) -> list[float]:
    """Random shares of the working time, one in each equal portion of it."""
    draw = random.Random(7)
    return [(portion + draw.random()) / number for portion in range(number)]


def test_the_case_has_it_all(undisturbed):
    """Dozens of shards, duplicates, empty parts, an overlap: otherwise the other tests would prove little."""
    train, held = (read_index(undisturbed.case.data / name) for name in ("train", "validation"))
    assert len(train.shards) > 40 and len(held.shards) > 3
    assert train.audit["duplicates"] > 100 and train.audit["dropped"]["a part is empty or missing"] > 50
    assert held.audit["dropped"]["its question is in the training set"] > 200


@pytest.mark.parametrize("share", _moments(2))
def test_killed_and_started_again(undisturbed, tmp_path, share):
    case = Case(tmp_path / "killed", undisturbed.case.source, undisturbed.case.held)
    _killed_after(share * undisturbed.working_s, case, undisturbed)


@pytest.mark.slow
def test_killed_at_ten_random_moments(undisturbed, tmp_path):
    case = Case(tmp_path / "killed", undisturbed.case.source, undisturbed.case.held)
    found = [_killed_after(share * undisturbed.working_s, case, undisturbed) for share in _moments(10)]
    assert len(set(found)) > 3, f"the moments fell together: {found}"


MOMENTS = {
    "a shard is whole but not named": ("replace", "*/train/parts/shard-*.json", "30"),
    "the validation shards begin": ("replace", "*/validation/parts/shard-*.json", "1"),
    "the rows of a shard are planned": ("replace", "*/rows-*/shard-*.npy", "20"),
    "the plans are summed up": ("replace", "*/summary.json", "1"),
    "the first index is written": ("replace", "*/train/index.json", "1"),
    "between the two indexes": ("replace", "*/validation/index.json", "1"),
    "parts are taken away": ("rmdir", "*parts", "1"),
}


@pytest.mark.parametrize("moment", [m if n in (5, 6) else pytest.param(m, marks=pytest.mark.slow) for n, m in enumerate(MOMENTS)])
def test_killed_at_a_moment_that_a_clock_seldom_meets(undisturbed, tmp_path, moment):
    case = Case(tmp_path / "killed", undisturbed.case.source, undisturbed.case.held, processes=1)
    child = case.start(*MOMENTS[moment])
    try:
        output, _ = child.communicate(timeout=120)
    finally:
        _kill(child)
    assert child.returncode == -signal.SIGKILL, output
    kept = case.finished()
    assert kept or moment == "parts are taken away"
    _again(case, undisturbed, kept)


def test_no_worker_outlives_a_killed_parent(undisturbed, tmp_path):
    case = Case(tmp_path / "orphans", undisturbed.case.source, undisturbed.case.held)
    child = case.start()
    try:
        case.first_part()
        assert len(_workers(child.pid)) == 2
        os.kill(child.pid, signal.SIGKILL)
        _wait(lambda: not _members(child.pid), 10)
    finally:
        _kill(child)
    _again(case, undisturbed, case.finished())


def test_a_killed_worker_ends_it_with_a_message(undisturbed, tmp_path):
    case = Case(tmp_path / "worker", undisturbed.case.source, undisturbed.case.held)
    child = case.start()
    try:
        case.first_part()
        os.kill(_workers(child.pid)[0], signal.SIGKILL)
        output, _ = child.communicate(timeout=60)
        _wait(lambda: not _members(child.pid), 10)
    finally:
        _kill(child)
    assert child.returncode == 1, output
    assert output.count("harness: A process that prepares the data was killed") == 1 and "Traceback" not in output, output
    kept = case.finished()
    assert kept
    _again(case, undisturbed, kept)


def test_one_process_gives_the_same_bytes(undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", SHARD_BYTES)
    case = Case(tmp_path / "one", undisturbed.case.source, undisturbed.case.held, processes=1)
    assert main(["prepare", str(case.run_file())]) == 0
    assert case.bytes() == undisturbed.bytes


def test_a_packed_file_gives_the_same_sets(undisturbed, tmp_path, monkeypatch, capsys):
    """But for what names the source: the indexes, and the fingerprint in other files and names."""
    monkeypatch.setattr(module, "SHARD_TEXT_BYTES", SHARD_BYTES)
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress(undisturbed.case.source.read_bytes(), mtime=0))
    case = Case(tmp_path / "packed", packed, undisturbed.case.held)
    assert main(["prepare", str(case.run_file())]) == 0

    def nameless(found: dict[str, str]) -> dict[str, str]:
        parts = {name: name.split("/") for name in found if not name.endswith(FINGERPRINTED)}
        return {"/".join("rows" if part.startswith("rows-") else part for part in split): found[name] for name, split in parts.items()}

    assert nameless(case.bytes()) == nameless(undisturbed.bytes)


def test_nothing_of_an_earlier_tokenizer_is_left(tmp_path, capsys):
    """A chat template of the one before would be used for generation, and its name stand in the index."""
    from transformers import AutoTokenizer

    rows = _write(tmp_path / "pairs.jsonl", _rows(200, seed=1))
    case = Case(tmp_path / "case", rows, _write(tmp_path / "held.jsonl", _rows(20, seed=2)), processes=1)
    assert main(["prepare", str(case.run_file())]) == 0
    before = case.bytes()
    tokenizer = AutoTokenizer.from_pretrained(case.data / "tokenizer")
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    for name in ("chat", "plain"):
        assert main(["prepare", str(case.run_file()), "data.train_tokenizer=null", f"data.tokenizer={tmp_path / name}"]) == 0
        found = {path.name for path in (case.data / "tokenizer").iterdir()}
        assert ("chat_template.jinja" in found) == (name == "chat")
    assert main(["prepare", str(case.run_file()), "data.train_tokenizer=null", f"data.tokenizer={case.data / 'tokenizer'}"]) == 0
    assert main(["prepare", str(case.run_file())]) == 0
    assert case.bytes() == before
