"""The study as one self-contained HTML page: what is safe, scores against compression and cost, the law."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sparseland.files import write_atomically
from sparseland.laws.sparse_frontier import grouped
from sparseland.report import svg

Row = dict[str, Any]
# Where no loss could be significant.
TOO_FEW = "too few samples"
MARKS = ("o", "s", "^", "D", "v", "P", "X")

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>Sparse Frontier study</title>
<style>
{{ css }}
</style>
</head>
<body>
<header>
<p class="kind">Sparseland study</p>
<h1>The Sparse Frontier</h1>
<p class="subtitle">{{ subtitle }}</p>
</header>
<main>
{% for title, words, table, plots in sections %}
<section>
<h2>{{ title }}</h2>
{% for line in words %}<p>{{ line }}</p>
{% endfor %}
{% if table %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ title }}">
<table class="results">
<thead><tr>{% for name in table[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table %}<tr>{% for value in row.values() %}<td>{{ cell(value) }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endif %}
{% if plots %}
<div class="plots">
{% for caption, picture in plots %}
<figure class="plot"><figcaption>{{ caption }}</figcaption>{{ picture }}</figure>
{% endfor %}
</div>
{% endif %}
</section>
{% endfor %}
</main>
</body>
</html>
"""


def write_page(summary: Row, path: Path) -> None:
    """Write the page of a :func:`~sparseland.study.analysis.summary`."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    css = (files("sparseland.report") / "report.css").read_text(encoding="utf-8")
    models = ", ".join(f"{m['model']} ({m['params'] / 1e6:.0f} M)" for m in summary["models"])
    text = environment.from_string(_TEMPLATE).render(
        css=Markup(css),
        cell=_cell,
        subtitle=f"{models}; score: {summary['score']}. {summary['test']}.",
        sections=_sections(summary),
    )
    write_atomically(path, text.encode())


def _sections(summary: Row) -> list[tuple[str, list[str], list[Row], list[tuple[str, Markup]]]]:
    law = summary["law"]
    found = [
        ("Compression that keeps the accuracy", [
            "The largest measured compression without significant loss: on the mean of the tasks that count, "
            "on the worst of them, and where a loss above the margin is ruled out on the mean.",
        ], safe_table(summary), []),
        ("What the dense model can do", [
            "A task counts where the dense model gets at least half of its samples right, and by more than "
            "chance; the others are shown only here and in the plots.",
        ], dense_table(summary), []),
        ("Score against compression", [
            "Compression is measured: pairs over computed pairs for prompts, tokens over read tokens for "
            "decoding.",
        ], [], compression_plots(summary)),
        ("Score at equal cost", [
            "Costs are counted operations, choosing included. The line is the front: nothing is better for "
            "less.",
        ], [], cost_plots(summary)),
        ("Best unit per task", [
            "At equal measured compression, scores between the measured ones on the line between them, no "
            "further than every unit goes.",
        ], ranking_table(summary), []),
    ]  # fmt: skip
    if law["coefficients"] is None:
        found.append(("The law", [f"Not fitted: {law['reason']}."], [], []))
    else:
        words = [
            f"R² {law['r_squared']:.3f} on {law['points']} points."
            + (
                f" Without slope, since they did not vary: {', '.join(law['constant'])}."
                if law["constant"]
                else ""
            )
        ]
        words += [
            f"Fitted without {h['axis']} ≥ {h['from']:g}, it tells those {h['points']} points with R² "
            f"{h['r_squared']:.3f} and a mean error of {h['error']:.3f}."
            for h in law["hold_out"]
        ]
        table = [{"coefficient": k, "value": v} for k, v in law["coefficients"].items()]
        found.append(("The law", words, table, [("Expected and measured score", law_plot(law))]))
    return found


# --------------------------------------------------------------------- tables


def safe_table(summary: Row) -> list[Row]:
    """One row per model, length and unit."""
    return [
        {
            "model": r["model"], "tokens": r["length"], "unit": r["unit"], "phase": r["phase"],
            "tried to": _times(r["tried"]),
            "mean of tasks": _times(r["mean"]) if r["mean_can_tell"] else TOO_FEW,
            "loss ruled out": _times(r["ruled_out"]) if r["ruled_out_can_tell"] else TOO_FEW,
            "worst task": _times(r["worst"]) if r["worst_can_tell"] else TOO_FEW,
            "which": r["worst_task"] if r["worst_can_tell"] else None,
        }
        for r in summary["safe"]
    ]  # fmt: skip


def dense_table(summary: Row) -> list[Row]:
    """One row per model, length and task."""
    return [
        {
            "model": r["model"], "tokens": r["length"], "task": r["task"], "score": r["score"],
            "chosen": r["chosen"], "by chance": r["chance"], "generated": r["generated"],
            "counts": r["counts"],
        }
        for r in summary["dense"]
    ]  # fmt: skip


def ranking_table(summary: Row) -> list[Row]:
    """One row per task, phase, length and compression."""
    return [
        {
            "task": r["task"], "phase": r["phase"], "tokens": r["length"],
            "compression": _times(r["compression"]),
            "units, best first": ", ".join(f"{u['unit']} {u['score']:.3f}" for u in r["units"]),
        }
        for r in summary["ranking"]
    ]  # fmt: skip


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _times(compression: float) -> str:
    return f"{compression:.3g}x"


# ---------------------------------------------------------------------- plots


def _axes(x_label: str, y_label: str, log: bool) -> tuple[Any, Any]:
    figure = svg.new_figure(3.4)
    axes: Any = figure.subplots()
    svg.style(axes)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(True, color=svg.GRID, linewidth=0.6)
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return figure, axes


def compression_plots(summary: Row) -> list[tuple[str, Markup]]:
    """Per task, model and length: the score of every unit against its measured compression."""
    plots = []
    units = list(dict.fromkeys(c["unit"] for c in summary["cells"] if c["unit"] != "dense"))
    for number, ((model, task, length), group) in enumerate(
        grouped(summary["cells"], "model", "task", "length").items()
    ):
        figure, axes = _axes("measured compression", summary["score"], log=True)
        tips: dict[str, str] = {}
        dense = [c for c in group if c["unit"] == "dense"]
        for c in dense:
            axes.axhline(c["score"], color=svg.INK, linewidth=0.9, linestyle=(0, (4, 3)))
        for i, unit in enumerate(units):
            own = sorted((c for c in group if c["unit"] == unit), key=lambda c: c["measured"])
            colour = svg.SERIES[i % len(svg.SERIES)]
            path = [*((1.0, c["score"]) for c in dense), *((c["measured"], c["score"]) for c in own)]
            axes.plot(*zip(*path, strict=True), color=colour, linewidth=0.8, label=unit)
            for c in own:
                gid = f"point-{len(tips)}"
                axes.plot([c["measured"]], [c["score"]], MARKS[i % len(MARKS)], color=colour, ms=5.5, gid=gid)
                axes.vlines(c["measured"], *c["interval"], color=colour, linewidth=0.8, alpha=0.5)
                tips[gid] = f"{unit} {c['measured']:.2f}x\n{summary['score']} {c['score']:.3f}\n{c['spec']}"
        axes.legend(fontsize=7, frameon=False, labelcolor=svg.INK)
        shown = "" if not group or group[0]["counts"] else " (the dense model can't do it: not counted)"
        caption = f"{task}, {length:,} tokens, {model}{shown}"
        plots.append((caption, svg.to_svg(figure, f"compression-{number}", caption, tips)))
    return plots


def cost_plots(summary: Row) -> list[tuple[str, Markup]]:
    """Per phase and length: mean score against operations, every model."""
    plots = []
    units = list(dict.fromkeys(p["unit"] for p in summary["isoflops"]))
    models = list(dict.fromkeys(p["model"] for p in summary["isoflops"]))
    for number, ((phase, length), group) in enumerate(
        grouped(summary["isoflops"], "phase", "length").items()
    ):
        label = "operations per prompt" if phase == "prefill" else "operations per token"
        figure, axes = _axes(label, f"mean {summary['score']}", log=False)
        axes.set_xscale("log")
        tips: dict[str, str] = {}
        for p in group:
            gid = f"point-{len(tips)}"
            colour = svg.INK if p["unit"] == "dense" else svg.SERIES[units.index(p["unit"]) % len(svg.SERIES)]
            mark = MARKS[models.index(p["model"]) % len(MARKS)]
            axes.plot([p["flops"]], [p["score"]], mark, color=colour, ms=6, gid=gid)
            tips[gid] = (
                f"{p['model']}\n{p['unit']} {1 / p['density']:.2f}x\n{p['flops']:.3g} operations\n"
                f"score {p['score']:.3f}"
            )
        best = sorted((p["flops"], p["score"]) for p in group if p["front"])
        if best:
            axes.plot(*zip(*best, strict=True), color=svg.INK, linewidth=1, drawstyle="steps-post", zorder=1)
        caption = f"{phase}, {length:,} tokens; shapes are models, colours units, black is dense"
        plots.append((caption, svg.to_svg(figure, f"cost-{number}", caption, tips)))
    return plots


def law_plot(law: Row) -> Markup:
    """Measured against expected scores."""
    figure, axes = _axes("expected by the law", "measured", log=False)
    axes.plot([0, 1], [0, 1], color=svg.MUTED, linewidth=0.8)
    for i, phase in enumerate(("prefill", "decode", "dense")):
        own: Sequence[Row] = [p for p in law["fitted"] if p["phase"] == phase]
        axes.plot(
            [p["expected"] for p in own], [p["score"] for p in own], MARKS[i],
            color=(svg.SERIES[0], svg.SERIES[1], svg.INK)[i], ms=5, label=phase,
        )  # fmt: skip
    axes.legend(fontsize=7, frameon=False, labelcolor=svg.INK)
    return svg.to_svg(figure, "law", "Expected and measured score of every cell")
