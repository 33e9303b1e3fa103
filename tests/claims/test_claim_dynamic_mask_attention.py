"""The recall claim of DMA: its controls, and what it calls like dense (the claim is run, not tested)."""

from __future__ import annotations

import torch

from sparseland.claims._training import IGNORE
from sparseland.claims.dynamic_mask_attention import RandomTop, Recall, like_dense
from sparseland.method import AttentionInputs


def test_the_verdict_needs_both_sides():
    good = {"dense": 1.0, "dma": 0.95, "window": 0.2, "random": 0.5}
    assert like_dense(good)
    assert not like_dense({**good, "dma": 0.8})  # below dense
    assert not like_dense({**good, "window": 0.7})  # a window does it too
    assert not like_dense({**good, "random": 0.7})


def test_the_random_control_keeps_as_many_keys_and_ignores_what_they_hold():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 50, 8, generator=g) for h in (4, 2, 2))
    method = RandomTop(keep=7)
    pattern = method.pattern(AttentionInputs(q, k, v, 1.0, 0))
    assert torch.equal(pattern.mask().sum(-1)[0, 0], torch.arange(1, 51).clamp(max=7))
    other = method.pattern(AttentionInputs(q, k * 3, -v, 1.0, 0))
    assert torch.equal(pattern.ends, other.ends)
    assert not torch.equal(pattern.ends, method.pattern(AttentionInputs(q, k, v, 1.0, 1)).ends)
    assert pattern.bias is None


def test_both_tasks_run_and_count_what_is_remembered():
    for hops in (1, 2):
        task = Recall("task", length=32, keep=8, batch=2, steps=2, lr=1e-3, hops=hops, pairs=3)
        batch = next(task.batches(2, 0))
        assert (batch.targets != IGNORE).sum() == 2 * 2 * 3
        accuracy, rows = task.run(0, "cpu")
        assert set(accuracy) == {"dense", "window", "random", "dma"}
        assert {row["step"] for row in rows} == {0, 1, 2}
        shares = [row["pairs_remembered"] for row in rows if "pairs_remembered" in row]
        assert len(shares) == (3 if hops == 1 else 0)
        assert all(0 <= share <= 1 for share in shares)
