"""A picture of a pattern: which pairs it computes, one small square a head."""

from __future__ import annotations

import math
from pathlib import Path

from sparseland.errors import SparselandError
from sparseland.patterns import Pattern

MAX_HEADS = 16
MAX_PAIRS = 2**28
MAX_PIXELS = 512


def draw_pattern(pattern: Pattern, path: str | Path) -> None:
    """Write a PNG of the first batch row's mask: the first 16 heads, queries down, keys across.

    A long pattern is binned to at most 512 × 512 cells; a cell's darkness is the share of its causal pairs
    that are computed. The future stays white, what is skipped is pale.

    Raises:
        SparselandError: the dense mask would be too large to hold, or the file can't be written.
    """
    import numpy as np
    import torch.nn.functional as F
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if pattern.n_queries * pattern.n_keys > MAX_PAIRS:
        raise SparselandError(
            f"a pattern of {pattern.n_queries} × {pattern.n_keys} pairs is too large to draw; "
            f"{MAX_PAIRS} is the most"
        )
    mask = pattern.mask()[0, :MAX_HEADS].float()
    density = pattern.density()[0]
    causal = mask.new_ones(1, *mask.shape[-2:]).tril(pattern.offset)
    cell = max(1, -(-max(mask.shape[-2:]) // MAX_PIXELS))
    # Means over cells; the ratio of two means is the share of causal pairs also where a cell is cut.
    shares = F.avg_pool2d(mask, cell, ceil_mode=True) / F.avg_pool2d(causal, cell, ceil_mode=True)
    pictures = shares.numpy()  # NaN, drawn as nothing, where a whole cell is in the future

    columns = min(4, len(pictures))
    lines = math.ceil(len(pictures) / columns)
    figure = Figure(figsize=(2.4 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for head, axes in enumerate(np.atleast_1d(figure.subplots(lines, columns)).flat):
        axes.set_axis_off()
        if head < len(pictures):
            axes.imshow(pictures[head], cmap="Blues", vmin=-0.2, vmax=1, interpolation="none")
            axes.set_title(f"head {head}: {100 * density[head]:.1f} %", fontsize=9)
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as cause:
        raise SparselandError(f"can't write {path}: {cause.strerror or cause}") from cause
