"""One decoding step over chosen or compressed parts of a cache, against all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from sparseland.bench.inputs import DTYPES, captured, cast, labels
from sparseland.bench.rivals import dense_step
from sparseland.bench.timing import Benchmark, Case
from sparseland.method import AttentionInputs
from sparseland.ops.bitmap_cache import bitmap_decode, compress
from sparseland.ops.channel_labels import label_scores, new_labels, write_labels
from sparseland.ops.gather_decode import gather_decode


def _steps(
    case: Callable[[AttentionInputs, float], Case],
    shares: tuple[float, ...],
    length: int | None,
    density: float | None,
) -> Sequence[Callable[[], Case]]:
    x = captured(length)[0]
    x = replace(x, q=x.q[:, :, -1:].contiguous())
    chosen = shares if density is None else (density,)
    return [partial(case, cast(x, dtype), share) for dtype in DTYPES for share in chosen]


def _gather(x: AttentionInputs, share: float) -> Case:
    scores = _products(x.q, x.k).view(1, -1, x.group, x.k.shape[2]).sum(2)
    tokens = max(1, round(x.k.shape[2] * share))
    index = scores.topk(tokens, dim=-1).indices.sort(-1).values
    ours = partial(gather_decode, x.q, x.k, x.v, index, scale=x.scale)
    return Case({**labels(x), "tokens": tokens}, ours, dense_step(x), tokens / x.k.shape[2])


def _bitmap(x: AttentionInputs, share: float) -> Case:
    kept = max(1, round(x.q.shape[3] * share))
    keys, values = compress(x.k, kept), compress(x.v, kept)
    stored = sum(t.nbytes for c in (keys, values) for t in (c.bitmap, c.values))
    ours = partial(bitmap_decode, x.q, keys, values, scale=x.scale)
    return Case({**labels(x), "kept": kept}, ours, dense_step(x), stored / (x.k.nbytes + x.v.nbytes))


def _labels(x: AttentionInputs, share: float) -> Case:
    """Guessed products with all keys, against the true ones."""
    bits, count = 4, max(1, round(x.k.shape[3] * share))
    channels = x.k.abs().mean((0, 2)).topk(count).indices
    rows, ranges = new_labels(x.k, channels, bits, x.k.shape[2])
    write_labels(x.k, channels, bits, rows, ranges, 0)
    return Case(
        {**labels(x), "channels": count, "bits": bits},
        partial(label_scores, x.q, channels, bits, rows, ranges),
        {"products": partial(_products, x.q, x.k)},
        sum(t.nbytes for t in (rows, ranges) if t is not None) / x.k.nbytes,
    )


def _products(q: Tensor, k: Tensor) -> Tensor:
    """``[B, Hq, N]``: one query with all keys, the heads of a group together."""
    batch, heads, _, dim = k.shape
    products: Tensor = q.view(batch, heads, -1, dim) @ k.mT
    return products.flatten(1, 2)


BENCHMARKS = {
    "gather_decode": Benchmark(partial(_steps, _gather, (1 / 16, 1 / 8, 1 / 4))),
    "bitmap_cache": Benchmark(partial(_steps, _bitmap, (0.3, 0.5))),
    "channel_labels": Benchmark(partial(_steps, _labels, (1 / 8, 1 / 4))),
}
