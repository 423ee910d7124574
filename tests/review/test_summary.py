"""Runs in some twenty numbers: from lines that are written here, against arithmetic of the test's own."""

from __future__ import annotations

import json
import random
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import Refused
from harness.review import limits
from harness.review.page import POINTS, curve, render
from harness.review.summary import FACTS, Summary, comparison, differences, summarize

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def write_run(folder: Path, *, seed: int, slow: float = 1.0, steps: int = 100, mfu: bool = True, lr: float = 1e-4) -> Path:
    """A finished run of one attempt with random numbers."""
    draw = random.Random(seed)
    (folder / "attempts" / "0001").mkdir(parents=True)
    (folder / "attempts" / "0001" / "run.yaml").write_text(f"run_dir: {folder.name}\noptimizer: {{lr: {lr}}}\ntrain: {{steps: {steps}}}\n")
    lines, when = [], 110.0
    for step in range(1, steps + 1):
        parts = {name: draw.uniform(0.1, 0.2) * slow for name in ("data_wait", "forward", "backward", "update")}
        seconds = sum(parts.values()) * 1.1 + (5.0 if step <= 2 else 0.0)
        when += seconds
        line = {"attempt": 1, "step": step, "time": when, "train/loss": 5.0 - step / steps, "train/tokens": 100, "optim/lr": lr, "optim/skipped": int(step == 7)}
        line |= {"speed/step_seconds": seconds, "speed/tokens_per_second": 1000 / seconds, "speed/flops_per_rank": 1e12 / seconds}
        line |= {f"speed/{name}_seconds": value for name, value in parts.items()} | ({"speed/mfu": 0.3 / slow} if mfu else {})
        line |= {"memory/host_bytes": 2.0**30 + step, "phases": {"forward": seconds}}
        lines.append(line)
        if step % 25 == 0:
            lines.append({"attempt": 1, "step": step, "time": when, "eval/loss": 4.0 + abs(step - 75) / 100, "phases": {}})
            lines.append({"attempt": 1, "step": step, "time": when, "checkpoint/stall_seconds": 0.25, "checkpoint/save_seconds": 4.0, "phases": {}})
    events = [
        {"kind": "start", "time": 109.0, "attempt": 1, "began": 100.0, "phases": {"start": 9.0}, "ranks": 4},
        {"kind": "anomaly", "time": when, "step": 9, "reason": "a spike"},
        {"kind": "finish", "time": when, "attempt": 1, "began": 100.0, "state": "done", "phases": {"start": 9.0, "forward": when - 110.0}, "waited_s": 0.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "events.jsonl").write_text("".join(json.dumps({"version": 1} | event) + "\n" for event in events))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """A run, and one that is a third slower."""
    return [write_run(tmp_path / "fast", seed=1), write_run(tmp_path / "slow[b]", seed=2, slow=1.5, lr=2e-4)]


def review(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "harness", "review", *map(str, words)], capture_output=True, text=True)


def test_the_numbers_are_those_of_the_lines(runs):
    found = summarize(runs[0])
    lines = [json.loads(text) for text in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    steady = [line for line in lines if "train/loss" in line and line["step"] > 2]
    seconds = [line["speed/step_seconds"] for line in steady]
    facts = found.facts
    assert facts["step_seconds"] == statistics.median(seconds) and facts["step_seconds_p90"] == pytest.approx(statistics.quantiles(seconds, n=10)[8])
    assert facts["tokens_per_second"] == statistics.median(line["speed/tokens_per_second"] for line in steady) == 4 * facts["tokens_per_second_per_rank"]
    assert facts["forward_share"] == pytest.approx(sum(line["speed/forward_seconds"] for line in steady) / sum(seconds))
    shares = sum(facts[f"{name}_share"] for name in ("data_wait", "forward", "backward", "update", "other"))
    assert shares == pytest.approx(1.0) and facts["other_share"] == pytest.approx(1 - 1 / 1.1)
    assert facts["train_loss"] == pytest.approx(statistics.fmean(5.0 - step / 100 for step in range(91, 101)))
    assert (facts["eval_loss_first"], facts["eval_loss_best"], facts["eval_loss_best_step"], facts["eval_loss"]) == (4.5, 4.0, 75, 4.25)
    assert (facts["steps"], facts["trained_tokens"], facts["skipped_steps"], facts["anomalies"], facts["ranks"]) == (100, 10_000, 1, 1, 4)
    assert (facts["mfu"], facts["checkpoint_stall_seconds"], facts["checkpoint_seconds"], facts["host_memory_bytes"]) == (0.3, 0.25, 4.0, 2.0**30 + 100)
    assert facts["goodput"] == found.time.share > 0 and list(facts) == [name for name in FACTS if name in facts]


def test_a_step_that_took_long_says_where(runs):
    path = runs[0] / "metrics.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    usual = statistics.median(line["speed/step_seconds"] for line in lines if "train/loss" in line)
    for step, name, more in ((40, "speed/data_wait_seconds", 3.0), (60, "speed/backward_seconds", 2.0), (80, "", 1.5)):
        line = next(line for line in lines if line["step"] == step)
        line["speed/step_seconds"] += more
        if name:
            line[name] += more
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summarize(runs[0]).slowest()
    assert [(step, where) for step, _, where, _ in found] == [(40, "data wait"), (60, "backward"), (80, "all else")]
    assert all(seconds > 1.5 * usual for _, seconds, _, _ in found) and 3.0 < found[0][3] < 3.3


def test_two_runs_side_by_side(runs):
    both = [summarize(folder) for folder in runs]
    assert differences(both) == [("optimizer.lr", [1e-4, 2e-4])]
    rows = {row[0].strip(): row[1:] for row in comparison(both)}
    assert rows[""] == [str(runs[0]), str(runs[1]), "2 / 1"]
    assert float(rows["tokens, median"][2]) == pytest.approx(both[1].facts["tokens_per_second"] / both[0].facts["tokens_per_second"], abs=5e-4)
    assert rows["steps"] == ["100", "100", ""], "a ratio of step counts says nothing"
    told = review(*runs)
    assert told.returncode == 0, told.stderr
    assert re.search(r"^ settings that differ +\S+fast +\S+slow\[b\]", told.stdout, re.MULTILINE) and re.search(r"optimizer\.lr +0\.0001 +0\.0002", told.stdout)
    several = json.loads(review(*runs, "--json").stdout)["runs"]
    assert [one["summary"] for one in several] == [one.facts for one in both]


def test_conditions(runs, tmp_path):
    assert review(runs[0], "--fail-if", "mfu < 0.29", "--fail-if", "skipped_steps>=2").returncode == 0
    failed = review(runs[0], "--fail-if", "mfu <= 0.3")
    assert failed.returncode == 4 and "mfu is 0.3 (--fail-if 'mfu <= 0.3')" in failed.stderr
    relative = review(*runs, "--fail-if", "tokens_per_second < 0.9x")
    assert relative.returncode == 4 and re.search(r"slow\S*: tokens_per_second is .*, 0\.6\d\d times that of .*fast", relative.stderr)
    assert review(*runs, "--fail-if", "tokens_per_second < 0.5x").returncode == 0
    without = write_run(tmp_path / "cpu", seed=3, mfu=False)
    lacking = review(runs[0], without, "--fail-if", "mfu < 0.1")
    assert lacking.returncode == 4 and f"{without} has no mfu" in lacking.stderr, "what was not measured does not pass"
    lacking = review(without, runs[0], "--fail-if", "mfu < 0.9x")
    assert lacking.returncode == 4 and f"{without} has no mfu" in lacking.stderr, "nor what cannot be compared"


@pytest.mark.parametrize(("text", "why"), [
    ("mfu", "is no condition"), ("mfu < fast", "is no condition"), ("mfu < nan", "is no condition"), ("mfu == 1", "is no condition"),
    ("speed < 3", "No number of a run is called `speed`"), ("mfu < 0.9x", "there is only one"),
])
def test_what_is_no_condition_is_refused(text, why):
    with pytest.raises(Refused, match=re.escape(why)):
        limits.parse(text, num_runs=1)


def test_a_refusal_comes_before_the_runs_are_read(tmp_path):
    told = review(tmp_path / "nothing", "--fail-if", "speed < 3")
    assert told.returncode == 2 and "--fail-if" in told.stderr and "tokens_per_second" in told.stderr


def test_a_long_curve_keeps_its_extremes():
    lines = [{"step": step, "train/loss": float(step % 7)} for step in range(1, 50_001)]
    lines[31_234]["train/loss"], lines[17]["train/loss"] = 99.0, -99.0
    steps, values = curve(lines, "train/loss")
    assert len(steps) <= POINTS and steps == sorted(steps)
    assert (31_235, 99.0) in zip(steps, values, strict=True) and (18, -99.0) in zip(steps, values, strict=True)


def in_a_browser(page: Path, folder: Path) -> str:
    """What a page is once its scripts have run."""
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={folder}", "--virtual-time-budget=10000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )
    return done.stdout


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_the_page_draws_its_pictures(runs, tmp_path):
    (runs[1] / "attempts" / "0001" / "run.yaml").write_text('model: {path: "</script><b id=broken>&"}\noptimizer: {lr: 2.0e-4}\n')
    page = tmp_path / "page.html"
    assert review(*runs, "--html", page).returncode == 0
    seen = in_a_browser(page, tmp_path / "browser")
    titles = re.findall(r'class="gtitle"[^>]*>([^<]*)<', seen)
    assert titles[:2] == ["Loss", "Speed"] and "What the wall clock went to" in titles and "Hardware in use" in titles and len(titles) == 8
    curves = dict(re.findall(r'<div id="chart-(\d)"(.*?)(?=<div id="chart-|<script)', seen, re.DOTALL))
    assert len(re.findall(r'class="trace scatter', curves["0"])) == 4, "training and evaluation of both runs"
    assert 'id="broken"' not in seen and "&lt;/script&gt;" in seen
    assert not re.search(r"(src|href)=\"https?:", re.sub(r"<script.*?</script>", "", seen, flags=re.DOTALL)) and "<script src" not in page.read_text()


def test_a_run_without_steps_has_a_page(tmp_path):
    (tmp_path / "events.jsonl").write_text(json.dumps({"version": 1, "kind": "start", "time": 109.0, "attempt": 1, "began": 100.0, "phases": {"start": 9.0}}) + "\n")
    found = summarize(tmp_path)
    assert isinstance(found, Summary) and set(found.facts) == {"anomalies", "attempts", "wall_seconds", "goodput"} and found.slowest() == []
    assert "What the wall clock went to" in render([found])
