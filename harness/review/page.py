"""The review as a page: one HTML file with pictures, which opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from harness.review.goodput import ROWS
from harness.review.summary import Line, Summary, comparison, differences
from harness.units import format_seconds

POINTS = 2000
"""Of a curve; a longer one shows the lowest and the highest value of every stretch."""
COLOURS = ("#2a78d6", "#e0662f", "#25996f", "#a05bc8", "#c39a12", "#d64b7f", "#3aa6b9", "#7f7f7f")
_OF_TIME = dict(zip(ROWS, (
    "#16406f", "#2a62a3", "#4a86c8", "#7aaadd", "#a9cbee", "#25996f", "#e0662f", "#c22f4e", "#3aa6b9", "#c39a12", "#8a5a44", "#a9897b", "#a05bc8", "#9a9a9a",
), strict=True))
"""A colour for each part of the wall clock: blues for start-ups, green for what stands, red for what was lost."""
_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem 1.2rem .15rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; white-space: pre; }
.scroll { overflow-x: auto; } .charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 1rem; }
.charts > div { height: 340px; min-width: 0; } .wide { grid-column: 1 / -1; }
@media (max-width: 600px) { .charts { grid-template-columns: 1fr; } }
"""

_DRAW = """
figures.forEach((figure, number) => Plotly.newPlot(`chart-${number}`, figure.data, figure.layout, {responsive: true, displayModeBar: false}));
"""


def render(summaries: list[Summary]) -> str:
    """The page of one run, or of several side by side.

    Args:
        summaries: of the runs, the first of which the others are compared with.
    """
    from plotly.offline import get_plotlyjs

    title = ", ".join(one.name for one in summaries)
    tables = [_table(*comparison(summaries))]
    if len(summaries) > 1 and (rows := differences(summaries)):
        tables += ["<h2>Settings that differ</h2>", _table(["", *(one.name for one in summaries)], *([key, *map(_written, values)] for key, values in rows))]
    slow = [[one.name if len(summaries) > 1 else "", f"{step:,}", format_seconds(seconds), where, format_seconds(spent_s)]
            for one in summaries for step, seconds, where, spent_s in one.slowest()]
    if slow:
        tables += ["<h2>Slowest steps</h2>", _table(["", "step", "took", "most of it more than usual in", "which took"], *slow)]
    figures = _charts(summaries)
    charts = "".join(f'<div id="chart-{number}"{" class=wide" if is_wide else ""}></div>' for number, (_, is_wide) in enumerate(figures))
    drawn = json.dumps([figure for figure, _ in figures]).replace("</", "<\\/")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head>\n"
        f'<body><h1>{html.escape(title)}</h1>{"".join(tables)}<h2>Pictures</h2><div class="charts">{charts}</div>\n'
        f"<script>const figures = {drawn};\n{_DRAW}</script></body></html>\n"
    )


def _written(value: Any) -> str:
    return "" if value is None else str(value)


def _table(head: Sequence[str], *rows: Sequence[str]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f'<div class="scroll"><table>{row(head, "th")}{"".join(row(cells, "td") for cells in rows)}</table></div>'


def _charts(summaries: list[Summary]) -> list[tuple[dict[str, Any], bool]]:
    """Figures as Plotly takes them, and whether each needs the whole width; those for which there are no numbers are left out."""
    figures = [
        (_lines("Loss", "nats", summaries, {"train/loss": "training", "eval/loss": "evaluation"}, from_zero=False), False),
        (_lines("Speed", "tokens/s", summaries, {"speed/tokens_per_second": ""}), False),
        *((_spans(one), False) for one in summaries),
        (_lines("Memory of rank 0", "GiB", summaries, {"memory/device_peak_bytes": "GPU, highest so far", "memory/host_bytes": "host"}, unit=2**30), False),
        (_lines("Gradient norm", "", summaries, {"optim/grad_norm": ""}), False),
        (_lines("Learning rate", "", summaries, {"optim/lr": ""}), False),
        (_lines("Hardware in use", "share", summaries, {"speed/mfu": "MFU", "speed/pipeline_idle_share": "pipeline idle"}), False),
        (_wall_clock(summaries), True),
    ]
    return [(figure, is_wide) for figure, is_wide in figures if figure["data"]]


def _figure(title: str, data: list[dict[str, Any]], *, x: str, y: str, rangemode: str = "normal", **layout: Any) -> dict[str, Any]:
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)"}
    return {"data": data, "layout": {
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xanchor": "left"}, "margin": {"l": 60, "r": 15, "t": 45, "b": 45}, "font": {"color": "#888"}, "hovermode": "x unified",
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "legend": {"orientation": "h", "y": 1.12, "x": 1, "xanchor": "right"},
        "hoverlabel": {"font": {"color": "#222"}, "bgcolor": "#fff"},
        "xaxis": axis | {"title": {"text": x}}, "yaxis": axis | {"title": {"text": y}, "rangemode": rangemode}, **layout,
    }}


def _lines(title: str, y: str, summaries: list[Summary], tags: dict[str, str], *, unit: float = 1.0, from_zero: bool = True) -> dict[str, Any]:
    """A curve for every run and tag; of several runs each has a colour, and a tag a kind of line."""
    data = []
    for number, one in enumerate(summaries):
        for place, (tag, label) in enumerate(tags.items()):
            steps, values = curve(one.lines, tag)
            if not steps:
                continue
            name = " ".join(word for word in (label, f"({one.name})" if len(summaries) > 1 and label else one.name if len(summaries) > 1 else "") if word)
            sparse = len(steps) < 60
            data.append({
                "type": "scatter", "mode": "lines+markers" if sparse else "lines", "name": name or title, "showlegend": bool(name), "x": steps,
                "y": [value / unit for value in values],
                "line": {"color": COLOURS[(number if len(summaries) > 1 else place) % len(COLOURS)], "width": 1.6, "dash": "dot" if place and len(summaries) > 1 else "solid"},
            })
    return _figure(title, data, x="step", y=y, rangemode="tozero" if from_zero else "normal")


def curve(lines: list[Line], tag: str) -> tuple[list[int], list[float]]:
    """Steps and values of a tag, at most POINTS; of every stretch of a longer curve the lowest and the highest value are kept.

    Args:
        lines: a run's metrics.
        tag: of the metric.
    """
    points = [(line["step"], float(line[tag])) for line in lines if line.get(tag) is not None]
    if len(points) > POINTS:
        size = -(-2 * len(points) // POINTS)
        stretches = [points[begin : begin + size] for begin in range(0, len(points), size)]
        points = [point for stretch in stretches for point in sorted({min(stretch, key=_value), max(stretch, key=_value)})]
    return [step for step, _ in points], [value for _, value in points]


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _spans(one: Summary) -> dict[str, Any]:
    """What the steps of a run went to, as areas that add up."""
    steps = [line for line in one.lines if "speed/forward_seconds" in line]
    size = max(1, -(-len(steps) // (POINTS // 4)))
    names = {"data_wait": "waiting for data", "forward": "forward", "backward": "backward", "update": "update"}
    x, columns = [], {name: [] for name in (*names.values(), "all else")}
    for begin in range(0, len(steps), size):
        stretch = steps[begin : begin + size]
        means = {label: sum(line.get(f"speed/{name}_seconds", 0.0) for line in stretch) / len(stretch) for name, label in names.items()}
        whole = sum(line["speed/step_seconds"] for line in stretch) / len(stretch)
        x.append(stretch[-1]["step"])
        for label, mean in (means | {"all else": max(0.0, whole - sum(means.values()))}).items():
            columns[label].append(mean)
    data = [
        {"type": "scatter", "mode": "lines", "stackgroup": "one", "name": label, "x": x, "y": values, "line": {"width": 0.5, "color": colour}}
        for (label, values), colour in zip(columns.items(), ("#d64b7f", "#2a78d6", "#3aa6b9", "#c39a12", "#9a9a9a"), strict=True) if steps
    ]
    return _figure(f"What a step goes to: {one.name}", data, x="step", y="seconds")


def _wall_clock(summaries: list[Summary]) -> dict[str, Any]:
    """A bar for every run: what its wall clock went to, over all attempts."""
    names = [one.name for one in summaries]
    data = [
        {"type": "bar", "orientation": "h", "name": row, "y": names, "x": [one.time.seconds[row] for one in summaries],
         "marker": {"color": _OF_TIME[row]}}
        for row in ROWS if any(one.time.seconds[row] for one in summaries)
    ]
    legend = {"orientation": "h", "y": -0.2, "x": 0, "xanchor": "left", "traceorder": "normal"}
    return _figure("What the wall clock went to", data, x="seconds", y="", barmode="stack", legend=legend, hovermode="closest", yaxis={"autorange": "reversed"})
