"""The low-bit estimate: every backend against the definition, its geometry, lists, bad numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sparseland import patterns
from sparseland.errors import SparselandError
from sparseland.ops._dispatch import why_no_gluon
from sparseland.ops.lowbit_scores import fast, kept_tiles, lowbit_tiles, reference, tile_blocks
from sparseland.ops.lowbit_scores import triton as kernels
from sparseland.ops.lowbit_scores.tiles import judged, n_judged, pack, unpack
from sparseland.ops.lowbit_scores.triton import tile_lists
from sparseland.patterns import BlockPattern, cdiv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton", "torch"] if DEVICE == "cuda" else ["cpu", "triton"]
if why_no_gluon(torch.empty(0, device=DEVICE)) is None:
    FAST.insert(0, "gluon")
# They compare in float16: an estimate near the threshold may fall to either side.
HALF = ("gluon", "triton")
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
KINDS = [
    (backend, dtype)
    for backend in FAST
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# batch, query heads, key heads, queries, keys, D
CASES = [
    (1, 3, 1, 320, 320, 64),
    (2, 2, 1, 70, 450, 80),  # a later chunk that starts within a tile
    (1, 2, 2, 200, 392, 16),  # odd length, a chunk that starts at a tile's edge
    (1, 1, 1, 5, 400, 32),
    (1, 2, 1, 100, 100, 16),  # all local
    (1, 1, 1, 1, 1, 16),
]


def inputs(case: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with means that are not 0, and keys of different strength; tau per head."""
    batch, heads, kv_heads, n_queries, n_keys, size = case
    g = torch.Generator().manual_seed(sum(case))
    q = 1.5 * torch.randn(batch, n_queries, heads, size, generator=g) + 0.5
    k = torch.randn(batch, n_keys, kv_heads, size, generator=g) * torch.rand(1, n_keys, 1, 1, generator=g) + 1
    tau = 0.1 + 0.3 * torch.rand(heads, generator=g)
    return q.to(DEVICE, dtype).transpose(1, 2), k.to(DEVICE, dtype).transpose(1, 2), tau.to(DEVICE)


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both kinds of product of the CPU path, whatever this CPU has."""
    monkeypatch.setattr(fast, "_half_products", lambda: request.param)
    return bool(request.param)


def assert_bits(got: Tensor, q: Tensor, k: Tensor, tau: Tensor, near: float) -> None:
    """The reference's bits, except where the best estimate is within a factor ``near`` of the threshold."""
    low, high = (unpack(lowbit_tiles(q, k, tau * f, backend="reference")) for f in (near, 1 / near))
    assert not (low & ~unpack(got)).any()
    assert not (unpack(got) & ~high).any()


@pytest.mark.parametrize(("backend", "dtype"), KINDS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits(case: tuple[int, ...], backend: str, dtype: torch.dtype, monkeypatch) -> None:
    if backend == "gluon" and case[-1] <= 32:
        with pytest.raises(SparselandError, match=r"head size .* is not one of 33 to 128"):
            lowbit_tiles(*inputs(case, dtype), backend=backend)
        return
    monkeypatch.setattr(fast, "_half_products", lambda: False)
    q, k, tau = inputs(case, dtype)
    assert_bits(lowbit_tiles(q, k, tau, backend=backend), q, k, tau, 1.01 if backend in HALF else 1)


@pytest.mark.parametrize("backend", [b for b in FAST if b in HALF])
def test_numbers_that_float16_does_not_hold(backend: str) -> None:
    q, k, tau = inputs(CASES[0])
    # The logits are those of q and k, the factors are far apart.
    assert_bits(lowbit_tiles(q * 1e7, k * 1e-7, tau, backend=backend), q, k, tau, 1.01)
    assert_bits(lowbit_tiles(q * 1e-7, k * 1e7, tau, backend=backend), q, k, tau, 1.01)
    # Logits above 65504: what can't be compared is kept.
    q = q * 1e5
    got = unpack(lowbit_tiles(q, k, tau, backend=backend))
    assert not (unpack(lowbit_tiles(q, k, tau, backend="reference")) & ~got).any()


def test_the_cases_keep_some_and_leave_some() -> None:
    for case in CASES[:3]:
        q, k, tau = inputs(case)
        words = lowbit_tiles(q, k, tau, backend="reference")
        share = unpack(words).sum() / (judged(case[3], case[4], DEVICE).sum() * case[0] * case[1])
        assert 0.05 < share < 0.95, case


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU path's own way to multiply")
def test_bfloat16_products_differ_only_near_the_threshold(monkeypatch) -> None:
    monkeypatch.setattr(fast, "_half_products", lambda: True)
    q, k, tau = inputs(CASES[0])
    assert_bits(lowbit_tiles(q, k, tau), q, k, tau, 1.05)


def test_pieces_of_keys_give_the_same(monkeypatch, products: bool) -> None:
    q, k, tau = inputs(CASES[0])
    whole = lowbit_tiles(q, k, tau, backend="torch")
    monkeypatch.setattr(fast, "_CPU_BYTES", 1)
    monkeypatch.setattr(fast, "_GPU_BYTES", 1)
    monkeypatch.setattr(fast, "_BLOCKS", 3)
    assert torch.equal(lowbit_tiles(q, k, tau, backend="torch"), whole)


# ------------------------------------------------------------------ definition


def test_smoothing_changes_no_logit_but_by_a_row_constant() -> None:
    q, k, _ = inputs(CASES[0])
    k = k.repeat_interleave(3, 1)
    q_mean, k_mean = q.mean(2, keepdim=True), k.mean(2, keepdim=True)
    smooth = k - k_mean
    moved = (q - q_mean) @ smooth.mT + q_mean @ smooth.mT
    torch.testing.assert_close(moved, q @ k.mT - q @ k_mean.mT, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close((q @ smooth.mT).softmax(-1), (q @ k.mT).softmax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantize", [reference.quantize, fast.quantize])
def test_quantised_numbers_are_the_nearest_of_fifteen(quantize) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    x[7] = 0
    whole, scale = quantize(x)
    whole = whole.float()
    assert whole.abs().max() == 7
    assert torch.equal(whole, whole.round())
    assert ((x - whole * scale[:, None]).abs() <= scale[:, None] / 2 * 1.0001).all()
    assert scale[7] == 0
    assert not whole[7].any()


def exact_scores(q: Tensor, k: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Relative attention scores of all pairs, by definition (on the CPU)."""
    q, k = q.cpu(), k.cpu()
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = (q.double() @ k.double().mT) / math.sqrt(q.shape[3])
    position = torch.arange(n_queries) + n_keys - n_queries
    key = torch.arange(n_keys)
    count = judged(n_queries, n_keys).repeat_interleave(64)[:n_queries, None]
    area = ((key < 32) | (key >= 32 * (1 + count))) & (key <= position[:, None])
    scores = (logits - logits.masked_fill(~area, -torch.inf).logsumexp(-1, keepdim=True)).exp()
    return scores.masked_fill(key > position[:, None], 0)


def test_exact_estimates_keep_the_tiles_of_large_relative_scores(monkeypatch) -> None:
    """With numbers that 4 bits hold exactly, the bits are those of brute force."""
    monkeypatch.setattr(fast, "_half_products", lambda: False)
    g = torch.Generator().manual_seed(2)
    n, d = 448, 16
    # Whole numbers from -7 to 7 in pairs of opposite tokens: the means are 0, every token holds a 7.
    x = torch.randint(-7, 8, (2, n // 2, d), generator=g).float()
    x[..., 0] = 7
    q, k = (torch.stack((t, -t), 1).reshape(1, 1, n, d)[:, :, torch.randperm(n, generator=g)] for t in x)
    q = q / 12
    words = lowbit_tiles(q, k, torch.tensor([0.3]), backend="cpu")
    scores = exact_scores(q, k, n, n)[0, 0]
    for block in range(n // 64):
        for t in range(1, 1 + n_judged(block, n, n)):
            tile = scores[block * 64 : block * 64 + 64, t * 32 : t * 32 + 32]
            assert bool(unpack(words)[0, 0, block, t - 1]) == bool(tile.max() > 0.3)
    assert 0.1 < unpack(words).sum() / judged(n, n).sum() < 0.9


def test_relative_scores_are_never_below_attention_weights() -> None:
    for case in CASES[:3]:
        q, k = (t.cpu() for t in inputs(case)[:2])
        logits = q @ k.repeat_interleave(case[1] // case[2], 1).mT / math.sqrt(case[5])
        causal = torch.ones(case[3], case[4], dtype=torch.bool).tril(case[4] - case[3])
        weights = logits.double().masked_fill(~causal, -torch.inf).softmax(-1)
        assert (exact_scores(q, k, case[3], case[4]) >= weights * (1 - 1e-5)).all()


# -------------------------------------------------------------------- geometry


@pytest.mark.parametrize(("n_queries", "n_keys"), [(1000, 1000), (130, 500), (1, 77), (64, 64)])
def test_areas(n_queries: int, n_keys: int) -> None:
    counts = judged(n_queries, n_keys)
    offset = n_keys - n_queries
    for block in range(cdiv(n_queries, 64)):
        count = n_judged(block, n_queries, n_keys)
        assert counts[block] == count
        assert count % 4 == 0  # whole segments of 128 keys
        local = cdiv(offset + (block + 1) * 64, 32) - 1 - count
        assert count == 0 or 4 <= local <= 7
        assert 32 * (1 + count) <= offset + block * 64 or count == 0  # judged keys are before all queries


def test_bits_and_words() -> None:
    marks = torch.rand(3, 2, 77, generator=torch.Generator().manual_seed(0)) < 0.5
    words = pack(marks)
    assert words.dtype == torch.int32
    assert words.shape == (3, 2, 3)
    assert torch.equal(unpack(words)[..., :77], marks)
    assert not unpack(words)[..., 77:].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists(case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, tau = inputs(case)
    n_queries, n_keys = case[3], case[4]
    words = lowbit_tiles(q, k, tau)
    got = tile_blocks(words, n_queries, n_keys)
    counts, indices = tile_lists(words, n_queries, n_keys)
    written = BlockPattern(n_queries, n_keys, 64, counts, indices)
    tiles = kept_tiles(words, n_queries, n_keys)
    for pattern in (got, written):
        mask = pattern.block_mask()
        for block in range(mask.shape[-1]):
            assert torch.equal(mask[..., block], tiles[..., 2 * block : 2 * block + 2].any(-1))
    rows = zip(indices.flatten(0, 2).tolist(), counts.flatten().tolist(), strict=True)
    assert all(row[:n] == sorted(set(row[:n])) for row, n in rows)
    # In stretches, as where memory is short.
    monkeypatch.setattr(patterns.parts, "_LIST_BYTES", 1)
    assert torch.equal(tile_blocks(words, n_queries, n_keys).mask(), got.mask())


def test_tau_at_its_ends() -> None:
    q, k, _ = inputs(CASES[0])
    n = CASES[0][4]
    for backend in FAST:
        every = lowbit_tiles(q, k, torch.zeros(3, device=DEVICE), backend=backend)
        assert (tile_blocks(every, n, n).density() == 1).all()
        none = lowbit_tiles(q, k, torch.full((3,), torch.inf, device=DEVICE), backend=backend)
        assert not none.any()
        mixed = lowbit_tiles(q, k, torch.tensor([0.0, torch.inf, 0.2], device=DEVICE), backend=backend)
        assert torch.equal(mixed[:, 0], every[:, 0])
        assert torch.equal(mixed[:, 1], none[:, 1])


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["q", "k"])
def test_bad_numbers_make_their_head_dense(backend: str, bad: float, where: str) -> None:
    q, k, tau = inputs((1, 4, 2, 64, 320, 48))
    clean = lowbit_tiles(q, k, tau, backend=backend)
    (q if where == "q" else k)[0, 1, 30, 2] = bad
    got = lowbit_tiles(q, k, tau, backend=backend)
    dense = [1] if where == "q" else [2, 3]  # the mean carries it over the whole head
    for head in range(4):
        if head in dense:
            assert kept_tiles(got, 64, 320)[0, head].all()
        else:
            assert torch.equal(got[0, head], clean[0, head])


@pytest.mark.parametrize("backend", FAST)
def test_tokens_of_zeros(backend: str) -> None:
    q, k, tau = inputs((1, 4, 2, 64, 320, 48))
    words = lowbit_tiles(torch.zeros_like(q), torch.zeros_like(k), tau, backend=backend)
    assert not words.any()  # all logits alike: no key is worth 1/10 of an area of 100 and more
    few, nothing = torch.full_like(tau, 1e-4), torch.zeros_like(q)
    assert_bits(lowbit_tiles(nothing, k, few, backend=backend), nothing, k, few, 1.01)


@pytest.mark.parametrize("backend", FAST)
def test_same_input_same_bits_and_views(backend: str) -> None:
    q, k, tau = inputs(CASES[1])
    wide = torch.randn(*q.shape[:3], 2 * q.shape[3], device=DEVICE)
    wide[..., ::2] = q
    first, second = lowbit_tiles(q, k, tau, backend=backend), lowbit_tiles(q, k, tau, backend=backend)
    assert torch.equal(first, second)
    assert torch.equal(lowbit_tiles(wide[..., ::2], k, tau, backend=backend), first)


@pytest.mark.parametrize("backend", FAST)
def test_opcheck(backend: str) -> None:
    q, k, tau = inputs((1, 2, 1, 80, 264, 48))
    torch.library.opcheck(torch.ops.sparseland.lowbit_tiles.default, (q, k, tau, 0.25, backend))
    words = lowbit_tiles(q, k, tau)
    # What lies behind the counts is not defined, so a comparison of two runs is left to the tests above.
    torch.library.opcheck(
        torch.ops.sparseland.lowbit_tile_lists.default,
        (words, 80, 264),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_clear_errors() -> None:
    q, k, tau = inputs(CASES[0])
    with pytest.raises(SparselandError, match=r"tau must be \[3\] float32 .* got \[2\]"):
        lowbit_tiles(q, k, tau[:2])
    with pytest.raises(SparselandError, match="scale must be > 0, got 0"):
        lowbit_tiles(q, k, tau, scale=0.0)
    with pytest.raises(SparselandError, match="no backend 'fa4'"):
        lowbit_tiles(q, k, tau, backend="fa4")


@pytest.mark.parametrize("number", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("tile", sorted({t for tiles in kernels.TILES.values() for t in tiles}), ids=str)
def test_tiles_and_numbers_give_the_same_bits(
    tile: tuple[int, ...], number: torch.dtype, monkeypatch
) -> None:
    if number.is_floating_point and kernels._number(torch.device(DEVICE)) != number:
        pytest.skip("a card without float8")
    q, k, tau = inputs((1, 2, 1, 300, 330, 32))
    monkeypatch.setattr(kernels, "_tile_sizes", lambda _: tile)
    monkeypatch.setattr(kernels, "_number", lambda _: number)
    got = lowbit_tiles(q, k, tau, backend="triton")
    assert_bits(got, q, k, tau, 1.01)
    assert 0 < unpack(got).sum() < 2 * judged(300, 330, DEVICE).sum()
