"""MASFormer's claim: the recipe starts from the conversion, and both controls are what they are called."""

from __future__ import annotations

import itertools

import torch

from sparseland.attention.masformer import MASFormer
from sparseland.claims._training import copy_batches, evaluate, small_model
from sparseland.claims.masformer import continue_training


def test_the_recipe_reports_the_model_right_after_the_conversion():
    model = small_model("smoke", vocab=32, length=64, layers=3)
    held_out = list(itertools.islice(copy_batches(4, 64, 8, 16, vocab=32, seed=9), 1))
    before = evaluate(model, held_out)
    batches = copy_batches(4, 64, 8, 16, vocab=32, seed=1)
    layout = MASFormer(full=1, span=8)
    converted = continue_training(model, layout, batches, 2, held_out, lr=1e-3, buckets=8, label="x")
    assert converted.curve[0]["step"] == 0
    assert converted.curve[0]["loss"] != before["loss"]
    assert len(converted.last["loss_by_position"]) == 8
    assert converted.last["tokens"] == 2 * 4 * 64
    assert model.config._attn_implementation == "sdpa"

    control = small_model("smoke", vocab=32, length=64, layers=3)
    dense = continue_training(control, None, batches, 1, held_out, lr=1e-3, label="dense")
    assert dense.curve[0]["loss"] == before["loss"]


def test_layouts_differ_only_behind_the_first_block():
    """Losses by position: what lies in the first block sees all there is in any layout."""
    model = small_model("smoke", vocab=32, length=64, layers=3, initializer_range=0.2)
    ids = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = type(next(copy_batches(1, 64, 8, 16)))(ids[:, :-1], ids[:, 1:])
    losses = []
    for layout in (None, MASFormer(full=0, span=16)):
        run = continue_training(model, layout, [], 0, [batch], lr=1e-3, buckets=4, label="x")
        losses.append(run.last["loss_by_position"])
    torch.testing.assert_close(losses[0][0], losses[1][0])
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses[0][1:], losses[1][1:], strict=True))
