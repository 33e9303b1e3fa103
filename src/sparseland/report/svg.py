"""Matplotlib figures as SVG that lives inside the page: its colours, its fonts, its tooltips."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that no plot uses by itself; each becomes a CSS variable, so that plots follow light and dark.
INK, MUTED, GRID, PAPER, CHOSEN = "#010203", "#010204", "#010205", "#010206", "#010207"
SERIES = tuple(f"#0102{16 + i:02x}" for i in range(8))
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper", CHOSEN: "chosen"} | {
    colour: f"s{i}" for i, colour in enumerate(SERIES)
}

WIDTH = 5.0  # inches; 360 units wide, so that 9-unit letters stay readable on a phone


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure in inches (no pyplot: no global state, no window system)."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(axes: object) -> None:
    """The quiet look that all plots share."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)  # type: ignore[attr-defined]
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)  # type: ignore[attr-defined]
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=8.5, which="both")  # type: ignore[attr-defined]
    axes.xaxis.label.set(color=INK, fontsize=9)  # type: ignore[attr-defined]
    axes.yaxis.label.set(color=INK, fontsize=9)  # type: ignore[attr-defined]
    axes.title.set(color=INK, fontsize=9.5)  # type: ignore[attr-defined]


def to_svg(figure: Figure, name: str, description: str, points: Mapping[str, str] | None = None) -> Markup:
    """The figure as one ``<svg>`` element.

    Args:
        figure: drawn with this module's colours.
        name: unique on the page; prefixes every id, since inline SVGs share one name space.
        description: what a screen reader says.
        points: artist gid -> text. These groups can be focused, and show the text as a tooltip even
            where scripts don't run (``<title>``). The first one is the plot's tab stop.
    """
    import matplotlib

    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}
    with matplotlib.rc_context(settings):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    for i, (gid, tip) in enumerate(
        sorted((points or {}).items(), key=lambda item: int(item[0].split("-")[-1]))
    ):
        tip = str(escape(tip))
        opened = (
            f'<g id="{name}-{gid}" class="point" tabindex="{0 if i == 0 else -1}" role="img" '
            f'aria-label="{tip.replace(chr(10), "; ")}"><title>{tip}</title>'
        )
        text = text.replace(f'<g id="{name}-{gid}">', opened, 1)
    role = "group" if points else "img"
    head = f'<svg role="{role}" aria-label="{escape(description)}" '
    # Without width and height the page decides the size; viewBox keeps the proportions.
    text = re.sub(r'<svg ((?:(?!viewBox|>).)*)(viewBox="[^"]*")[^>]*>', rf"{head}\2>", text, count=1)
    return Markup(text.replace("xlink:href", "href").strip())
