"""The largest probability of each tile: every backend against the whole attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.block_max_probability import block_max_probability, chunked

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton", "torch"]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
KINDS = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.float32, torch.bfloat16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# batch, query heads, key heads, queries, keys, D, block size
CASES = [
    (1, 3, 1, 70, 70, 64, 16),
    (2, 4, 2, 64, 64, 16, 32),
    (1, 2, 2, 33, 90, 80, 32),  # a later chunk that starts inside a block
    (1, 2, 1, 5, 130, 24, 64),
    (1, 1, 1, 1, 1, 16, 16),
    (1, 2, 1, 40, 150, 16, 128),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Strided as a model's are: tokens before heads in memory."""
    batch, heads, kv_heads, n_queries, n_keys, size = case[:6]
    g = torch.Generator().manual_seed(sum(case))
    q = 2 * torch.randn(batch, n_queries, heads, size, generator=g)
    k = torch.randn(batch, n_keys, kv_heads, size, generator=g)
    return tuple(x.to(DEVICE, dtype).transpose(1, 2) for x in (q, k))


def by_hand(q: Tensor, k: Tensor, size: int, per_query: bool) -> Tensor:
    """Loops over tiles of the causal softmax."""
    offset = k.shape[2] - q.shape[2]
    keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
    p = torch.zeros(*q.shape[:3], k.shape[2], device=q.device)
    for i in range(q.shape[2]):
        seen = keys[:, :, : offset + i + 1]
        logits = (q[:, :, i : i + 1].float() * seen).sum(-1) / q.shape[3] ** 0.5
        p[:, :, i, : offset + i + 1] = logits.softmax(-1)
    rows = 1 if per_query else size
    tall = [t.amax(2) for t in p.split(rows, 2)]
    return torch.stack([torch.stack([t.amax(-1) for t in r.split(size, -1)], -1) for r in tall], 2)


@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_definition(case: tuple[int, ...], per_query: bool) -> None:
    q, k = inputs(case)
    got = block_max_probability(q, k, case[6], per_query=per_query, backend="reference")
    torch.testing.assert_close(got, by_hand(q, k, case[6], per_query), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_backend(case: tuple[int, ...], per_query: bool, backend: str, dtype: torch.dtype) -> None:
    q, k = inputs(case, dtype)
    got = block_max_probability(q, k, case[6], 0.4, per_query=per_query, backend=backend)
    want = block_max_probability(q, k, case[6], 0.4, per_query=per_query, backend="reference")
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert torch.equal(got == 0, want == 0)  # the future, exactly
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_many_chunks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = inputs((2, 4, 2, 130, 200, 16, 16))
    whole = chunked.forward(q, k, 16, 0.3, False)
    monkeypatch.setattr(chunked, "_CPU_CHUNK", 1)
    monkeypatch.setattr(chunked, "_GPU_CHUNK", 1)
    torch.testing.assert_close(chunked.forward(q, k, 16, 0.3, False), whole, rtol=1e-5, atol=1e-7)


def test_blocks_are_the_maximum_over_their_queries() -> None:
    q, k = inputs(CASES[0])
    single = block_max_probability(q, k, 16, per_query=True)
    blocks = block_max_probability(q, k, 16)
    torch.testing.assert_close(blocks[:, :, 1], single[:, :, 16:32].amax(2))


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_a_planted_key(backend: str) -> None:
    """One key that query 50 alone looks for: its tile holds nearly all of it, in one row."""
    q, k = torch.zeros(1, 1, 64, 16, device=DEVICE), torch.zeros(1, 1, 64, 16, device=DEVICE)
    q[0, 0, 50, 3] = k[0, 0, 20, 3] = 10.0
    found = block_max_probability(q, k, 16, backend=backend)[0, 0].cpu()
    assert found[3, 1] > 0.99
    assert found[3, 2] < 0.03
    assert found[2, 1] == pytest.approx(1 / 33, rel=1e-4)  # flat elsewhere: 33 keys for the block's first


@pytest.mark.parametrize("backend", FAST)
def test_large_logits_do_not_overflow(backend: str) -> None:
    q, k = inputs(CASES[0])
    got = block_max_probability(q * 1e4, k, 16, backend=backend)
    want = block_max_probability(q * 1e4, k, 16, backend="reference")
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)


def test_opcheck() -> None:
    for per_query in (False, True):
        args = (*inputs(CASES[0]), 16, 0.3, per_query, "")
        torch.library.opcheck(torch.ops.sparseland.block_max_probability.default, args)


def test_clear_errors() -> None:
    q, k = inputs(CASES[0])
    with pytest.raises(SparselandError, match="block_size=0"):
        block_max_probability(q, k, 0)
    with pytest.raises(SparselandError, match="block size 16, 32, 64 or 128, got 24"):
        block_max_probability(q, k, 24, backend="triton")
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        block_max_probability(q, k, 16, backend="fa4")
    with pytest.raises(SparselandError, match="3 query heads are no multiple of 2"):
        block_max_probability(q, torch.cat((k, k), 1), 16)
    assert block_max_probability(q, k, 24).shape == (1, 3, 3, 3)  # other sizes elsewhere
