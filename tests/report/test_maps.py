"""Pictures of patterns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sparseland.errors import SparselandError
from sparseland.patterns import BlockPattern, WindowPattern
from sparseland.report.figures import _outlines
from sparseland.report.maps import draw_pattern


def ink(path):
    """Share of dark pixels."""
    return float((imread(path)[..., 0] < 0.2).mean())


def test_more_pairs_make_more_ink(tmp_path):
    for name, window in (("narrow", 16), ("wide", 128)):
        draw_pattern(WindowPattern(256, 256, 0, window), tmp_path / name)
    assert 0 < 3 * ink(tmp_path / "narrow") < ink(tmp_path / "wide")


def test_long_patterns_are_binned_to_the_same_picture(tmp_path):
    draw_pattern(WindowPattern(256, 256, 0, 64), tmp_path / "short")
    draw_pattern(WindowPattern(2048, 2048, 0, 512), tmp_path / "long")
    assert ink(tmp_path / "long") == pytest.approx(ink(tmp_path / "short"), rel=0.05)


def test_heads_chunks_and_odd_lengths_are_drawn(tmp_path):
    blocks = torch.rand(1, 3, 3, 10) < 0.5
    draw_pattern(BlockPattern.from_block_mask(blocks, 64, 150, 601), tmp_path / "p.png")
    assert imread(tmp_path / "p.png").shape[1] == 3 * 2.4 * 150


def test_too_large_and_unwritable_are_errors(tmp_path):
    with pytest.raises(SparselandError, match="too large to draw"):
        draw_pattern(WindowPattern(2**15, 2**15, 0, 1), tmp_path / "p.png")
    with pytest.raises(SparselandError, match="can't write"):
        draw_pattern(WindowPattern(8, 8, 0, 1), tmp_path / "no" / "p.png")


def test_outlines_enclose_exactly_the_computed_cells():
    rng = np.random.default_rng(0)
    cells = rng.random((9, 7)) < 0.4
    xs, ys = (np.array(v).reshape(-1, 3)[:, :2] for v in _outlines(cells))
    edges = set()
    for (x0, x1), (y0, y1) in zip(xs, ys, strict=True):
        assert (x0 == x1) != (y0 == y1)
        if y0 == y1:
            edges |= {("h", int(y0), x) for x in range(int(x0), int(x1))}
        else:
            edges |= {("v", y, int(x0)) for y in range(int(y0), int(y1))}
    padded = np.pad(cells, 1)
    wanted = {("h", r, c) for r in range(10) for c in range(7) if padded[r, c + 1] != padded[r + 1, c + 1]}
    wanted |= {("v", r, c) for r in range(9) for c in range(8) if padded[r + 1, c] != padded[r + 1, c + 1]}
    assert edges == wanted
