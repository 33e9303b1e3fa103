"""Learning curves of recorded claims as pictures that stand alone: loss and accuracy against trained tokens.

A claim's rows become curves if they have ``tokens``; they have a ``setting`` ("task, name", or the task in
its own field) and ``loss`` with or without ``accuracy``, or several ``kl_...`` values, one line each. Several
rows of one setting at one number of tokens are seeds: the line is their median, bars are their range.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseland.report import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PIXELS = 700
WIDTH = 7.0  # inches, 504 units: letters of 8.5 units are 12 pixels high
PANEL, TOP, BOTTOM, LINE = 2.35, 0.34, 0.55, 0.175  # inches: axes, title, axis label, a line of the legend
# Dashes and markers tell lines apart without colour; markers are open, so that lines below show through.
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 1.5, 1, 1.5)), (0, (9, 3)), (0, (3, 1.2, 1, 1.2, 1, 1.2)),
    (0, (2.5, 1.5)), (0, (12, 2, 2, 2)),
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "X", "P", "p")
LETTER, HANDLE = 4.5, 58.0  # units of the legend: a letter's width at most, a sample line with its gaps
MEASURES = {
    "loss": "loss, nats per scored token",
    "accuracy": "accuracy, % of scored tokens",
    "kl": "KL divergence, nats (logarithmic)",
}

Point = tuple[float, float, float, float]  # tokens, lowest, median, highest


@dataclass
class Task:
    """The curves of one task: measure -> setting -> points in the order of their tokens."""

    name: str
    curves: dict[str, dict[str, list[Point]]] = field(default_factory=dict)
    seeds: int = 1
    # Where a second stage begins: its lines go on from the end of the first setting's.
    joint: float | None = None

    @property
    def settings(self) -> list[str]:
        """Names of the lines, in the order of the rows."""
        return list(dict.fromkeys(name for lines in self.curves.values() for name in lines))


def curves_of(rows: Sequence[Mapping[str, Any]]) -> list[Task]:
    """The tasks that have curves among a claim's rows, in their order."""
    found: dict[str, dict[str, dict[str, dict[float, list[float]]]]] = {}
    for row in rows:
        if row.get("tokens") is None:
            continue
        head, _, tail = str(row["setting"]).partition(", ")
        task = str(row.get("task") or head)
        measures = found.setdefault(task, {})
        for key, value in row.items():
            measure, _, part = key.partition("_")
            if value is None or (key not in ("loss", "accuracy") and measure != "kl"):
                continue
            name = part if measure == "kl" else tail or head
            line = measures.setdefault(measure, {}).setdefault(name.replace("_", " "), {})
            line.setdefault(float(row["tokens"]), []).append(float(value))
    return [_task(name, measures) for name, measures in found.items() if measures]


def _task(name: str, measures: dict[str, dict[str, dict[float, list[float]]]]) -> Task:
    task = Task(name)
    for measure, lines in measures.items():
        first = next(iter(lines))
        end = max(lines[first])
        for setting, values in lines.items():
            later = setting != first and (first == "before" or setting.startswith("then "))
            task.joint = end if later else task.joint
            task.curves.setdefault(measure, {})[setting] = [
                (t + end * later, min(v), statistics.median(v), max(v)) for t, v in sorted(values.items())
            ]
            task.seeds = max(task.seeds, *(len(v) for v in values.values()))
    return task


def draw_curves(slug: str, task: Task, order: Sequence[str] | None = None) -> str:
    """One SVG file's text: a panel a measure, one legend; the same curves give the same text.

    Args:
        slug: the method, for the title.
        task: what to draw.
        order: settings of all tasks of the method, so that one looks the same in all its pictures.
    """
    from matplotlib.figure import Figure

    settings = task.settings
    labels = [_label(task, name) for name in settings]
    columns = _columns(labels)
    below = BOTTOM + LINE * -(-len(labels) // columns) + 0.1
    height = TOP + PANEL + below
    figure = Figure(figsize=(WIDTH, height))
    panels = list(figure.subplots(1, len(task.curves), squeeze=False)[0])
    # Fixed margins: a layout from measured letters would differ between versions of the font.
    figure.subplots_adjust(left=0.075, right=0.985, bottom=below / height, top=1 - TOP / height, wspace=0.22)
    figure.text(
        0.012,
        1 - 0.06 / height,
        f"{slug}: {task.name}",
        va="top",
        fontsize=9.5,
        fontweight="bold",
        color=svg.INK,
    )
    most = max(p[0] for lines in task.curves.values() for points in lines.values() for p in points)
    scale, unit = (1e6, "millions") if most >= 1e6 else (1e3, "thousands")
    for axes, (measure, lines) in zip(panels, task.curves.items(), strict=True):
        _panel(axes, measure, lines, order or settings, scale)
        axes.set_xlabel(f"trained tokens, {unit}")
        axes.set_xlim(-0.025 * most / scale, 1.03 * most / scale)
        if task.joint is not None:
            axes.axvline(task.joint / scale, color=svg.MUTED, linewidth=0.7, linestyle=(0, (1, 3)), zorder=1)
    handles = {h.get_label(): h for axes in panels for h in axes.get_lines()}
    figure.legend(
        [handles[name] for name in settings], labels, loc="lower left", bbox_to_anchor=(0.06, 0.0),
        ncols=columns, frameon=False, fontsize=8.5, labelcolor=svg.INK, handlelength=4.2,
        columnspacing=1.6, labelspacing=0.45,
    )  # fmt: skip
    name = re.sub(r"[^\w-]+", "-", f"{slug}-{task.name}")
    return _stand_alone(str(svg.to_svg(figure, name, describe(slug, task))), height)


def describe(slug: str, task: Task) -> str:
    """What a screen reader says of the picture."""
    what = {"loss": "loss", "accuracy": "accuracy", "kl": "KL divergence"}
    measures = " and ".join(what[measure] for measure in task.curves)
    return f"{measures} against trained tokens, {slug}, {task.name}: {', '.join(task.settings)}"


def _label(task: Task, setting: str) -> str:
    """The setting and its last values."""
    last = {m: lines[setting][-1][2] for m, lines in task.curves.items() if setting in lines}
    values = [f"{100 * v:.1f} %" if m == "accuracy" else f"{v:.3f}" for m, v in last.items()]
    return f"{setting}: {', '.join(values)}"


def _columns(labels: Sequence[str]) -> int:
    """The most columns of the legend, up to three, that are not wider than the picture."""
    for columns in (3, 2):
        lines = -(-len(labels) // columns)
        widest = [max(map(len, labels[i : i + lines])) for i in range(0, len(labels), lines)]
        if sum(LETTER * letters + HANDLE for letters in widest) < 0.93 * 72 * WIDTH:
            return columns
    return 1


def _panel(
    axes: Axes, measure: str, lines: dict[str, list[Point]], order: Sequence[str], scale: float
) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    svg.style(axes)
    axes.set_ylabel(MEASURES[measure])
    axes.grid(True, color=svg.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    factor = 100 if measure == "accuracy" else 1
    for name, points in lines.items():
        i = order.index(name)
        colour = svg.SERIES[i % len(svg.SERIES)]
        tokens = [p[0] / scale for p in points]
        low, middle, high = ([factor * p[k] for p in points] for k in (1, 2, 3))
        axes.plot(
            tokens, middle, label=name, color=colour, linewidth=1.5, linestyle=DASHES[i % len(DASHES)],
            marker=MARKERS[i % len(MARKERS)], markersize=5.5, markerfacecolor=svg.PAPER, markeredgewidth=1.1,
            zorder=3 + i / 100, clip_on=False,
        )  # fmt: skip
        if low != high:
            axes.vlines(tokens, low, high, color=colour, linewidth=1.0, zorder=2.5)
    if measure == "kl":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        axes.set_ylim(bottom=0)
        if measure == "accuracy":
            axes.set_ylim(top=min(max(1.08 * axes.dataLim.y1, 10), 102))


def _stand_alone(text: str, height: float) -> str:
    """The element as a file: a name space, a size, real colours on white, short numbers."""
    colours = _colours()
    text = re.sub(r"var\(--(\w+)\)", lambda m: colours[m[1]], text)
    text = re.sub(r"'DejaVu Sans',[^;\"]*sans-serif", "'DejaVu Sans', sans-serif", text)
    text = re.sub(r"\d+\.\d{4,}", lambda m: f"{float(m[0]):.2f}", text)
    size = f'width="{PIXELS}" height="{round(PIXELS * height / WIDTH)}"'
    text = text.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" {size} ', 1)
    text = text.replace(">", f'>\n <rect width="100%" height="100%" fill="{colours["paper"]}"/>', 1)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@cache
def _colours() -> dict[str, str]:
    """The report's light colours; a picture in a Markdown page can't take them from the page."""
    light, _, _ = (Path(__file__).parent / "report.css").read_text(encoding="utf-8").partition("}")
    return dict(re.findall(r"--(\w+): (#\w{6});", light))
