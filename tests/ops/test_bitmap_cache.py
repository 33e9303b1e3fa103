"""Compressed caches: the format bit by bit, round trips, and attention on them against dense pruned rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.ops.bitmap_cache import Bitmap, bitmap_decode, compress, cpu, decompress

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
ALL = ["reference", *FAST]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Triton's interpreter multiplies bfloat16 wrongly, so that pair is left to GPUs.
HALF = [
    (backend, dtype)
    for backend in ALL
    for dtype in (torch.bfloat16, torch.float16)
    if (backend, dtype, DEVICE) != ("triton", torch.bfloat16, "cpu")
]
# (maximum, relative RMS) by dtype; bfloat16 carries 8 bits.
TOLERANCE = {torch.float32: (2e-5, 2e-6), torch.bfloat16: (2e-2, 5e-3), torch.float16: (3e-3, 7e-4)}
# batch, query heads, key heads, tokens, D, kept of K, kept of V
CASES = [
    (2, 3, 3, 70, 64, 20, 32),  # no groups, more than one tile
    (2, 6, 2, 41, 80, 30, 80),  # groups of 3; V whole
    (1, 8, 2, 100, 128, 38, 64),  # groups of 4
    (1, 4, 1, 33, 96, 1, 5),
    (1, 2, 1, 9, 256, 77, 128),
    (2, 3, 1, 1, 8, 4, 3),  # one token, the smallest head
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """New memory is full of NaN, so that reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def prune(x: Tensor, kept: int) -> Tensor:
    """Row by row in Python: the ``kept`` largest magnitudes, ties to the lowest channel, NaN above all."""
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    for source, target in zip(x.flatten(0, -2), out.flatten(0, -2), strict=True):
        size = [torch.inf if v != v else (abs(v) if abs(v) != torch.inf else 1e39) for v in source.tolist()]
        for c in sorted(range(len(size)), key=lambda c: (-size[c], c))[:kept]:
            target[c] = source[c]
    return out


def bits_set(c: Bitmap) -> list[list[int]]:
    """The channels of each row, word by word and bit by bit."""
    words = c.bitmap.flatten(0, -2).tolist()
    return [[64 * w + b for w, word in enumerate(row) for b in range(64) if word >> b & 1] for row in words]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7e4), b.nan_to_num(7e4))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax over all keys with repeated heads, in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if first is not None:
        hidden = torch.arange(k.shape[2], device=q.device) < first[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def assert_close(name: str, got: Tensor, want: Tensor, dtype: torch.dtype = torch.float32) -> None:
    largest, rms = TOLERANCE[dtype]
    hidden = want == -torch.inf
    assert torch.equal(got == -torch.inf, hidden), f"{name}: -inf in other places"
    error = (got.double() - want.double()).masked_fill(hidden, 0.0)
    size = want.double().masked_fill(hidden, 0.0)
    assert error.abs().max() <= largest * max(1.0, size.abs().max()), f"{name}: {error.abs().max()}"
    assert error.norm() <= rms * size.norm(), f"{name}: {error.norm() / size.norm()}"


def test_the_format() -> None:
    """Written out for one row: which bits, which values, in which order."""
    x = torch.zeros(1, 1, 1, 80, device=DEVICE)
    x[..., 0], x[..., 5], x[..., 63], x[..., 64], x[..., 79] = -4.0, 1.0, 2.0, -0.5, 3.0
    for backend in ALL:
        c = compress(x, 4, backend=backend)
        assert bits_set(c) == [[0, 5, 63, 79]]
        assert c.values.flatten().tolist() == [-4.0, 1.0, 2.0, 3.0]
        assert c.bitmap.flatten().tolist() == [1 + 2**5 - 2**63, 2**15]


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 24, 64, 80, 96, 128, 256])
def test_round_trip(dim: int, dtype: torch.dtype, backend: str, poisoned: None) -> None:
    x = rows(1, 2, 5, dim, dtype=dtype).mul(4).round()  # many ties
    x[0, 0, 1] = 0
    x[0, 1, 2, dim // 2], x[0, 0, 3, dim - 1] = torch.nan, -torch.inf
    for kept in (1, dim // 3, dim):
        c = compress(x, kept, backend=backend)
        assert c.bitmap.shape == (1, 2, 5, -(-dim // 64))
        assert all(len(channels) == kept for channels in bits_set(c))
        assert same(decompress(c, backend=backend), prune(x, kept))
    assert same(decompress(c, backend=backend), x)


elements = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1.5, -2.0, 1e-6, 6e4, float("inf"), float("-inf"), float("nan")]
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([8, 64, 72, 136]), st.sampled_from(DTYPES))
def test_any_row(data: st.DataObject, dim: int, dtype: torch.dtype) -> None:
    """Zeros of both signs, ties, infinities and NaN: exactly ``kept`` survive, and the right ones."""
    n = data.draw(st.integers(1, 3))
    x = torch.tensor(data.draw(st.lists(elements, min_size=n * dim, max_size=n * dim)))
    x = x.view(1, 1, n, dim).to(DEVICE, dtype)
    kept = data.draw(st.integers(1, dim))
    want = prune(x, kept)
    for backend in ["reference", "cpu"] if DEVICE == "cpu" else ["reference"]:
        c = compress(x, kept, backend=backend)
        assert all(len(channels) == kept for channels in bits_set(c))
        assert same(decompress(c, backend=backend), want)
        assert same(c.values.flatten(), torch.cat([x[0, 0, r, ch] for r, ch in enumerate(bits_set(c))]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([8, 64, 80, 128, 256]), st.integers(1, 20), st.booleans())
def test_backends_write_the_same_bits(seed: int, dim: int, n: int, coarse: bool) -> None:
    x = rows(1, 2, n, dim, seed=seed)
    x = x.round() if coarse else x
    kept = seed % dim + 1
    a, b = (compress(x, kept, backend=backend) for backend in ("reference", FAST[0]))
    assert torch.equal(a.bitmap, b.bitmap)
    assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("backend", ALL)
def test_chunks_and_views(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, and inputs that are views into larger storage, tokens before heads."""
    monkeypatch.setattr(cpu, "CHUNK", 7 * 2 * 64)
    x = rows(1, 40, 2, 64).transpose(1, 2)[:, :, 3:36]
    c = compress(x, 20, backend=backend)
    assert same(decompress(c, backend=backend), prune(x, 20))
    assert same(decompress(c.slice(5, 31), backend=backend), prune(x, 20)[:, :, 5:31])


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_on_compressed_rows(
    case: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    batch, heads, kv_heads, n, dim, kept_k, kept_v = case
    monkeypatch.setattr(cpu, "CHUNK", 23 * batch * kv_heads * dim)
    q, k, v = (
        rows(batch, heads, 1, dim),
        rows(batch, kv_heads, n, dim, seed=1),
        rows(batch, kv_heads, n, dim, seed=2),
    )
    kc, vc = compress(k, kept_k), compress(v, kept_v)
    out, lse = bitmap_decode(q, kc, vc, scale=0.4, return_lse=True, backend=backend)
    want, want_lse = attend(q, prune(k, kept_k), prune(v, kept_v), 0.4)
    assert_close("out", out, want)
    assert_close("lse", lse, want_lse)
    if n > 1:
        assert (want - attend(q, k, v, 0.4)[0]).abs().max() > 1e-3  # pruning is felt


@pytest.mark.parametrize(("backend", "dtype"), HALF, ids=str)
def test_half_precision(backend: str, dtype: torch.dtype) -> None:
    q, k, v = rows(2, 6, 1, 80, dtype=dtype), *rows(2, 2, 2, 41, 80, dtype=dtype, seed=1)
    out, lse = bitmap_decode(q, compress(k, 30), compress(v, 20), return_lse=True, backend=backend)
    want, want_lse = attend(q, prune(k, 30), prune(v, 20), 80**-0.5)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert_close("out", out, want, dtype)
    assert_close("lse", lse, want_lse, dtype)


@pytest.mark.parametrize("backend", ALL)
def test_first_key(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding at the front of rows is not read; a row that is nothing but padding gives 0 and -inf."""
    monkeypatch.setattr(cpu, "CHUNK", 30 * 3 * 64)
    q, k, v = rows(3, 2, 1, 64), *rows(2, 3, 1, 150, 64, seed=1)
    first = torch.tensor([0, 131, 150], device=DEVICE)
    want, want_lse = attend(q, prune(k, 30), prune(v, 30), 0.125, first)
    k[1, :, :131] = 1e4
    out, lse = bitmap_decode(
        q, compress(k, 30), compress(v, 30), first_key=first, return_lse=True, backend=backend
    )
    assert_close("out", out, want)
    assert_close("lse", lse, want_lse)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_views_of_growing_storage(backend: str) -> None:
    q, k, v = rows(2, 4, 1, 64), *rows(2, 2, 2, 50, 64, seed=1)
    kc, vc = (compress(x, 21).slice(6, 43) for x in (k, v))
    assert not kc.values.is_contiguous()
    got = bitmap_decode(q, kc, vc, backend=backend)
    assert_close("out", got, attend(q, prune(k, 21)[:, :, 6:43], prune(v, 21)[:, :, 6:43], 0.125)[0])
    assert torch.equal(got, bitmap_decode(q, kc, vc, backend=backend))


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens(backend: str) -> None:
    empty = compress(rows(2, 1, 0, 64), 9, backend=backend)
    assert decompress(empty, backend=backend).shape == (2, 1, 0, 64)
    out, lse = bitmap_decode(rows(2, 3, 1, 64), empty, empty, return_lse=True, backend=backend)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_parts_of_a_cache() -> None:
    x = rows(2, 3, 20, 80)
    c = compress(x, 33)
    want = decompress(c)
    index = torch.randint(0, 20, (2, 3, 7), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert same(decompress(c.gather(index)), want.gather(2, index[..., None].expand(-1, -1, -1, 80)))
    index[0, 1, 2] = -1
    assert len(c.gather(index)) == 7
    joined = Bitmap.cat([c.slice(0, 11), c.slice(11, 20)])
    assert same(decompress(joined), want)
    assert (len(joined), joined.kept) == (20, 33)


def test_bytes() -> None:
    c = compress(rows(2, 3, 20, 128, dtype=torch.bfloat16), 38)
    assert c.nbytes() == 2 * 3 * 20 * (2 * 8 + 38 * 2)
    assert c.slice(0, 5).nbytes() == 2 * 3 * 5 * (2 * 8 + 38 * 2)


@pytest.mark.parametrize("backend", ["", *ALL])
def test_library_registration(backend: str) -> None:
    x = rows(2, 1, 5, 24)
    c = compress(x, 10)
    ops = torch.ops.sparseland
    torch.library.opcheck(ops.bitmap_compress, (x, 10, backend))
    torch.library.opcheck(ops.bitmap_decompress, (c.bitmap, c.values, 24, backend))
    stored = (c.bitmap, c.values, c.bitmap, c.values)
    for first in (None, torch.tensor([0, 3], device=DEVICE)):
        torch.library.opcheck(ops.bitmap_decode, (rows(2, 2, 1, 24), *stored, first, 0.1, backend))


def test_compiles() -> None:
    q, k, v = rows(1, 4, 1, 64), *rows(2, 1, 2, 30, 64, seed=1)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kc, vc = compress(k * 2, 20), compress(v, 30)
        return bitmap_decode(q, kc, vc.slice(0, 30)) + decompress(vc).sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close("out", compiled(q, k, v), layer(q, k, v))


def test_mistakes_are_named() -> None:
    x = rows(1, 2, 9, 64)
    c = compress(x, 20)
    with pytest.raises(SparselandError, match="between 1 and the head size 64, got 65"):
        compress(x, 65)
    with pytest.raises(SparselandError, match="between 1 and the head size 64, got 0"):
        compress(x, 0)
    with pytest.raises(SparselandError, match="multiple of 8 up to 256, got 12"):
        compress(x[..., :12], 3)
    with pytest.raises(SparselandError, match=r"got torch\.float64"):
        compress(x.double(), 3)
    with pytest.raises(SparselandError, match=r"q must be \[1, a multiple of 2, 1, D\], got \[1, 3, 1, 64\]"):
        bitmap_decode(rows(1, 3, 1, 64), c, c)
    with pytest.raises(SparselandError, match="same tokens"):
        bitmap_decode(rows(1, 2, 1, 64), c, c.slice(0, 3))
    with pytest.raises(SparselandError, match="head sizes differ: q 32, keys 64, values 64"):
        bitmap_decode(rows(1, 2, 1, 32), c, c)
    with pytest.raises(SparselandError, match="first_key must be 1 integers"):
        bitmap_decode(rows(1, 2, 1, 64), c, c, first_key=torch.zeros(3, dtype=torch.long, device=DEVICE))
    with pytest.raises(SparselandError, match="keep the same number of channels, got 20 of 64, 3 of 64"):
        Bitmap.cat([c, compress(x, 3)])
    with pytest.raises(SparselandError, match=r"index must be \[1, 2, n\]"):
        c.gather(torch.zeros(1, 4, 3, dtype=torch.long, device=DEVICE))
