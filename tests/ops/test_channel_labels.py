"""Labels of keys: every backend against loops over single numbers, and what a cache of them must keep.

On a machine with a CUDA device the same tests run there (and the Triton kernels are compiled).
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.channel_labels import (
    BITS,
    _label_scores,
    _write_labels,
    label_scores,
    row_width,
    write_labels,
)
from sparseland.ops.channel_labels.layout import pack, quantise, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch", "reference"] + (["cpu"] if DEVICE == "cpu" else [])
# batch, query heads, key heads, label heads, tokens, D, channels
CASES = {
    "a label per query head": (2, 6, 2, 6, 37, 16, 4),
    "a label per key head": (2, 6, 2, 2, 37, 16, 4),
    "bytes that are not full": (1, 4, 2, 4, 50, 24, 5),
    "one channel": (1, 2, 1, 2, 9, 8, 1),
    "all channels, more than a tile": (1, 3, 3, 3, 300, 64, 64),
}


def inputs(case: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, kv_heads, label_heads, n, dim, count = case
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, 1, dim, generator=g)
    k = torch.randn(batch, kv_heads, n, dim, generator=g)
    channels = torch.rand(label_heads, dim, generator=g).argsort(-1)[:, :count]
    return q.to(DEVICE), k.to(DEVICE), channels.to(DEVICE)


def empty_cache(k: Tensor, channels: Tensor, bits: int, n: int) -> tuple[Tensor, Tensor | None]:
    """Room for n labels, full of what must not be seen."""
    shape, width = (k.shape[0], channels.shape[0], n), row_width(channels.shape[1], bits)
    if bits == 16:
        return torch.full((*shape, width), torch.nan, dtype=k.dtype, device=k.device), None
    rows = torch.full((*shape, width), 255, dtype=torch.uint8, device=k.device)
    return rows, torch.full((*shape, 2), torch.nan, dtype=torch.float16, device=k.device)


def filled(
    k: Tensor, channels: Tensor, bits: int, backend: str | None, chunks: int = 1
) -> tuple[Tensor, Tensor | None]:
    rows, ranges = empty_cache(k, channels, bits, k.shape[2])
    at = 0
    for part in k.chunk(chunks, dim=2):
        write_labels(part, channels, bits, rows, ranges, at, backend=backend)
        at += part.shape[2]
    return rows, ranges


def rounded(label: list[float], bits: int) -> list[float]:
    """One row as Double Sparsity rounds it, number by number; its range is kept in half precision."""
    if bits == 16:
        return label
    levels = 2**bits - 1
    low, high = torch.tensor(min(label)), torch.tensor(max(label))
    step = float((high - low) / levels) or 1.0  # in float32: a double may round to another half
    low, step = torch.tensor([float(low), step]).half().tolist()
    return [low + step * min(levels, max(0, round((x - low) / step))) for x in label]


def literal_scores(q: Tensor, k: Tensor, channels: Tensor, bits: int) -> Tensor:
    q, k, channels = q.cpu(), k.cpu(), channels.cpu()
    batch, heads, n = q.shape[0], q.shape[1], k.shape[2]
    out = torch.zeros(batch, heads, n)
    for b, h, t in itertools.product(range(batch), range(heads), range(n)):
        chosen = channels[h * channels.shape[0] // heads]
        label = k[b, h * k.shape[1] // heads, t, chosen].tolist()
        query = q[b, h, 0, chosen].tolist()
        out[b, h, t] = sum(x * y for x, y in zip(query, rounded(label, bits), strict=True))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CASES)
def test_scores_are_products_of_rounded_channels(backend: str, bits: int, name: str) -> None:
    q, k, channels = inputs(CASES[name])
    rows, ranges = filled(k, channels, bits, backend)
    got = label_scores(q, channels, bits, rows, ranges, backend=backend)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu(), literal_scores(q, k, channels, bits), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [5, 1500])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_kernels_score_as_the_reference(
    bits: int, dtype: torch.dtype, n: int, name: str
) -> None:
    """Query heads that share labels have a kernel of their own, on tensor cores; slices are several tiles."""
    q, k, channels = inputs((*CASES[name][:4], n, *CASES[name][5:]))
    held = filled(k.to(dtype), channels, bits, "reference")
    first = torch.tensor([2, 4][: q.shape[0]], device=DEVICE)
    got, want = (
        label_scores(q.to(dtype), channels, bits, *held, first_key=first, backend=backend)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_kernels_write_the_references_bits(bits: int, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and DEVICE == "cpu":
        _, k, channels = inputs(CASES["one channel"])
        with pytest.raises(SparselandError, match="interpreter"):
            filled(k.bfloat16(), channels, bits, "triton")
        return
    _, k, channels = inputs((2, 6, 2, 6, 700, 64, 16))
    k = k.to(dtype)
    for got, want in zip(
        filled(k, channels, bits, "triton"), filled(k, channels, bits, "reference"), strict=True
    ):
        assert (got is None) == (want is None)
        assert got is None or want is None or torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 16])
def test_written_in_pieces_is_written_at_once(backend: str, bits: int) -> None:
    _, k, channels = inputs(CASES["bytes that are not full"])
    once, pieces = filled(k, channels, bits, backend), filled(k, channels, bits, backend, chunks=7)
    assert torch.equal(once[0], pieces[0])
    assert bits == 16 or torch.equal(once[1], pieces[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_rows_asked_for_are_written(backend: str) -> None:
    _, k, channels = inputs(CASES["a label per query head"])
    rows, ranges = empty_cache(k, channels, 4, 90)
    write_labels(k, channels, 4, rows, ranges, 20, backend=backend)
    assert ranges is not None
    outside = [*range(20), *range(57, 90)]
    assert (rows[:, :, outside] == 255).all()
    assert ranges[:, :, outside].isnan().all()
    assert not ranges[:, :, 20:57].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [2, 16])
def test_views_of_larger_storage(backend: str, bits: int) -> None:
    """What a growing cache and a model's projections hand over."""
    q, k, channels = inputs(CASES["a label per key head"])
    want = label_scores(q, channels, bits, *filled(k, channels, bits, backend), backend=backend)
    rows, ranges = empty_cache(k, channels, bits, 64)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    q = torch.stack([q, q], -1)[..., 0]
    write_labels(k, channels, bits, rows, ranges, 0, backend=backend)
    held = rows[:, :, :37], None if ranges is None else ranges[:, :, :37]
    assert torch.equal(label_scores(q, channels, bits, *held, backend=backend), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_scores_lowest(backend: str) -> None:
    q, k, channels = inputs(CASES["a label per query head"])
    rows, ranges = filled(k, channels, 4, backend)
    plain = label_scores(q, channels, 4, rows, ranges, backend=backend)
    first = torch.tensor([0, 11], device=DEVICE)
    got = label_scores(q, channels, 4, rows, ranges, first_key=first, backend=backend)
    assert torch.equal(got[0], plain[0])
    assert (got[1, :, :11] == -torch.inf).all()
    assert torch.equal(got[1, :, 11:], plain[1, :, 11:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("combine", ["mean", "max"])
def test_scores_of_heads_that_share_labels_combined(combine: str, backend: str, dtype: torch.dtype) -> None:
    q, k, channels = inputs(CASES["a label per key head"])
    q, k = q.to(dtype), k.to(dtype)
    k[1, 1, 30] = torch.nan
    held = filled(k, channels, 4, "reference")
    first = torch.tensor([0, 11], device=DEVICE)
    each = label_scores(q, channels, 4, *held, first_key=first, backend="reference").unflatten(1, (2, 3))
    want = each.mean(2) if combine == "mean" else each.amax(2)
    got = label_scores(q, channels, 4, *held, first_key=first, combine=combine, backend=backend)
    torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_rows_are_exact(backend: str) -> None:
    k = torch.tensor([2.5, 0.0, -3.0])[None, None, :, None].expand(1, 1, 3, 8).to(DEVICE)
    q, channels = torch.ones(1, 1, 1, 8, device=DEVICE), torch.arange(8, device=DEVICE)[None]
    scores = label_scores(q, channels, 4, *filled(k, channels, 4, backend), backend=backend)
    assert scores.flatten().tolist() == [20.0, 0.0, -24.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 16])
def test_a_nan_stays_in_its_row(backend: str, bits: int) -> None:
    q, k, channels = inputs(CASES["all channels, more than a tile"])
    k[0, 1, 40, 3] = torch.nan
    scores = label_scores(q, channels, bits, *filled(k, channels, bits, backend), backend=backend)
    where = scores.isnan().nonzero().tolist()
    assert where == [[0, 1, 40]]


def test_pack_keeps_every_code() -> None:
    codes = torch.randint(0, 4, (3, 5, 7), dtype=torch.uint8)
    packed = pack(codes, 2)
    assert packed.shape == (3, 5, 2)
    assert torch.equal(unpack(packed, 2, 7), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_errs_by_half_a_step(bits: int) -> None:
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    codes, ranges = quantise(x, bits)
    low, step = ranges.float()[..., None].unbind(-2)
    error = (low + step * codes - x).abs() / step
    assert error.max() < 0.5 + 0.01 * 2**bits  # the range itself is rounded to half precision


def test_no_rows_no_tokens() -> None:
    q, k, channels = inputs(CASES["one channel"])
    rows, ranges = empty_cache(k, channels, 4, 3)
    write_labels(k[:, :, :0], channels, 4, rows, ranges, 3)
    assert (rows == 255).all()
    for backend in BACKENDS:
        held = rows[:, :, :0], ranges[:, :, :0]  # type: ignore[index]
        assert label_scores(q, channels, 4, *held, backend=backend).shape == (1, 2, 0)


def test_opcheck() -> None:
    q, k, channels = inputs(CASES["bytes that are not full"])
    for bits in (4, 16):
        rows, ranges = filled(k, channels, bits, "reference")
        torch.library.opcheck(_write_labels.registered, (k, channels, bits, rows, ranges, 0))
        torch.library.opcheck(_label_scores.registered, (q, channels, bits, rows, ranges, None, None))


def test_mistakes_are_named() -> None:
    q, k, channels = inputs(CASES["a label per query head"])
    rows, ranges = empty_cache(k, channels, 4, 40)
    with pytest.raises(SparselandError, match="bits=3 is not allowed"):
        write_labels(k, channels, 3, rows, ranges, 0)
    with pytest.raises(SparselandError, match="rows 4 to 41 were asked for, the cache has 40"):
        write_labels(k, channels, 4, rows, ranges, 4)
    with pytest.raises(SparselandError, match="ranges must be float16"):
        write_labels(k, channels, 4, rows, None, 0)
    with pytest.raises(SparselandError, match=r"rows must be torch\.uint8"):
        label_scores(q, channels, 4, rows.float(), ranges)
    with pytest.raises(SparselandError, match="H a multiple of Hkv"):
        write_labels(k, channels[:3], 4, rows, ranges, 0)
    with pytest.raises(SparselandError, match="combine='sum' is not allowed"):
        label_scores(q, channels, 4, rows, ranges, combine="sum")
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        label_scores(q, channels, 4, rows, ranges, backend="fa4")
