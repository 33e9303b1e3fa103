"""Decoding over chosen tokens and pages: every backend against a dense mask written out here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.gather_decode import dense_decode, gather_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
ALL = ["reference", *FAST]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
HALF = [
    (backend, dtype)
    for backend in ALL
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# (maximum, relative RMS) by dtype; bfloat16 carries 8 bits.
TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-2, 5e-3), torch.float16: (3e-3, 7e-4)}
# batch, query heads, key heads, keys, D, index heads, listed, page size
CASES = [
    (2, 3, 3, 150, 64, 3, 70, 1),  # no groups, more than one tile
    (2, 6, 2, 100, 80, 2, 33, 1),  # groups of 3, lists per key head
    (1, 8, 2, 90, 64, 8, 40, 1),  # groups of 4, lists per query head
    (1, 4, 1, 203, 128, 1, 203, 1),  # everything listed
    (1, 3, 1, 61, 8, 1, 1, 1),  # one token
    (2, 4, 2, 131, 96, 2, 5, 16),  # pages, the last of 3 tokens
    (1, 6, 2, 50, 24, 6, 10, 5),  # all pages, lists per query head
    (1, 2, 1, 40, 256, 1, 7, 3),
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    case: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, n_keys, dim, lists, listed, page = case
    g = torch.Generator().manual_seed(sum(case))
    q = torch.randn(batch, heads, 1, dim, generator=g)
    k, v = torch.randn(2, batch, kv_heads, n_keys, dim, generator=g)
    pages = -(-n_keys // page)
    order = torch.rand(batch, lists, pages, generator=g).argsort(-1)[..., :listed]
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype), order.to(DEVICE)


def chosen(case: tuple[int, ...], indices: Tensor) -> Tensor:
    """``[B, Hq, N]``: which keys each query head may see, entry by entry."""
    batch, heads, _, n_keys, _, lists, _, page = case
    mask = torch.zeros(batch, heads, n_keys, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i in indices[b, h * lists // heads].tolist():
                if i >= 0:
                    mask[b, h, i * page : (i + 1) * page] = True
    return mask.to(DEVICE)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Masked softmax over all keys with repeated heads, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~mask[:, :, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    largest, rms = TOLERANCE[dtype]
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden), f"{name}: -inf in other places"
    error = (got.double() - want.double()).masked_fill(hidden, 0.0)
    size = want.double().masked_fill(hidden, 0.0)
    assert error.abs().max() <= largest * max(1.0, size.abs().max()), f"{name}: {error.abs().max()}"
    assert error.norm() <= rms * size.norm(), f"{name}: {error.norm() / size.norm()}"


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_masked_softmax(case: tuple[int, ...], backend: str) -> None:
    q, k, v, indices = inputs(case)
    out, lse = gather_decode(
        q, k, v, indices, scale=0.3, return_lse=True, page_size=case[-1], backend=backend
    )
    want, want_lse = dense(q, k, v, chosen(case, indices), 0.3)
    assert_close("out", out, want)
    assert_close("lse", lse, want_lse)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[5]], ids=str)
def test_half_precision(case: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    q, k, v, indices = inputs(case, dtype)
    out, lse = gather_decode(q, k, v, indices, return_lse=True, page_size=case[-1], backend=backend)
    want, want_lse = dense(q, k, v, chosen(case, indices))
    assert out.dtype == dtype
    assert_close("out", out, want, dtype)
    assert_close("lse", lse, want_lse, dtype)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5]], ids=str)
def test_padding_reads_nothing(case: tuple[int, ...], backend: str, poisoned: None) -> None:
    """-1 anywhere in a list, and everywhere in one; the tokens left out hold NaN."""
    q, k, v, indices = inputs(case)
    indices[:, :, ::3] = -1
    indices[0, 0] = -1
    mask = chosen(case, indices)
    want, want_lse = dense(q, k, v, mask)
    seen = mask.unflatten(1, (k.shape[1], -1)).any(2)  # by any head of the group
    k, v = (x.masked_fill(~seen[..., None], torch.nan) for x in (k, v))
    out, lse = gather_decode(q, k, v, indices, return_lse=True, page_size=case[-1], backend=backend)
    group = q.shape[1] // indices.shape[1]
    assert (out[0, :group] == 0).all()
    assert (lse[0, :group] == -torch.inf).all()
    # Lists per query head: a neighbour's token is not NaN, and one's own are all clean.
    assert_close("out", out, want)
    assert_close("lse", lse, want_lse)


@pytest.mark.parametrize("backend", ALL)
def test_empty_list(backend: str) -> None:
    q, k, v, indices = inputs(CASES[1])
    out, lse = gather_decode(q, k, v, indices[..., :0], return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("layout", ["tokens_first", "room", "heads_last"])
def test_strided_caches(backend: str, layout: str) -> None:
    case = CASES[1]
    q, k, v, indices = inputs(case)
    want = gather_decode(q, k, v, indices, backend="reference")

    def view(x: Tensor) -> Tensor:
        if layout == "tokens_first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "room":  # a static cache with capacity left, read past nowhere
            room = x.new_full((x.shape[0] + 1, x.shape[1], x.shape[2] + 7, x.shape[3] + 3), torch.nan)
            room[1:, :, 5:-2, 2:-1] = x
            return room[1:, :, 5:-2, 2:-1]
        return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)

    k, v, q = view(k), view(v), q.transpose(0, 1).contiguous().transpose(0, 1)
    assert not k.is_contiguous()
    wide = torch.stack([indices, indices], -1)[..., 0]  # a strided list
    assert_close("out", gather_decode(q, k, v, wide, backend=backend), want)
    assert_close("out", gather_decode(q, k, v, indices.int(), backend=backend), want)


@pytest.mark.parametrize("backend", ALL)
def test_everything_listed_is_dense(backend: str) -> None:
    case = CASES[3]
    q, k, v, indices = inputs(case)
    assert_close("out", gather_decode(q, k, v, indices, backend=backend), dense_decode(q, k, v).double())
    half = gather_decode(q, k, v, indices[..., :100], backend=backend)
    assert (half - dense_decode(q, k, v)).abs().max() > 0.05


@pytest.mark.parametrize("backend", FAST)
def test_deterministic_and_order_free(backend: str) -> None:
    q, k, v, indices = inputs(CASES[0])
    first = gather_decode(q, k, v, indices, backend=backend)
    assert torch.equal(first, gather_decode(q, k, v, indices, backend=backend))
    assert_close("out", gather_decode(q, k, v, indices.flip(-1), backend=backend), first)


def test_twice_listed_counts_twice() -> None:
    q, k, v, indices = inputs(CASES[1])
    once = [gather_decode(q, k, v, indices, return_lse=True, backend=b)[1] for b in ALL]
    twice = [
        gather_decode(q, k, v, torch.cat([indices, indices], -1), return_lse=True, backend=b)[1] for b in ALL
    ]
    for a, b in zip(once, twice, strict=True):
        assert_close("lse", b, a + torch.log(torch.tensor(2.0, device=DEVICE)))


@pytest.mark.parametrize("valid", [False, True])
def test_dense_decode(valid: bool) -> None:
    q, k, v, _ = inputs(CASES[1])
    first = torch.tensor([0, 41], device=DEVICE)
    seen = torch.arange(100, device=DEVICE) >= first[:, None]
    some = torch.rand(2, 100, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.3
    some[0] = False  # nothing left
    mask = (seen & some if valid else seen)[:, None].expand(-1, 6, -1)
    out = dense_decode(q, k, v, first_key=first, valid=some if valid else None, scale=0.2)
    assert_close("out", out, dense(q, k, v, mask, 0.2)[0])


@pytest.mark.parametrize("backend", ["", *ALL])
def test_library_registration(backend: str) -> None:
    q, k, v, indices = inputs(CASES[5])
    torch.library.opcheck(torch.ops.sparseland.gather_decode, (q, k, v, indices, 0.1, 16, backend))


def test_compiles() -> None:
    q, k, v, indices = inputs(CASES[2])

    def layer(q: Tensor, k: Tensor, v: Tensor, indices: Tensor) -> Tensor:
        out, lse = gather_decode(q * 2, k, v, indices, return_lse=True)
        return out * lse[..., None]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close("out", compiled(q, k, v, indices), layer(q, k, v, indices))


def test_mistakes_are_named() -> None:
    q, k, v, indices = inputs(CASES[1])
    with pytest.raises(SparselandError, match=r"indices must be \[B, H, n\] with B = 2 and H = 2 .* or 6"):
        gather_decode(q, k, v, indices[:, :1])
    with pytest.raises(SparselandError, match=r"int32 or int64, got torch\.float32"):
        gather_decode(q, k, v, indices.float())
    with pytest.raises(SparselandError, match="one query at a time, got 2"):
        gather_decode(q.expand(-1, -1, 2, -1), k, v, indices)
    with pytest.raises(SparselandError, match="page_size must be at least 1, got 0"):
        gather_decode(q, k, v, indices, page_size=0)
    with pytest.raises(SparselandError, match="reach 100, but the cache has 100 tokens"):
        gather_decode(q, k, v, indices + (indices == indices.max()).long(), backend="reference")
    with pytest.raises(SparselandError, match="no backend 'fast'"):
        gather_decode(q, k, v, indices, backend="fast")
    columns = k.mT.contiguous().mT
    with pytest.raises(SparselandError, match="last dimension of k and v must be contiguous"):
        gather_decode(q, columns, v, indices, backend=FAST[0])
