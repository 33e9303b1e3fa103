"""The plots of the page, drawn by matplotlib: trade-offs, densities, attention maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from sparseland.report import svg
from sparseland.report.pareto import (
    Row,
    acts_on_decoding,
    acts_on_prompt,
    decode_loss_change,
    decoding_front,
    loss_change,
    number,
    prompt_front,
)
from sparseland.report.results import Recipe, key
from sparseland.report.words import facts, spec_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
CONTROL_MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Mark:
    """How a family of configurations is drawn, the same in every plot."""

    name: str
    colour: str
    marker: str
    control: bool = False

    @property
    def variable(self) -> str:
        """The page's name of the colour."""
        return svg.VARIABLES[self.colour]


def families(rows: Sequence[Row]) -> dict[str, Mark]:
    """Family -> mark, in order of appearance. Colour and shape both differ: neither alone carries it."""
    marks: dict[str, Mark] = {}
    methods = controls = 0
    for row in rows:
        name = family(row)
        if name in marks:
            continue
        if name == "dense":
            marks[name] = Mark(name, svg.INK, "*")
        elif row.get("role") == "control":
            marks[name] = Mark(
                name, svg.MUTED, CONTROL_MARKERS[controls % len(CONTROL_MARKERS)], control=True
            )
            controls += 1
        else:
            marks[name] = Mark(name, svg.SERIES[methods % len(svg.SERIES)], MARKERS[methods % len(MARKERS)])
            methods += 1
    return marks


def family(row: Row) -> str:
    """What a row is a setting of: its method's slug, or all compositions together."""
    recipe = row.get("recipe") or ()
    if not recipe:
        return "dense"
    return "composition" if len(recipe) > 1 else spec_name(str(recipe[0]).partition(":")[0])


@dataclass(frozen=True)
class Tradeoff:
    """One kind of trade-off plot."""

    name: str
    title: str
    x_label: str
    y_label: str
    x: Callable[[Row], float | None]
    y: Callable[[Row], float | None]
    acts: Callable[[Row], bool]
    front: Callable[[Sequence[Row]], set[int]]


def _density(row: Row) -> float | None:
    return 1.0 if row.get("role") == "dense" else number(row, "density")


def _decode_density(row: Row) -> float | None:
    return 1.0 if row.get("role") == "dense" else number(row, "decode_density")


def _cache(row: Row) -> float | None:
    held = number(row, "cache_bytes")
    return None if held is None else held / 1e6


TRADEOFFS = (
    Tradeoff(
        "prompt", "Loss against prompt time", "seconds to read the prompt", "loss change",
        lambda r: number(r, "prefill_s"), loss_change, acts_on_prompt, prompt_front,
    ),
    Tradeoff(
        "density", "Loss against density", "density (computed pairs / causal pairs)", "loss change",
        _density, loss_change, acts_on_prompt, lambda rows: prompt_front(rows, _density),
    ),
    Tradeoff(
        "decoding", "Decoding loss against time a token", "milliseconds a token", "decoding loss change",
        lambda r: number(r, "decode_ms"), decode_loss_change, acts_on_decoding, decoding_front,
    ),
    Tradeoff(
        "decode-density", "Decoding loss against tokens read", "density of decoding (read / cached tokens)",
        "decoding loss change", _decode_density, decode_loss_change,
        lambda r: (number(r, "decode_density") or 1) < 1, lambda rows: decoding_front(rows, _decode_density),
    ),
    Tradeoff(
        "cache", "Decoding loss against cache size", "megabytes of cache", "decoding loss change",
        _cache, decode_loss_change, lambda r: number(r, "cache_bytes") != number(r, "dense_cache_bytes"),
        lambda rows: decoding_front(rows, _cache),
    ),
)  # fmt: skip


def tradeoff(
    kind: Tradeoff,
    rows: Sequence[dict[str, Any]],
    marks: dict[str, Mark],
    *,
    numbers: dict[int, int],
    tasks: Sequence[dict[str, Any]] = (),
    chosen: Recipe | None = None,
    tolerance: float | None = None,
) -> Markup | None:
    """One trade-off plot at one length, or None if fewer than two configurations can be drawn.

    Args:
        rows: measurements of one length.
        marks: from :func:`families` over all lengths.
        numbers: index in ``rows`` -> the row's number in the table; front points carry it.
        tasks: for the tooltips.
        chosen: the chosen recipe, ringed.
        tolerance: the allowed relative loss change, drawn as a line.
    """
    drawn = [
        (i, row, x, 100 * y)
        for i, row in enumerate(rows)
        if row.get("status", "ok") == "ok"
        and (row.get("role") == "dense" or kind.acts(row))
        and (x := kind.x(row)) is not None
        and (y := kind.y(row)) is not None
    ]
    if len(drawn) < 2:
        return None
    figure = svg.new_figure(3.7)
    axes = figure.subplots()
    svg.style(axes)
    axes.set_xlabel(kind.x_label)
    axes.set_ylabel(kind.y_label)
    axes.grid(True, color=svg.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    edge = _edge([d[2] for d in drawn if d[1].get("role") != "control"])
    _scales(axes, [min(d[2], edge) for d in drawn], [d[3] for d in drawn], tolerance)
    if tolerance is not None:
        axes.axhline(100 * tolerance, color=svg.CHOSEN, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    _settings_of_one_method(axes, drawn, marks, edge)
    front = kind.front(rows)
    corners = sorted((x, y) for i, _, x, y in drawn if i in front)
    axes.plot(*zip(*corners, strict=True), color=svg.INK, linewidth=1.1, drawstyle="steps-post", zorder=2)
    for i, row, x, y in drawn:
        if x > edge:
            axes.annotate(
                f"{family(row)} {x:.3g} →", (edge, y), xytext=(-7, 0), textcoords="offset points",
                ha="right", va="center", fontsize=7.5, color=svg.MUTED,
            )  # fmt: skip
        x = min(x, edge)
        _point(axes, marks[family(row)], f"point-{i}", x, y, screen=row.get("stage") == "screen")
        if key(row) == chosen and chosen:
            axes.plot([x], [y], "o", ms=13, mfc="none", mec=svg.CHOSEN, mew=1.6, zorder=5)
    axes.figure.canvas.draw()  # places on the paper are known only after layout
    if tolerance is not None:
        _name_line(axes, 100 * tolerance, [(min(x, edge), y) for _, _, x, y in drawn])
    _number_front(axes, [(x, y, numbers[i]) for i, row, x, y in drawn if i in front and row.get("recipe")])
    tips = {f"point-{i}": "\n".join(facts(row, tasks)) for i, row, _, _ in drawn}
    length = rows[0]["length"]
    description = (
        f"{kind.title} at {length:,} tokens, {len(drawn)} configurations; arrow keys move between them"
    )
    return svg.to_svg(figure, f"{kind.name}-{length}", description, tips)


def _edge(xs: list[float]) -> float:
    """Where the axis ends: a control far slower than all candidates must not squeeze them together."""
    return 1.25 * max(xs)


def _scales(axes: Axes, xs: list[float], ys: list[float], tolerance: float | None) -> None:
    """Linear where the numbers lie close together; logarithmic where they spread over decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    if min(xs) > 0 and max(xs) / min(xs) > 6:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    low, high = min(ys), max(ys)
    if high > 8 or low < -8:
        linear = max(100 * (tolerance or 0.01), 0.1)
        axes.set_yscale("symlog", linthresh=linear, linscale=0.8)
        axes.set_ylim(min(-linear / 3, 1.6 * low if low < 0 else 0), max(1.8 * high, 2 * linear))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:+g} %" if v else "0 %"))
    axes.margins(x=0.07)


def _settings_of_one_method(axes: Axes, drawn: list[Any], marks: dict[str, Mark], edge: float) -> None:
    """A thin line through the budgets of each method: its own trade-off."""
    for name, mark in marks.items():
        if name in ("dense", "composition"):
            continue
        path = sorted((x, y) for _, row, x, y in drawn if family(row) == name and x <= edge)
        if len(path) > 1:
            axes.plot(
                *zip(*path, strict=True), color=mark.colour, linewidth=0.8, zorder=1.5,
                linestyle=(0, (1, 2)) if mark.control else "-", alpha=0.55,
            )  # fmt: skip


def _point(axes: Axes, mark: Mark, gid: str, x: float, y: float, *, screen: bool) -> None:
    dense = mark.name == "dense"
    face = svg.PAPER if mark.control or screen else mark.colour
    edge = svg.PAPER if dense else mark.colour
    axes.plot(
        [x], [y], mark.marker, gid=gid, ms=11 if dense else 6.5, mfc=face, mec=edge,
        mew=0.8 if dense else 1.3, zorder=4 if dense else 3, clip_on=False,
    )  # fmt: skip


def _name_line(axes: Axes, y: float, points: list[tuple[float, float]]) -> None:
    """What the line of the allowed change is, at the end where fewer points would lie under the words."""
    places = axes.transAxes.inverted().transform(axes.transData.transform([*points, (points[0][0], y)]))
    near = [px for px, py in places[:-1] if -0.02 < py - places[-1][1] < 0.07]
    right = sum(px > 0.75 for px in near) <= sum(px < 0.25 for px in near)
    axes.annotate(
        f"allowed: {y:g} %", (float(right), y), xycoords=("axes fraction", "data"),
        xytext=(-2 if right else 3, 2), textcoords="offset points", ha="right" if right else "left",
        va="bottom", fontsize=7.5, color=svg.CHOSEN,
    )  # fmt: skip


def _number_front(axes: Axes, points: list[tuple[float, float, int]]) -> None:
    """The row numbers beside the front's points, left out where they would lie on one another."""
    taken: list[tuple[float, float]] = []
    for x, y, n in sorted(points):
        px, py = axes.transData.transform((x, y))
        if any(abs(px - a) < 14 and abs(py - b) < 10 for a, b in taken):
            continue
        taken.append((px, py))
        axes.annotate(
            str(n),
            (x, y),
            xytext=(-6, -10),
            textcoords="offset points",
            fontsize=7.5,
            color=svg.INK,
            ha="right",
        )


def densities(head_density: Sequence[Sequence[float]], name: str, description: str) -> Markup:
    """Density of every head: layers down, heads across, one scale from 0 to 1 for all recipes."""
    import numpy as np

    cells = np.asarray(head_density, dtype=float)
    layers, heads = cells.shape
    figure = svg.new_figure(min(0.75 + 0.1 * layers, 5.5), 3.4)
    axes = figure.subplots()
    svg.style(axes)
    axes.imshow(cells, vmin=0, vmax=1, cmap="cividis", aspect="auto", interpolation="none")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    for axis, count in ((axes.xaxis, heads), (axes.yaxis, layers)):
        axis.set_ticks(range(0, count, max(1, -(-count // 10))))
    return svg.to_svg(figure, name, description)


def attention_map(
    mass: Sequence[Sequence[float]], computed: Sequence[Sequence[float]], name: str, description: str
) -> Markup:
    """True attention mass of one head (blue, logarithmic) under the computed pairs (orange)."""
    import numpy as np

    true = np.asarray(mass, dtype=float)
    share = np.clip(np.nan_to_num(np.asarray(computed, dtype=float)), 0, 1)
    rows, columns = true.shape
    figure = svg.new_figure(3.2, 3.2)
    axes = figure.subplots()
    svg.style(axes)
    axes.spines[["left", "bottom"]].set_visible(False)
    box = (0, columns, rows, 0)
    axes.imshow(_blue(true), extent=box, interpolation="none")
    wash = np.zeros((*share.shape, 4))
    wash[..., :3] = np.array([213, 94, 0]) / 255
    # A stripe of one key fills 1/64 of its bin: the root keeps it visible, and a full bin below solid.
    wash[..., 3] = 0.18 * np.sqrt(share)
    axes.imshow(wash, extent=box, interpolation="none")
    axes.plot(*_outlines(share > 0), color="#d55e00", linewidth=0.7, solid_capstyle="butt")
    axes.plot([0, columns], [0, rows], color=svg.MUTED, linewidth=0.6)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[], xlabel="keys →", ylabel="← queries")
    return svg.to_svg(figure, name, description)


def _blue(mass: Any) -> Any:
    """Mass as the opacity of one blue (four decades), so that it reads on light and on dark paper."""
    import numpy as np

    top = mass.max()
    with np.errstate(divide="ignore", invalid="ignore"):
        level = np.clip(1 + np.log10(mass / top) / 4, 0, 1) if top > 0 else np.zeros_like(mass)
    image = np.zeros((*mass.shape, 4))
    image[..., :3] = np.array([40, 120, 200]) / 255
    image[..., 3] = 0.85 * np.nan_to_num(level)
    return image


def _outlines(cells: Any) -> tuple[list[float], list[float]]:
    """The borders between computed and other bins as one path of long straight strokes (NaN between them)."""
    import numpy as np

    xs: list[float] = []
    ys: list[float] = []
    padded = np.pad(cells, 1)
    for grid, along, across in ((padded, xs, ys), (padded.T, ys, xs)):
        change = grid[1:, 1:-1] != grid[:-1, 1:-1]  # a border above row r, over column c
        starts = change & ~np.pad(change, ((0, 0), (1, 0)))[:, :-1]
        for r, c in zip(*np.nonzero(starts), strict=True):
            end = c + int(np.argmin(np.append(change[r, c:], False)))
            along += [float(c), float(end), np.nan]
            across += [float(r), float(r), np.nan]
    return xs, ys
