"""Attention over columns, and the tree search that lists them, on a GPU: checks, tile sweeps, times.

    PYTHONPATH=src python benchmarks/gpu_columns.py --out benchmarks/results/gpu_columns.json [--quick]

The lists are random stripes (runs of 1 to 64 keys) per query block and head, over all keys before the block.
The ideal time is density x the fastest dense FlashAttention-4 (or, where it is not installed, the fastest of
PyTorch's). The search is HiP's (k = 512, blocks of 32 queries and 2 keys), its time as a part of dense
attention's. Times are medians over CUDA events, warm, bf16, batch 1; q, k and v are Gaussian noise, which is
harmless here: the lists are random, not selected from q and k.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_block_sparse import dense_rivals, error, fastest, flops, milliseconds, poison, qkv
from torch import Tensor

from sparseland.machine import circumstances
from sparseland.ops.block_sparse_attention.triton import Tile
from sparseland.ops.column_sparse_attention import block_column_attention, column_sparse_attention
from sparseland.ops.column_sparse_attention import triton as kernel
from sparseland.ops.tree_search import tree_search
from sparseland.ops.tree_search import triton as search_kernel
from sparseland.patterns import BlockColumnPattern, BlockPattern, ColumnPattern, cdiv

SHAPES = ((32, 8, 128), (9, 3, 64))  # query heads, key heads, head dimension
LENGTHS = ((1000, 1000), (300, 1111))  # queries, keys: odd, and a chunk that begins inside a block

# Candidates by (head dimension, query rows of a block), besides the library's own choice.
CANDIDATES: dict[tuple[int, int], list[Tile]] = {
    (128, 128): [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 2), Tile(128, 64, 8, 3),
        Tile(128, 64, 8, 4), Tile(128, 64, 4, 3), Tile(128, 32, 8, 4), Tile(64, 128, 4, 2),
        Tile(64, 64, 4, 3), Tile(64, 64, 4, 4),
    ],
    (64, 128): [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 128, 8, 4), Tile(128, 128, 4, 2),
        Tile(128, 64, 4, 3), Tile(128, 64, 4, 4), Tile(128, 64, 8, 3), Tile(64, 128, 4, 3),
        Tile(64, 64, 4, 3),
    ],
    (128, 64): [Tile(64, 128, 4, 2), Tile(64, 128, 8, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 4)],
    (64, 64): [Tile(64, 128, 4, 2), Tile(64, 128, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 4)],
    (128, 32): [Tile(32, 128, 4, 2), Tile(32, 64, 4, 3), Tile(32, 64, 2, 3), Tile(32, 64, 4, 4)],
    (64, 32): [Tile(32, 128, 4, 2), Tile(32, 128, 4, 3), Tile(32, 64, 4, 3), Tile(32, 64, 2, 4)],
    (128, 16): [Tile(16, 64, 4, 3), Tile(16, 128, 4, 2), Tile(16, 64, 2, 3), Tile(16, 32, 2, 4)],
    (64, 16): [Tile(16, 128, 4, 3), Tile(16, 64, 2, 3), Tile(16, 64, 4, 3), Tile(16, 32, 2, 4)],
}  # fmt: skip


# ---------------------------------------------------------------- inputs


def stripes(n: int, heads: int, size: int, run: int, density: float) -> ColumnPattern:
    """Runs of ``run`` keys at random places, one in each stretch of ``run / density`` keys, ascending."""
    g = torch.Generator(device="cuda").manual_seed(1)
    places = max(1, round(1 / density))
    runs = n // (run * places)
    rows = cdiv(n, size)
    base = torch.arange(runs, device="cuda") * places
    indices = torch.empty(1, heads, rows, runs * run, dtype=torch.int32, device="cuda")
    for h in range(heads):
        start = (base + torch.randint(places, (rows, runs), generator=g, device="cuda")) * run
        keys = start[..., None] + torch.arange(run, device="cuda")
        indices[0, h] = keys.flatten(1).to(torch.int32)
    last = (torch.arange(1, rows + 1, device="cuda") * size - 1).clamp(max=n - 1).to(torch.int32)
    ends = last.expand(1, heads, -1)[..., None].contiguous()
    counts = torch.searchsorted(indices, ends, right=True)[..., 0].to(torch.int32)
    return ColumnPattern(n, n, size, counts, indices)


def anchored(n: int, heads: int, run: int, density: float, size: int = 128, share: int = 16) -> Any:
    """The first block, the blocks from one before the group on, and stripes shared by the group's blocks."""
    rows, groups = cdiv(n, size), cdiv(n, size * share)
    row, column = (torch.arange(rows, device="cuda") for _ in range(2))
    local = column >= (row // share * share - 1)[:, None]
    blocks = BlockPattern.from_block_mask((local | (column == 0))[None, None], size, n, n)
    lists = stripes(n, heads, size * share, run, density)
    # Columns before the local blocks and after the first one: ascending lists are cut at both ends.
    first = torch.searchsorted(lists.indices, torch.full_like(lists.indices[..., :1], size))
    begin = (torch.arange(groups, device="cuda", dtype=torch.int32) * share - 1).clamp(min=0) * size
    end = torch.searchsorted(lists.indices, begin.expand(1, heads, -1)[..., None].contiguous())
    place = first + torch.arange(lists.indices.shape[-1], device="cuda")
    indices = lists.indices.gather(-1, place.clamp(max=lists.indices.shape[-1] - 1))
    counts = (end - first)[..., 0].clamp(min=0).to(torch.int32)
    columns = ColumnPattern(n, n, size * share, counts, indices)
    return BlockColumnPattern(n, n, blocks, columns)


# ---------------------------------------------------------------- correctness


def check(dim: int, size: int, share: int) -> list[dict[str, Any]]:
    """Outputs, log-sum-exp and gradients against the reference in fp32 on the same bf16 inputs."""
    rows = []
    for n_queries, n_keys in LENGTHS:
        q, k, v, d_out = qkv(n_keys, dim, 8, 2, 2)
        q, d_out = (t[:, :, n_keys - n_queries :].contiguous() for t in (q, d_out))
        blocks = torch.rand(2, 8, cdiv(n_queries, size), cdiv(n_keys, size), device="cuda") < 0.2
        lists = BlockPattern.from_block_mask(blocks, size, n_queries, n_keys)
        covered = lists.block_mask().repeat_interleave(size, -1)[..., :n_keys]
        covered = torch.stack([part.any(2) for part in covered.split(share, 2)], 2)
        columns = (torch.rand(covered.shape, device="cuda") < 0.2) & ~covered
        rest = ColumnPattern.from_column_mask(columns, size * share, n_queries, n_keys)
        for pattern in (rest, BlockColumnPattern(n_queries, n_keys, lists, rest)):
            union = isinstance(pattern, BlockColumnPattern)
            attend: Any = block_column_attention if union else column_sparse_attention
            exact = [t.float().requires_grad_() for t in (q, k, v)]
            out, lse = attend(*exact, pattern, return_lse=True, backend="reference")
            seen = lse > -math.inf
            d_lse = torch.randn_like(lse) * seen
            expected = torch.autograd.grad((out, lse.masked_fill(~seen, 0)), exact, (d_out.float(), d_lse))
            poison()
            inputs = [t.detach().requires_grad_() for t in (q, k, v)]
            got, got_lse = attend(*inputs, pattern, return_lse=True, backend="triton")
            grads = torch.autograd.grad((got, got_lse.masked_fill(~seen, 0)), inputs, (d_out, d_lse))
            errors = {"out": error(got, out), "lse": float((got_lse - lse)[seen].abs().max())}
            names = ("dq", "dk", "dv")
            errors |= {name: error(a, b) for name, a, b in zip(names, grads, expected, strict=True)}
            unseen = bool((got[~seen] == 0).all()) and bool((got_lse[~seen] == -math.inf).all())
            good = unseen and all(e < 2e-2 for e in errors.values())
            rows.append(
                {"D": dim, "block": size, "share": share, "kind": type(pattern).__name__, "Nq": n_queries,
                 "Nk": n_keys, "ok": good, **errors}
            )  # fmt: skip
    return rows


# ---------------------------------------------------------------- times


def launch(x: list[Tensor], p: Any, tiles: tuple[Tile, ...] | None = None) -> Callable[[], object]:
    """A call of the kernel."""
    q, k, v, _ = x
    union = isinstance(p, BlockColumnPattern)
    columns = p.columns if union else p
    size = p.blocks.block_size if union else p.block_size
    rows = cdiv(p.n_queries, size)
    counts = p.blocks.counts if union else columns.counts.new_zeros(1, 1, rows)
    indices = p.blocks.indices if union else columns.indices.new_empty(1, 1, rows, 0)
    lists = (size, columns.block_size, counts, indices, columns.counts, columns.indices)
    return lambda: kernel.block_column_attention(q, k, v, *lists, q.shape[3] ** -0.5, tiles=tiles)


def sweep(dim: int, size: int, n: int) -> list[dict[str, Any]]:
    """Time of every candidate tile on stripes of 16 keys at 10 %, fastest first."""
    heads, kv_heads, _ = next(shape for shape in SHAPES if shape[2] == dim)
    x, pattern = qkv(n, dim, heads, kv_heads), stripes(n, heads, size, 16, 0.1)
    rows: list[dict[str, Any]] = []
    for tile in CANDIDATES[dim, size]:
        row: dict[str, Any] = {"D": dim, "block": size, "tile": str(tile)}
        try:
            row["ms"] = milliseconds(launch(x, pattern, (tile,)), 0.1)
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", math.inf))


def compare(
    n: int, shape: tuple[int, int, int], best: dict[tuple[int, int], Tile], quick: bool
) -> list[dict[str, Any]]:
    """Stripes of several widths, query blocks of several sizes and two densities, as parts of the ideal."""
    heads, kv_heads, dim = shape
    x = qkv(n, dim, heads, kv_heads)
    rivals = dense_rivals(x)
    rival, dense_ms = fastest(rivals, "forward")
    pairs = n * (n + 1) / 2 * heads
    common = {"N": n, "heads": f"{heads}/{kv_heads}", "D": dim}
    rows: list[dict[str, Any]] = []
    for name, times in rivals.items():
        row: dict[str, Any] = {**common, "what": f"dense {name}"}
        if "forward" in times:
            row |= {"ms": times["forward"], "TFLOPs": flops("forward", dim, pairs, times["forward"])}
        else:
            row["failed"] = times.get("failed", "")
        rows.append(row)
    cases: list[tuple[str, int, int, float]] = [
        ("columns", 128, run, density) for run in (1, 4, 16, 64) for density in (0.05, 0.1)
    ]
    cases += [("columns", size, 16, 0.1) for size in (64, 32, 16, 2048)]
    cases += [("anchor: blocks of 128, columns shared by 2048 rows", 128, 1, 0.1)]
    for what, size, run, density in cases[4:6] + cases[-2:] if quick else cases:
        pattern: Any = anchored(n, heads, run, density) if what != "columns" else None
        pattern = pattern or stripes(n, heads, size, run, density)
        tile = best.get((dim, min(size, 128)))
        row = {**common, "what": what, "block": size, "run": run, "density": float(pattern.density().mean())}
        try:
            row["ms"] = milliseconds(launch(x, pattern, (tile,) if tile else None), 0.3)
            row["TFLOPs"] = flops("forward", dim, pairs * row["density"], row["ms"])
            row |= {"ideal_ms": row["density"] * dense_ms, "ideal_of": rival}
            row |= {"of_ideal": row["ideal_ms"] / row["ms"], "speedup": dense_ms / row["ms"]}
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
        rows.append(row)
        del pattern
        torch.cuda.empty_cache()
    return rows


# ---------------------------------------------------------------- tree search


SEARCH_TILES = [
    search_kernel.Tile(64, 1), search_kernel.Tile(32, 1), search_kernel.Tile(128, 1),
    search_kernel.Tile(64, 2), search_kernel.Tile(128, 4, 3),
]  # fmt: skip


def search_ranges(n: int) -> tuple[Tensor, Tensor]:
    """Each block of 32 queries searches from key 32 up to 128 keys before itself, in blocks of 2."""
    first = torch.arange(0, n, 32, device="cuda", dtype=torch.int32)
    return torch.full_like(first, 32)[None], ((first - 160).clamp(min=0) // 2)[None]


def check_search() -> list[dict[str, Any]]:
    """Lists equal the reference's where products are exact."""
    rows = []
    for _, kv_heads, dim in SHAPES:
        for shared in (False, True):
            g = torch.Generator().manual_seed(2)
            q, k = (torch.randint(-4, 5, (1, h, 1500, dim), generator=g) for h in (2 * kv_heads, kv_heads))
            q, k = q.cuda().bfloat16(), k.cuda().bfloat16()
            options: dict[str, Any] = {"block_q": 32, "block_k": 2, "keep": 32, "stride": 2, "shared": shared}
            first, blocks = search_ranges(1500)
            poison()
            got, want = (
                tree_search(q, k, first, blocks, **options, backend=b)[1] for b in ("triton", "reference")
            )
            rows.append({"D": dim, "shared": shared, "ok": torch.equal(got, want)})
    return rows


def search_times(
    n: int, shape: tuple[int, int, int], tiles: list[Any], dense_ms: float | None
) -> list[dict[str, Any]]:
    """The search at HiP's defaults, per head and per group, by tile."""
    heads, kv_heads, dim = shape
    q, k = qkv(n, dim, heads, kv_heads)[:2]
    first, blocks = search_ranges(n)
    rows: list[dict[str, Any]] = []
    for shared in (False, True):
        for tile in tiles:
            row = {"N": n, "heads": f"{heads}/{kv_heads}", "D": dim, "shared": shared, "tile": str(tile)}
            try:
                row["ms"] = milliseconds(
                    lambda s=shared, t=tile: search_kernel.tree_search(
                        q, k, first, blocks, 32, 2, 256, 2, s, tile=t
                    ),
                    0.1,
                )
                if dense_ms:
                    row["of_dense"] = row["ms"] / dense_ms
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {problem}"[:200]
            rows.append(row)
    return rows


# ---------------------------------------------------------------- the run


def compile_one(job: tuple[str, int, int, Any]) -> None:
    """In its own process: compile one kernel into the cache on disk by running it on small inputs."""
    kind, dim, size, detail = job
    try:
        if kind == "check":
            check(dim, size, detail)
        elif kind == "search":
            search_times(2048, SHAPES[dim], [SEARCH_TILES[size]], None)
        else:
            launch(qkv(4096, dim, 2, 1), stripes(4096, 2, size, 16, 0.1), detail)()
        torch.cuda.synchronize()
    except Exception:
        pass  # the run itself meets the same problem and records it


def as_rows(section: Any) -> list[dict[str, Any]]:
    """A section's rows; none where it failed."""
    return section if isinstance(section, list) else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="few cases, 32K tokens only, no sweep")
    options = parser.parse_args()
    started = time.time()
    result: dict[str, Any] = {
        **circumstances("python " + " ".join(sys.argv)),
        "inputs": "Gaussian q, k, v; random stripes before each query block",
        "shape": "bf16, batch 1, causal",
        "seconds": {},
    }

    def section(name: str, run: Callable[[], object]) -> None:
        before = time.time()
        try:
            result[name] = run()
        except Exception:
            result[name] = {"failed": traceback.format_exc()[-2000:]}
            print(f"{name} failed\n{result[name]['failed']}", flush=True)
        result["seconds"][name] = round(time.time() - before, 1)
        options.out.write_text(json.dumps(result, indent=1))
        print(f"[{time.time() - started:5.0f} s] {name}", flush=True)
        torch.cuda.empty_cache()

    checked = [
        (64, 32, 1),
        (64, 128, 1),
        (80, 64, 2),
        (128, 16, 4),
        (128, 64, 1),
        (128, 128, 2),
        (256, 128, 1),
    ]
    keys = [] if options.quick else list(CANDIDATES)
    jobs: list[tuple[str, int, int, Any]] = [("check", *case) for case in checked]
    jobs += [("search", i, j, None) for i in range(len(SHAPES)) for j in range(len(SEARCH_TILES))]
    jobs += [("time", *key, (tile,)) for key in keys for tile in CANDIDATES[key]]
    jobs += [("time", dim, size, None) for dim, size in CANDIDATES]

    def precompile() -> int:
        workers = min(12, os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map_async(compile_one, jobs, chunksize=1).get(timeout=150)
        return len(jobs)

    best: dict[tuple[int, int], Tile] = {}

    def tune() -> list[dict[str, Any]]:
        rows = []
        for key in keys:
            found = sweep(*key, 32768)
            rows += found
            if "ms" in found[0]:
                best[key] = next(tile for tile in CANDIDATES[key] if str(tile) == found[0]["tile"])
        return rows

    section("precompiled", precompile)
    section("correct", lambda: [row for case in checked for row in check(*case)])
    section("correct tree search", check_search)
    section("sweep", tune)
    for n in (32768,) if options.quick else (32768, 131072):
        for shape in SHAPES:
            heads, kv_heads, dim = shape
            name = f"times {n} heads {heads}/{kv_heads} D{dim}"
            section(name, lambda n=n, shape=shape: compare(n, shape, best, options.quick))
            times = [
                row["ms"] for row in as_rows(result[name]) if row["what"].startswith("dense") and "ms" in row
            ]
            name = f"tree search {n} heads {heads}/{kv_heads} D{dim}"
            section(
                name,
                lambda n=n, shape=shape, t=times: search_times(n, shape, SEARCH_TILES, min(t, default=None)),
            )
    result["tiles used"] = {str(key): str(tile) for key, tile in best.items()}
    options.out.write_text(json.dumps(result, indent=1))
    for name, rows in result.items():
        if isinstance(rows, list):
            print(f"\n{name}")
            for row in rows:
                print(
                    "  ",
                    "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()),
                )


if __name__ == "__main__":
    main()
