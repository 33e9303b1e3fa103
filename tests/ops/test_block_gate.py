"""Pooling before RoPE and lists of blocks: against loops over the definitions, on every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops import block_gate
from sparseland.ops.block_gate import select_blocks, unrotated_pool
from sparseland.ops.rotary import turn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["triton", "torch"]
# batch, heads, tokens, D, rotary channels, block size
POOLS = [
    (1, 2, 96, 16, 16, 32),
    (2, 3, 70, 24, 12, 16),  # partial rotary, a last block of 6, sizes that are no power of two
    (1, 1, 5, 64, 64, 64),
    (1, 2, 64, 16, 0, 16),  # no positions
]


def tables(n: int, channels: int, factor: float = 1.0) -> tuple[Tensor, Tensor] | None:
    if channels == 0:
        return None
    speed = 10_000 ** -torch.linspace(0, 1, channels // 2 + 1)[:-1]
    angle = (torch.arange(n)[:, None] * speed).to(DEVICE)
    return factor * angle.cos(), factor * angle.sin()


def pooled_by_loops(x: Tensor, size: int) -> Tensor:
    parts = [x[:, :, a : a + size] for a in range(0, x.shape[2], size)]
    return torch.stack([torch.cat((p.amax(2), p.amin(2), p.mean(2)), -1) for p in parts], 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_pool(case: tuple[int, ...], factor: float, backend: str) -> None:
    batch, heads, n, dim, channels, size = case
    g = torch.Generator().manual_seed(n)
    before = torch.randn(batch, n, heads, dim, generator=g).to(DEVICE).transpose(1, 2)
    angles = tables(n, channels, factor)
    after = before if angles is None else turn(before, *angles)
    want = pooled_by_loops(before, size)
    got = unrotated_pool(after, size, angles, extremes=True, backend=backend)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    mean = unrotated_pool(after, size, angles, extremes=False, backend=backend)
    torch.testing.assert_close(mean, want[..., 2 * dim :], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pool_in_half_precision_is_the_same_on_both(dtype: torch.dtype) -> None:
    x = torch.randn(1, 2, 80, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    angles = tuple(t.to(dtype) for t in tables(80, 32))
    a, b = (unrotated_pool(x, 32, angles, extremes=True, backend=name) for name in BACKENDS)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_pool_of_tokens_in_the_middle_of_a_table() -> None:
    """A later chunk's queries: tables are a slice, with strides of the whole."""
    x = torch.randn(1, 2, 64, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    cos, sin = tables(200, 16)
    after = turn(x, cos[100:164], sin[100:164])
    for backend in BACKENDS:
        got = unrotated_pool(after, 16, (cos[100:164], sin[100:164]), extremes=True, backend=backend)
        torch.testing.assert_close(got, pooled_by_loops(x, 16), rtol=1e-4, atol=1e-5)


# batch, heads, queries, keys, block size
ROWS = [
    (1, 2, 112, 112, 16),
    (2, 1, 40, 150, 16),
    (1, 2, 40, 40, 64),
    (1, 1, 7, 130, 32),
]


def vectors(case: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    batch, heads, n_queries, n_keys, size = case
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, -(-n_queries // size), 8, generator=g)
    k = torch.randn(batch, heads, -(-n_keys // size), 8, generator=g)
    return q.to(DEVICE), k.to(DEVICE)


def kept_by_loops(
    q: Tensor,
    k: Tensor,
    case: tuple[int, ...],
    scale: float,
    threshold: float | None,
    top: int | None,
    dense: int,
) -> set[tuple[int, int, int, int]]:
    _, _, n_queries, n_keys, size = case
    found = set()
    scores = (q @ k.mT * scale).cpu()
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        start = i * size + n_keys - n_queries
        last = min(start + size, n_keys) - 1
        seen = list(range(last // size + 1))
        own = [j for j in seen if j >= start // size]
        row = scores[b, h, i, : len(seen)]
        if top is not None:
            others = sorted((j for j in seen if j not in own), key=lambda j: -float(row[j]))
            chosen = own + others[: max(0, top - len(own))]
        else:
            p = row.softmax(-1)
            chosen = own + [j for j in seen if p[j] > threshold]
        if i >= q.shape[2] - dense:
            chosen = seen
        found |= {(b, h, i, j) for j in chosen}
    return found


def as_set(pattern) -> set[tuple[int, int, int, int]]:
    return {tuple(x) for x in pattern.block_mask().nonzero().tolist()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("threshold", "top"), [(0.1, None), (0.9, None), (None, 1), (None, 3), (None, 99)])
@pytest.mark.parametrize("dense", [0, 2])
@pytest.mark.parametrize("case", ROWS, ids=str)
def test_lists(case: tuple[int, ...], dense: int, threshold: float, top: int, backend: str) -> None:
    q, k = vectors(case)
    pattern = select_blocks(
        q, k, *case[2:], scale=0.7, threshold=threshold, top=top, dense_rows=dense, backend=backend
    )
    assert as_set(pattern) == kept_by_loops(q, k, case, 0.7, threshold, top, dense)
    listed = torch.arange(pattern.indices.shape[-1], device=DEVICE) < pattern.counts[..., None]
    steps = pattern.indices.diff(dim=-1) > 0
    assert (steps | ~listed[..., 1:]).all()  # ascending and distinct
    assert pattern.counts.min() >= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_earlier(backend: str) -> None:
    q, k = torch.zeros(1, 1, 8, 4, device=DEVICE), torch.zeros(1, 1, 8, 4, device=DEVICE)
    k[0, 0, 2] = -0.0  # equal to 0
    pattern = select_blocks(q, k, 128, 128, 16, scale=1.0, top=3, backend=backend)
    mask = pattern.block_mask()[0, 0]
    assert mask[7].nonzero().flatten().tolist() == [0, 1, 7]
    assert mask[1].nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("rule", [{"threshold": 0.15}, {"top": 2}])
def test_what_a_gate_cannot_judge_is_read(rule: dict[str, float], bad: float, backend: str) -> None:
    q, k = vectors((1, 1, 128, 128, 16))
    k[0, 0, 3] = bad
    mask = select_blocks(q, k, 128, 128, 16, scale=1.0, **rule, backend=backend).block_mask()[0, 0]
    assert mask[3:, 3].all()
    assert not mask[:3, 3].any()
    clean = select_blocks(*vectors((1, 1, 128, 128, 16)), 128, 128, 16, scale=1.0, **rule, backend=backend)
    assert torch.equal(mask[:3], clean.block_mask()[0, 0, :3])
    # A bad query block reads everything (top: as many as it may), and no other row is touched.
    q, k = vectors((1, 1, 128, 128, 16))
    q[0, 0, 5] = float("nan")
    mask = select_blocks(q, k, 128, 128, 16, scale=1.0, **rule, backend=backend).block_mask()[0, 0]
    assert mask[5].sum() == (6 if "threshold" in rule else 2)
    assert torch.equal(mask[6:], clean.block_mask()[0, 0, 6:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_pieces_are_the_whole(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = vectors(ROWS[1])
    options = {"scale": 0.7, "threshold": 0.1, "dense_rows": 2, "backend": backend}
    whole = as_set(select_blocks(q, k, *ROWS[1][2:], **options))
    monkeypatch.setattr(block_gate, "_CHUNK", 1)
    assert as_set(select_blocks(q, k, *ROWS[1][2:], **options)) == whole


def test_lists_are_as_short_as_can_be_known() -> None:
    q, k = vectors((1, 2, 1024, 1024, 16))
    assert select_blocks(q, k, 1024, 1024, 16, scale=1.0, top=5).indices.shape[-1] == 5
    assert select_blocks(q, k, 1024, 1024, 16, scale=1.0, threshold=0.1).indices.shape[-1] == 12
    assert select_blocks(q, k, 1024, 1024, 16, scale=1.0, top=5, dense_rows=1).indices.shape[-1] == 64


@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_under_autocast(backend: str) -> None:
    q, k = vectors(ROWS[0])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        half = select_blocks(q.bfloat16(), k.bfloat16(), 112, 112, 16, scale=1.0, top=3, backend=backend)
    full = select_blocks(q.bfloat16().float(), k.bfloat16().float(), 112, 112, 16, scale=1.0, top=3)
    assert (half.block_mask() != full.block_mask()).float().mean() < 0.1
    assert torch.equal(half.counts, full.counts)


def test_opcheck() -> None:
    x = torch.randn(1, 2, 40, 16, device=DEVICE)
    torch.library.opcheck(torch.ops.sparseland.unrotated_pool.default, (x, *tables(40, 16), 16, True, ""))
    q, k = vectors(ROWS[0])
    # Lists end in memory that nobody wrote: only a rule that fills them can be compared.
    args = (q, k, 112, 112, 16, 0.7, 0.0, 99, 0, "")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.sparseland.select_blocks.default, args, test_utils=tests)


def test_clear_errors() -> None:
    q, k = vectors(ROWS[0])
    with pytest.raises(SparselandError, match="give threshold or top"):
        select_blocks(q, k, 112, 112, 16, scale=1.0)
    with pytest.raises(SparselandError, match=r"must be \[B, H, 7, C\]"):
        select_blocks(q[:, :, 1:], k, 112, 112, 16, scale=1.0, top=3)
    with pytest.raises(SparselandError, match="top=0"):
        select_blocks(q, k, 112, 112, 16, scale=1.0, top=0)
    x = torch.zeros(1, 1, 20, 8, device=DEVICE)
    with pytest.raises(SparselandError, match=r"tables must be \[20, R / 2\] with R <= 8"):
        unrotated_pool(x, 4, tables(20, 10), extremes=True)
    with pytest.raises(SparselandError, match="block_size=0"):
        unrotated_pool(x, 0, None, extremes=True)
    with pytest.raises(SparselandError, match="block size 16, 32, 64 or 128, got 4"):
        unrotated_pool(x, 4, None, extremes=True, backend="triton")
