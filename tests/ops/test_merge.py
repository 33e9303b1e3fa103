"""merge_attention: parts over disjoint keys give what one softmax over all keys gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.merge import merge_attention


def part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked attention and its log-sum-exp; 0 and -inf where nothing is seen."""
    s = (q @ k.transpose(-1, -2)).masked_fill(~mask, -math.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return p @ v, lse


def inputs(**options: object) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 7, 8), (2, 3, 20, 8), (2, 3, 20, 8))
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def masks() -> list[Tensor]:
    """Three disjoint masks; query 0 sees nothing in the first, query 1 nothing in any."""
    owner = torch.randint(0, 3, (7, 20), generator=torch.Generator().manual_seed(1))
    owner[0, owner[0] == 0] = 1
    owner[1] = -1
    return [owner == i for i in range(3)]


def test_parts_make_the_whole() -> None:
    q, k, v = inputs()
    out, lse = merge_attention([part(q, k, v, m) for m in masks()])
    expected, expected_lse = part(q, k, v, torch.stack(masks()).any(0))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert (out[..., 1, :] == 0).all()
    assert (lse[..., 1] == -math.inf).all()
    assert not torch.equal(out, part(q, k, v, masks()[1])[0])


def test_gradients_pass_through_outputs_and_lse() -> None:
    q, k, v = inputs()
    grads = []
    for out, lse in (
        merge_attention([part(q, k, v, m) for m in masks()]),
        part(q, k, v, torch.stack(masks()).any(0)),
    ):
        seen = lse > -math.inf
        loss = (out.sin().sum(-1) + 0.3 * lse.masked_fill(~seen, 0).cos()).sum()
        grads.append(torch.autograd.grad(loss, (q, k, v)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_an_unseen_part_may_hold_anything() -> None:
    q, k, v = inputs()
    parts = [part(q, k, v, m) for m in masks()]
    expected, _ = merge_attention(parts)
    unseen = parts[0][1] == -math.inf
    poisoned = parts[0][0].masked_fill(unseen[..., None], math.nan)
    out, lse = merge_attention([(poisoned, parts[0][1]), *parts[1:]])
    torch.testing.assert_close(out, expected)
    (grad,) = torch.autograd.grad(out.sum() + lse[..., 2:].sum(), q)
    assert grad.isfinite().all()


def test_large_logits_and_low_precision() -> None:
    lse = torch.tensor([1e4, -1e4, 0.0])
    out, merged = merge_attention(
        [(torch.ones(3, 2, dtype=torch.bfloat16), lse), (3 * torch.ones(3, 2, dtype=torch.bfloat16), lse)]
    )
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), 2 * torch.ones(3, 2))
    torch.testing.assert_close(merged, lse + math.log(2))


def test_one_part_is_itself() -> None:
    q, k, v = inputs()
    one = part(q, k, v, masks()[0])
    for got, expected in zip(merge_attention([one]), one, strict=True):
        torch.testing.assert_close(got, expected)


def test_refusals() -> None:
    with pytest.raises(SparselandError, match="no parts"):
        merge_attention([])
    with pytest.raises(SparselandError, match=r"must be \[3, 2\]"):
        merge_attention([(torch.zeros(3, 2), torch.zeros(3)), (torch.zeros(4, 2), torch.zeros(4))])


def test_a_part_that_is_no_number_makes_the_whole_none() -> None:
    whole, nothing = torch.ones(2, 3), torch.zeros(2, 3)
    lse = torch.tensor([0.0, math.nan])
    out, total = merge_attention([(whole, lse), (nothing, torch.full((2,), -math.inf))])
    assert out.isnan().all(-1).tolist() == [False, True]
    assert total.isnan().tolist() == [False, True]
