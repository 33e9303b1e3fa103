"""Decoding ops on a GPU: correctness, then times against the dense rivals and the bytes that must be read.

    PYTHONPATH=src python benchmarks/gpu_decode.py --out FILE.json [--sweep] [--only labels,gemv]

Times are medians over replays of a CUDA graph, divided by the calls in it. Each call of a graph has other
data (index lists, caches or weights), together several times the L2 cache, so that no call finds what
the one before it left there. *Ideal* is the bytes that a call must read over the bandwidth of a large copy
(read and written bytes) measured in the same run. Shapes are Llama-3-8B's: 32 query and 8 key heads of
128, bf16. Data are Gaussian and selections random, which is the worst case for gathering.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseland.machine import machine, now, versions
from sparseland.ops.bitmap_cache import bitmap_decode, compress, decompress
from sparseland.ops.bitmap_cache import triton as bitmap_triton
from sparseland.ops.channel_labels import label_scores, new_labels, row_width, write_labels
from sparseland.ops.gather_decode import gather_decode
from sparseland.ops.gather_decode import triton as gather_triton
from sparseland.ops.sparse_gemv import sparse_gemv
from sparseland.ops.sparse_gemv import triton as gemv_triton
from sparseland.ops.top_values import top_indices

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
BEYOND_L2 = 200e6  # bytes that the calls of one graph read in all, at least
Row = dict[str, Any]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def median_ms(run: Callable[[], object], repeats: int = 15) -> float:
    """Median time of a call, warm."""
    run()
    run()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in pairs)
    return times[len(times) // 2]


def graph_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Median time per call, all calls in one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()  # compiles, and fills the allocator
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return median_ms(graph.replay) / len(calls)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of copying 2 GB."""
    source = torch.empty(1 << 30, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / (median_ms(lambda: target.copy_(source)) * 1e-3)


def poison() -> None:
    """Fresh memory holds NaN, so that what a kernel forgets to write shows."""
    junk = torch.full((1 << 28,), math.nan, device="cuda")
    del junk


def error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((got.double() - want.double()).norm() / want.double().norm())


# ------------------------------------------------------------------------------------------ correctness


def check() -> list[Row]:
    """Our kernels in bf16 against the references in float32 on the same bf16 inputs."""
    rows = []

    def note(op: str, case: str, got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
        errors = [error(g, w) for g, w in zip(got, want, strict=True)]
        rows.append({"op": op, "case": case, "errors": errors, "ok": all(e < 1e-2 for e in errors)})

    for batch, heads, kv_heads, n, dim, lists, listed, page in (
        (2, 32, 8, 5000, 128, 8, 700, 1), (2, 32, 8, 5000, 128, 32, 700, 1), (1, 9, 3, 3001, 64, 3, 900, 1),
        (1, 12, 4, 2000, 80, 12, 333, 1), (1, 4, 1, 4003, 256, 1, 120, 16), (3, 8, 8, 999, 96, 8, 999, 1),
    ):  # fmt: skip
        q, k, v = randn(batch, heads, 1, dim), randn(batch, kv_heads, n, dim), randn(batch, kv_heads, n, dim)
        pages = -(-n // page)
        index = torch.rand(batch, lists, pages, device="cuda").argsort(-1)[..., :listed]
        index[:, :, ::7] = -1
        exact = gather_decode(
            q.float(), k.float(), v.float(), index, return_lse=True, page_size=page, backend="reference"
        )
        poison()
        got = gather_decode(q, k, v, index, return_lse=True, page_size=page, backend="triton")
        note("gather_decode", f"{batch=} {heads=} {kv_heads=} {n=} {dim=} {lists=} {page=}", got, exact)
    for dim, kept in ((64, 20), (80, 40), (96, 33), (128, 38), (128, 64), (256, 77)):
        q, k, v = randn(2, 8, 1, dim), randn(2, 2, 1777, dim), randn(2, 2, 1777, dim)
        poison()
        kc, vc = compress(k, kept, backend="triton"), compress(v, kept, backend="triton")
        want = compress(k, kept, backend="reference")
        same = torch.equal(kc.bitmap, want.bitmap) and torch.equal(kc.values, want.values)
        same &= torch.equal(decompress(kc, backend="triton"), decompress(want, backend="reference"))
        rows.append({"op": "compress", "case": f"{dim=} {kept=}", "errors": [], "ok": same})
        first = torch.tensor([0, 500], device="cuda")
        got = bitmap_decode(q, kc, vc, first_key=first, return_lse=True, backend="triton")
        reference = bitmap_decode(q, kc, vc, first_key=first, return_lse=True, backend="reference")
        note("bitmap_decode", f"{dim=} {kept=}", got, reference)
    for tokens, n_in, n_out in ((1, 4096, 4096), (1, 1000, 777), (4, 4096, 1024), (16, 300, 64)):
        x, wt, cut = randn(tokens, n_in), randn(n_in, n_out), torch.rand(n_in, device="cuda")
        exact_y = sparse_gemv(x.float(), wt.float(), cut, backend="reference")
        poison()
        y = sparse_gemv(x, wt, cut, backend="triton")
        again = sparse_gemv(x, wt, cut, backend="triton")
        note("sparse_gemv", f"{tokens=} {n_in=} {n_out=}", [y], [exact_y])
        rows[-1]["ok"] &= torch.equal(y, again)
    return rows


# ---------------------------------------------------------------------------------------------- gathering


def dense_calls(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """One query over everything, by every backend and layout of SDPA (those that can)."""
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
    layouts: dict[str, Callable[[], Tensor]] = {
        "grouped": lambda: F.scaled_dot_product_attention(grouped, k, v),
        "gqa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    }
    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }

    def pinned(kernel: SDPBackend, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(kernel):
                return run()

        return call

    found = {}
    for (name, kernel), (layout, run) in itertools.product(kernels.items(), layouts.items()):
        call = pinned(kernel, run)
        try:
            call()
        except RuntimeError:
            continue
        found[f"{name} {layout}"] = call
    return found


def dense_times(qs: list[Tensor], ks: list[Tensor], vs: list[Tensor]) -> Row:
    """The fastest dense decoding, in a graph and called one by one."""
    per_copy = [dense_calls(q, k, v) for q, k, v in zip(qs, ks, vs, strict=True)]
    in_graph = {}
    for name in per_copy[0]:
        try:
            in_graph[name] = graph_ms([calls[name] for calls in per_copy])
        except RuntimeError:
            continue
    best = min(in_graph, key=lambda name: in_graph[name])
    return {
        "dense": best, "dense_ms": in_graph[best], "dense_all_ms": in_graph,
        "dense_no_graph_ms": median_ms(per_copy[0][best]),
    }  # fmt: skip


def naive_gather(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Callable[[], Tensor]:
    """Copy the chosen rows with ``index_select``, then SDPA."""
    batch, kv_heads, n, dim = k.shape
    lists = index.shape[1]
    head = torch.arange(lists, device="cuda") // (lists // kv_heads)
    start = (torch.arange(batch, device="cuda")[:, None] * kv_heads + head) * n
    rows = (index + start[..., None]).flatten()
    shape = (batch, lists, index.shape[2], dim)
    grouped = q.view(batch, lists, -1, dim)
    flat_k, flat_v = k.view(-1, dim), v.view(-1, dim)
    return lambda: F.scaled_dot_product_attention(
        grouped, flat_k.index_select(0, rows).view(shape), flat_v.index_select(0, rows).view(shape)
    )


def gather_section(bandwidth: float, sweep: bool) -> list[Row]:
    rows = []
    for batch, n in itertools.product((1, 8), (32768, 131072)):
        q, k, v = randn(batch, HEADS, 1, DIM), randn(batch, KV_HEADS, n, DIM), randn(batch, KV_HEADS, n, DIM)
        dense = dense_times([q], [k], [v])
        for share, lists in itertools.product((16, 8), (KV_HEADS, HEADS)):
            listed = n // share
            size = batch * lists * listed * DIM * 2 * 2
            sets = max(1, math.ceil(BEYOND_L2 / size))
            # int32, in no order; fresh lists for each call of the graph
            scores = (torch.rand(batch, lists, n, device="cuda") for _ in range(sets))
            indices = [x.topk(listed).indices for x in scores]
            narrow = [i.int() for i in indices]
            ideal = 1e3 * size / bandwidth
            row: Row = {
                "batch": batch, "tokens": n, "listed": listed,
                "lists_per": "key head" if lists == KV_HEADS else "query head", **dense, "ideal_ms": ideal,
            }  # fmt: skip
            ours = partial(gather_decode, q, k, v, backend="triton")
            row["ms"] = graph_ms([partial(ours, i) for i in narrow])
            row["sorted_ms"] = graph_ms([partial(ours, i.sort(-1).values) for i in narrow])
            row["no_graph_ms"] = median_ms(partial(ours, narrow[0]))
            row["naive_ms"] = graph_ms([naive_gather(q, k, v, i) for i in indices])
            row |= {
                "speedup": row["dense_ms"] / row["ms"], "naive_speedup": row["dense_ms"] / row["naive_ms"],
                "of_ideal": ideal / row["ms"],
            }  # fmt: skip
            rows.append(row)
            if sweep and share == 16 and n == 131072:
                row["sweep"] = gather_sweep(q, k, v, narrow)
            del indices, narrow
        del q, k, v
        torch.cuda.empty_cache()
    return rows


def gather_sweep(q: Tensor, k: Tensor, v: Tensor, indices: list[Tensor]) -> list[Row]:
    """Candidate tiles, fastest first."""
    rows = []
    for tile_rows, warps, stages, per_sm in (
        (64, 4, 3, 2), (64, 4, 3, 4), (64, 4, 3, 8), (64, 4, 3, 16), (64, 4, 5, 4), (64, 4, 1, 8),
        (32, 4, 3, 4), (32, 4, 3, 8), (32, 4, 5, 8), (32, 2, 5, 8), (128, 4, 3, 4), (128, 8, 3, 4),
        (64, 8, 3, 4), (16, 1, 5, 16),
    ):  # fmt: skip
        tiles = gather_triton.Tiles(tile_rows, warps, stages, per_sm)
        row: Row = {"tiles": str(tiles)}
        try:
            call = gather_triton.gather_decode
            row["ms"] = graph_ms([partial(call, q, k, v, i, SCALE, 1, tiles) for i in indices])
        except Exception as problem:
            row["failed"] = str(problem)[:200]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", math.inf))


# ------------------------------------------------------------------------------------- compressed caches


def bitmap_section(bandwidth: float, sweep: bool) -> list[Row]:
    rows = []
    for batch, n in itertools.product((1, 8, 32), (8192, 32768)):
        dense_size = batch * KV_HEADS * n * DIM * 2 * 2
        copies = max(1, math.ceil(BEYOND_L2 / dense_size))
        qs = [randn(batch, HEADS, 1, DIM) for _ in range(copies)]
        ks, vs = ([randn(batch, KV_HEADS, n, DIM) for _ in range(copies)] for _ in range(2))
        dense = dense_times(qs, ks, vs)
        for sparsity in (0.5, 0.7):
            kept = DIM - int(sparsity * DIM)
            packed = [(compress(k, kept), compress(v, kept)) for k, v in zip(ks, vs, strict=True)]
            size = sum(c.nbytes() for c in packed[0])
            ideal = 1e3 * size / bandwidth
            row: Row = {
                "batch": batch, "tokens": n, "sparsity": sparsity, "bytes_of_dense": size / dense_size,
                **dense, "ideal_ms": ideal,
            }  # fmt: skip
            ours = partial(bitmap_decode, backend="triton")
            row["ms"] = graph_ms([partial(ours, q, *c) for q, c in zip(qs, packed, strict=True)])
            row |= {"speedup": row["dense_ms"] / row["ms"], "of_ideal": ideal / row["ms"]}
            rows.append(row)
            if sweep and batch == 8 and n == 32768:
                row["sweep"] = bitmap_sweep(qs, packed)
        del ks, vs, packed
        torch.cuda.empty_cache()
    x = randn(8, KV_HEADS, 256, DIM)
    rows.append(
        {
            "what": "compress 256 tokens of keys, batch 8, to 38 of 128 channels",
            "ms": graph_ms([partial(compress, x, 38, backend="triton")]),
            "no_graph_ms": median_ms(partial(compress, x, 38, backend="triton")),
        }
    )
    return rows


def bitmap_sweep(qs: list[Tensor], packed: list[Any]) -> list[Row]:
    """Candidate tiles, fastest first."""
    rows = []
    for tile_rows, warps, per_sm in (
        (16, 2, 16), (32, 2, 8), (32, 4, 4), (32, 4, 8), (32, 4, 16), (64, 4, 4), (64, 4, 8), (64, 8, 4),
        (64, 8, 8), (128, 8, 4),
    ):  # fmt: skip
        tiles = bitmap_triton.Tiles(tile_rows, warps, per_sm)
        row: Row = {"tiles": str(tiles)}
        try:
            call = bitmap_triton.bitmap_decode
            row["ms"] = graph_ms(
                [
                    partial(call, q, k.bitmap, k.values, v.bitmap, v.values, None, SCALE, tiles)
                    for q, (k, v) in zip(qs, packed, strict=True)
                ]
            )
        except Exception as problem:
            row["failed"] = str(problem)[:200]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", math.inf))


# --------------------------------------------------------------------------------------- Double Sparsity


def labels_section(bandwidth: float) -> list[Row]:
    """A whole decoding step of Double Sparsity: the new token's label, scores, the best, their attention.

    A sixteenth of the tokens by a quarter of the channels, the paper's setting; lists per query head as in
    the paper, or one for the query heads that share keys. The last rows are Llama-2-7B's heads, 32 of both.
    """
    rows = []
    shapes = [(b, n, KV_HEADS) for b, n in itertools.product((1, 8), (32768, 131072))]
    for batch, n, kv_heads in (*shapes, (1, 16384, HEADS), (8, 16384, HEADS)):
        q, k, v = randn(batch, HEADS, 1, DIM), *(randn(batch, kv_heads, n, DIM) for _ in range(2))
        dense = dense_times([q], [k], [v])
        for lists, bits in itertools.product(sorted({kv_heads, HEADS}), (4, 16)):
            row: Row = {
                "batch": batch, "tokens": n, "kv_heads": kv_heads, "listed": n // 16, "bits": bits,
                "lists_per": "key head" if lists == kv_heads else "query head", **dense,
            }  # fmt: skip
            rows.append(row | labels_row(q, k, v, lists, bits, bandwidth))
            rows[-1]["speedup"] = dense["dense_ms"] / rows[-1]["ms"]
        del k, v
        torch.cuda.empty_cache()
    return rows


def labels_row(q: Tensor, k: Tensor, v: Tensor, lists: int, bits: int, bandwidth: float) -> Row:
    batch, _, n, _ = k.shape
    count, listed = DIM // 4, n // 16
    channels = torch.rand(lists, DIM, device="cuda").argsort(-1)[:, :count]
    width = row_width(count, bits)
    size = batch * lists * (n * (width * 2 if bits == 16 else width + 4) + listed * DIM * 2 * 2)
    caches = []
    for _ in range(max(1, math.ceil(BEYOND_L2 / size))):
        labels, ranges = new_labels(k, channels, bits, n)
        write_labels(k, channels, bits, labels, ranges, 0)
        caches.append((labels, ranges))

    def score(labels: Tensor, ranges: Tensor | None) -> Tensor:
        return label_scores(q, channels, bits, labels, ranges, combine=None if lists == HEADS else "max")

    def step(labels: Tensor, ranges: Tensor | None) -> Tensor:
        write_labels(k[:, :, -1:], channels, bits, labels, ranges, n - 1)
        index = top_indices(score(labels, ranges), listed)
        return gather_decode(q, k, v, index)

    scores = [score(*cache) for cache in caches]
    indices = [top_indices(x, listed) for x in scores]
    new = k[:, :, -1:]
    ideal = 1e3 * size / bandwidth
    ms = graph_ms([partial(step, *cache) for cache in caches])
    return {
        "ideal_ms": ideal, "ms": ms, "of_ideal": ideal / ms,
        "no_graph_ms": median_ms(partial(step, *caches[0])),
        "write_ms": graph_ms([partial(write_labels, new, channels, bits, *cache, n - 1) for cache in caches]),
        "score_ms": graph_ms([partial(score, *cache) for cache in caches]),
        "best_ms": graph_ms([partial(top_indices, x, listed) for x in scores]),
        "torch_topk_ms": graph_ms([partial(torch.topk, x, listed, sorted=False) for x in scores]),
        "read_ms": graph_ms([partial(gather_decode, q, k, v, i) for i in indices]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- weights


def gemv_section(bandwidth: float, sweep: bool) -> list[Row]:
    rows = []
    for n_in, n_out in ((4096, 4096), (4096, 14336), (14336, 4096)):
        size = n_in * n_out * 2
        copies = max(2, math.ceil(BEYOND_L2 / size))
        weights = [randn(n_in, n_out) for _ in range(copies)]
        usual = [w.t().contiguous() for w in weights]
        x = randn(1, n_in)
        linear = {
            "linear": graph_ms([partial(F.linear, x, w) for w in usual]),
            "linear, transposed": graph_ms([partial(F.linear, x, w.t()) for w in weights]),
        }
        dense = min(linear.values())
        for sparsity in (0.4, 0.5, 0.7):
            cut = x.abs().float().quantile(sparsity)
            density = float((x.abs().float() > cut).float().mean())
            row: Row = {
                "in": n_in, "out": n_out, "sparsity": sparsity, "density": density, "dense_ms": dense,
                "dense_all_ms": linear, "dense_of_bandwidth": 1e3 * size / bandwidth / dense,
                "ideal_ms": 1e3 * density * size / bandwidth,
            }  # fmt: skip
            row["ms"] = graph_ms([partial(sparse_gemv, x, w, cut, backend="triton") for w in weights])
            row |= {"speedup": dense / row["ms"], "of_ideal": row["ideal_ms"] / row["ms"]}
            rows.append(row)
            if sweep and sparsity == 0.5:
                row["sweep"] = gemv_sweep(x, weights, cut)
        del weights, usual
        torch.cuda.empty_cache()
    return rows


def gemv_sweep(x: Tensor, weights: list[Tensor], cut: Tensor) -> list[Row]:
    """Candidate tiles, fastest first."""
    rows = []
    for shape in (
        (32, 128, 4, 1, 8), (32, 128, 4, 3, 8), (32, 128, 4, 1, 16), (32, 128, 4, 3, 4), (64, 128, 4, 1, 8),
        (16, 256, 4, 1, 8), (16, 256, 4, 3, 8), (32, 256, 4, 1, 8), (32, 256, 8, 1, 4), (16, 512, 4, 1, 8),
        (64, 64, 4, 1, 8), (8, 256, 2, 3, 16),
    ):  # fmt: skip
        tiles = gemv_triton.Tiles(*shape)
        row: Row = {"tiles": str(tiles)}
        try:
            row["ms"] = graph_ms([partial(gemv_triton.sparse_gemv, x, w, cut, None, tiles) for w in weights])
        except Exception as problem:
            row["failed"] = str(problem)[:200]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", math.inf))


# ---------------------------------------------------------------------------------------------- the run


def table(result: Row) -> str:
    """What matters, in a screen or two."""
    lines = [f"copy {result.get('copy_bytes_per_s', 0) / 1e12:.2f} TB/s"]
    checks = result.get("check")
    if isinstance(checks, list):
        bad = [r for r in checks if not r["ok"]]
        lines.append(f"correct: {len(checks) - len(bad)} of {len(checks)}")
        lines += [f"  WRONG {r['op']} {r['case']}: {r['errors']}" for r in bad]
    for name in ("gather", "bitmap", "labels", "gemv"):
        rows = result.get(name)
        if not isinstance(rows, list):
            continue
        lines.append(name)
        for r in rows:
            if "speedup" not in r:
                lines.append(f"  {r['what']}: {r['ms']:.4f} ms ({r['no_graph_ms']:.4f} without a graph)")
                continue
            keys = ("batch", "tokens", "kv_heads", "listed", "lists_per", "bits", "in", "out", "sparsity")
            shape = " ".join(f"{k}={r[k]}" for k in keys if k in r)
            extra = f" naive {r['naive_speedup']:.1f}x sorted {r['sorted_ms']:.4f}" if "naive_ms" in r else ""
            lines.append(
                f"  {shape}: dense {r['dense_ms']:.4f} ms, ours {r['ms']:.4f} ms, {r['speedup']:.2f}x, "
                f"{r['of_ideal']:.2f} of ideal{extra}"
            )
            lines += [
                f"      {s['ms']:.4f} {s['tiles']}" if "ms" in s else f"      {s}" for s in r.get("sweep", [])
            ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sweep", action="store_true", help="also time candidate tiles")
    parser.add_argument("--only", default="check,gather,bitmap,labels,gemv", help="sections to run")
    options = parser.parse_args()
    torch.manual_seed(0)
    started = time.time()
    result: Row = {
        "command": "python " + " ".join(sys.argv),
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        "shape": f"bf16, {HEADS} query and {KV_HEADS} key heads of {DIM}",
        "copy_bytes_per_s": copy_bandwidth(),
        "seconds": {},
    }
    torch.cuda.empty_cache()
    bandwidth = result["copy_bytes_per_s"]
    sections: dict[str, Callable[[], object]] = {
        "check": check,
        "gather": lambda: gather_section(bandwidth, options.sweep),
        "bitmap": lambda: bitmap_section(bandwidth, options.sweep),
        "labels": lambda: labels_section(bandwidth),
        "gemv": lambda: gemv_section(bandwidth, options.sweep),
    }
    with torch.inference_mode():
        for name in options.only.split(","):
            before = time.time()
            try:
                result[name] = sections[name]()
            except Exception:
                result[name] = {"failed": traceback.format_exc()[-2000:]}
                print(f"{name} failed\n{result[name]['failed']}", flush=True)
            result["seconds"][name] = round(time.time() - before, 1)
            options.out.write_text(json.dumps(result, indent=1))
            print(f"[{time.time() - started:5.0f} s] {name}", flush=True)
            torch.cuda.empty_cache()
    print(table(result))


if __name__ == "__main__":
    main()
