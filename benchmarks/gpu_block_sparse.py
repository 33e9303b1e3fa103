"""Block-sparse attention on a GPU: correctness, tile sweep, times against the dense rivals.

    PYTHONPATH=src python benchmarks/gpu_block_sparse.py --out FILE.json [--quick]

The ideal time is density x the fastest dense FlashAttention-4 (or, where it is not installed, the fastest
of PyTorch's). Times are medians over CUDA events, warm, bf16, batch 1, 32 query and 8 key heads. q, k and v
are Gaussian noise, which is harmless here: the block lists are random, not selected from q and k.
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
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # so that processes share its kernels

import torch
from torch import Tensor

from sparseland.machine import machine, now, versions
from sparseland.ops.block_sparse_attention import block_sparse_attention, reference
from sparseland.ops.block_sparse_attention import triton as forward_module
from sparseland.ops.block_sparse_attention import triton_backward as backward_module
from sparseland.ops.block_sparse_attention.triton import Tile
from sparseland.patterns import BlockPattern, cdiv

HEADS, KV_HEADS = 32, 8
SIZES = ((64, 64), (64, 128), (80, 128), (96, 128), (128, 64), (128, 128), (256, 128))  # D, block size
LENGTHS = ((1000, 1000), (300, 1111))  # queries, keys: odd, and a chunk that begins inside a block

# Candidates by (kernel, head dimension, block size), besides the library's own choice.
CANDIDATES: dict[tuple[str, int, int], list[Tile]] = {
    ("forward", 128, 128): [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 4),
        Tile(128, 128, 8, 2, True), Tile(128, 128, 8, 3, True), Tile(128, 64, 8, 3, True),
        Tile(128, 64, 8, 4, True), Tile(128, 64, 4, 2, True), Tile(64, 128, 4, 2, True),
        Tile(64, 64, 4, 3, True),
    ],
    ("forward", 64, 128): [
        Tile(128, 128, 8, 2), Tile(128, 128, 8, 3), Tile(128, 64, 4, 3), Tile(128, 64, 4, 4),
        Tile(128, 128, 8, 2, True), Tile(128, 128, 8, 3, True), Tile(128, 64, 4, 3, True),
        Tile(128, 64, 8, 3, True), Tile(128, 128, 4, 2, True), Tile(64, 128, 4, 3, True),
    ],
    ("forward", 128, 64): [
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 3, True),
        Tile(64, 32, 4, 4, True),
    ],
    ("dq", 128, 128): [
        Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 3, True),
        Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, True),
    ],
    ("dkdv", 128, 128): [
        Tile(64, 128, 8, 2), Tile(64, 128, 8, 3), Tile(64, 128, 8, 2, True), Tile(32, 128, 8, 3, True),
        Tile(32, 128, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2, True),
    ],
    ("dq", 64, 128): [
        Tile(128, 64, 8, 3), Tile(128, 64, 8, 3, True), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3),
    ],
    ("dkdv", 64, 128): [
        Tile(64, 128, 8, 3), Tile(64, 128, 8, 3, True), Tile(128, 128, 8, 2), Tile(64, 64, 4, 3),
    ],
}  # fmt: skip


# ---------------------------------------------------------------- inputs


def qkv(n: int, dim: int, heads: int = HEADS, kv_heads: int = KV_HEADS, batch: int = 1) -> list[Tensor]:
    """q, k, v and a gradient of the output."""
    torch.manual_seed(0)
    shapes = ((heads, n), (kv_heads, n), (kv_heads, n), (heads, n))
    return [torch.randn(batch, h, m, dim, device="cuda", dtype=torch.bfloat16) for h, m in shapes]


def random_lists(
    n: int, size: int, density: float, uneven: bool, heads: int = HEADS, alike: float = 0
) -> BlockPattern:
    """The diagonal and random blocks.

    uneven: list lengths are log-normal (sigma 1) over heads and rows. alike: the share of a query block's
    choices that its neighbour makes, too (of each two).
    """
    torch.manual_seed(1)
    blocks = cdiv(n, size)
    rank = torch.rand(1, heads, blocks, blocks, device="cuda")
    if alike:
        joint = rank[:, :, ::2].repeat_interleave(2, 2)[:, :, :blocks]
        rank = torch.where(torch.rand_like(rank) < alike, joint, rank)
    visible = torch.arange(1, blocks + 1, device="cuda")[:, None]
    if not uneven:
        mask = rank < density
    else:
        share = density * torch.randn(1, heads, blocks, 1, device="cuda").exp() / math.exp(0.5)
        mask = rank < share
    mask = (mask & (torch.arange(blocks, device="cuda") < visible)) | torch.eye(blocks, device="cuda").bool()
    return BlockPattern.from_block_mask(mask, size, n, n)


def poison() -> None:
    """Fresh memory on the GPU holds NaN, so that what a kernel forgets to write shows."""
    junk = torch.full((1 << 28,), math.nan, device="cuda")
    del junk


def error(got: Tensor, expected: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).norm() / expected.norm())


def milliseconds(run: Callable[[], object], budget: float = 0.5, queued: bool = False) -> float:
    """Median time of a call, warm; ``queued``: of its kernels alone, launched while the GPU is still busy.

    That is how a call's small kernels run inside a model whose host is ahead of the device.
    """
    run()
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    repeats = min(max(int(budget * 1e3 / max(events[0].elapsed_time(events[1]), 1e-3)), 5), 50)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in pairs:
        if queued:
            torch.cuda._sleep(8_000_000)  # cycles: about 5 ms
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(stop) for start, stop in pairs)
    return times[len(times) // 2]


# ---------------------------------------------------------------- correctness


def has_fa4() -> bool:
    try:
        import flash_attn.cute  # noqa: F401
    except ImportError:
        return False
    return True


def has_gluon() -> bool:
    from sparseland.ops.block_sparse_attention import _why_not_gluon

    return _why_not_gluon(torch.empty(0, 0, 0, 64, device="cuda", dtype=torch.bfloat16), 128) is None


def check(dim: int, size: int, backend: str) -> list[dict[str, Any]]:
    """Outputs, log-sum-exp and gradients against the reference in fp32 on the same bf16 inputs."""
    rows = []
    for n_queries, n_keys in LENGTHS:
        q, k, v, d_out = qkv(n_keys, dim, 8, 2, 2)
        q, d_out = (t[:, :, n_keys - n_queries :].contiguous() for t in (q, d_out))
        blocks = torch.rand(2, 8, cdiv(n_queries, size), cdiv(n_keys, size), device="cuda") < 0.4
        pattern = BlockPattern.from_block_mask(blocks, size, n_queries, n_keys)
        exact = [t.float().requires_grad_() for t in (q, k, v)]
        out, lse = reference.forward(*exact, pattern.counts, pattern.indices, size, dim**-0.5)
        seen = lse > -math.inf
        d_lse = torch.randn_like(lse) * seen
        expected = torch.autograd.grad((out, lse.masked_fill(~seen, 0)), exact, (d_out.float(), d_lse))
        poison()
        inputs = [t.requires_grad_() for t in (q, k, v)]
        got, got_lse = block_sparse_attention(*inputs, pattern, return_lse=True, backend=backend)
        grads = torch.autograd.grad((got, got_lse.masked_fill(~seen, 0)), inputs, (d_out, d_lse))
        errors = {"out": error(got, out), "lse": float((got_lse - lse)[seen].abs().max())}
        errors |= {name: error(a, b) for name, a, b in zip(("dq", "dk", "dv"), grads, expected, strict=True)}
        unseen = bool((got[~seen] == 0).all()) and bool((got_lse[~seen] == -math.inf).all())
        good = unseen and all(e < 2e-2 for e in errors.values())
        rows.append(
            {"backend": backend, "D": dim, "block": size, "Nq": n_queries, "Nk": n_keys, "ok": good, **errors}
        )
    return rows


# ---------------------------------------------------------------- times


def launch(
    kind: str, tiles: tuple[Tile, ...] | None, x: list[Tensor], p: BlockPattern
) -> Callable[[], object]:
    """A call of one of our Triton kernels (dq and dkdv: both, the other with the library's choice)."""
    q, k, v, d_out = x
    lists = (p.counts, p.indices, p.block_size, q.shape[3] ** -0.5)
    if kind == "forward":
        return lambda: forward_module.forward(q, k, v, *lists, tiles=tiles)
    out, lse = forward_module.forward(q, k, v, *lists)
    d_lse = torch.zeros_like(lse)
    own = tuple(forward_module.preferred(table, q) for table in (backward_module.DQ, backward_module.DKDV))
    pair = (tiles or own[0], own[1]) if kind == "dq" else (own[0], tiles or own[1])
    return lambda: backward_module.backward(d_out, d_lse, q, k, v, out, lse, *lists, tiles=pair)


def sweep(key: tuple[str, int, int], n: int) -> list[dict[str, Any]]:
    """Time of every candidate tile at ``n`` tokens, fastest first."""
    kind, dim, size = key
    x, pattern = qkv(n, dim), random_lists(n, size, 0.1, uneven=False)
    rows: list[dict[str, Any]] = []
    for tile in CANDIDATES[key]:
        row: dict[str, Any] = {"kernel": kind, "D": dim, "block": size, "tile": str(tile)}
        try:
            row["ms"] = milliseconds(launch(kind, (tile,), x, pattern), 0.1)
        except Exception as problem:
            row["failed"] = f"{type(problem).__name__}: {problem}"[:200]
        rows.append(row)
    return sorted(rows, key=lambda row: row.get("ms", math.inf))


def dense_rivals(x: list[Tensor], backward: bool = True) -> dict[str, dict[str, float | str]]:
    """Forward and backward times of dense causal attention by the fastest there are."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v, d_out = x
    rivals: dict[str, dict[str, float | str]] = {}
    for name, kernel in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        try:
            with sdpa_kernel(kernel):
                leaves = [t.detach().requires_grad_() for t in (q, k, v)]

                def forward(leaves: list[Tensor] = leaves) -> Tensor:
                    return torch.nn.functional.scaled_dot_product_attention(
                        *leaves, is_causal=True, enable_gqa=True
                    )

                with torch.no_grad():
                    rivals[name] = {"forward": milliseconds(forward)}
                if not backward:
                    continue
                out = forward()
                rivals[name]["backward"] = milliseconds(
                    lambda out=out, leaves=leaves: torch.autograd.grad(out, leaves, d_out, retain_graph=True)
                )
        except Exception as problem:
            rivals.setdefault(name, {})["failed"] = str(problem)[:200]
    if has_fa4():
        from flash_attn.cute import interface

        turned = [t.transpose(1, 2) for t in (q, k, v, d_out)]
        try:
            run = lambda: interface._flash_attn_fwd(*turned[:3], causal=True, return_lse=True)  # noqa: E731
            rivals["fa4"] = {"forward": milliseconds(run)}
            if backward:
                out, lse = run()[:2]
                rivals["fa4"]["backward"] = milliseconds(
                    lambda: interface._flash_attn_bwd(*turned[:3], out, turned[3], lse, causal=True)
                )
        except Exception as problem:
            rivals.setdefault("fa4", {})["failed"] = str(problem)[:200]
    return rivals


def fastest(rivals: dict[str, dict[str, Any]], direction: str) -> tuple[str, float]:
    """FA4 where it ran, else the fastest dense kernel."""
    times = {name: times[direction] for name, times in rivals.items() if direction in times}
    name = "fa4" if "fa4" in times else min(times, key=lambda name: times[name])
    return name, times[name]


def compare(n: int, dim: int, best: dict[tuple[str, int, int], Tile]) -> list[dict[str, Any]]:
    """Our kernels and the FA4 route on even and uneven lists, as fractions of the ideal."""
    x = qkv(n, dim)
    q, k, v, d_out = x
    rivals = dense_rivals(x)
    pairs = n * (n + 1) / 2 * HEADS
    rows: list[dict[str, Any]] = [
        {
            "N": n,
            "D": dim,
            "what": f"dense {name}",
            "direction": way,
            "ms": ms,
            "TFLOPs": flops(way, dim, pairs, ms),
        }
        for name, times in rivals.items()
        for way, ms in times.items()
        if way in ("forward", "backward")
    ]
    rows += [
        {"N": n, "D": dim, "what": name, "failed": t["failed"]} for name, t in rivals.items() if "failed" in t
    ]
    sizes = (128, 64) if dim == 128 else (128,)
    cases = [(size, uneven, 0.1) for size in sizes for uneven in (False, True)]
    if n > 65536:
        cases += [(128, uneven, share) for share in (0.05, 0.02) for uneven in (False, True)]
    for size, uneven, share in cases:
        pattern = random_lists(n, size, share, uneven)
        density = float(pattern.density().mean())
        lists = (pattern.counts, pattern.indices, size, dim**-0.5)
        calls: dict[tuple[str, str], Callable[[], object]] = {
            ("triton", "forward"): launch("forward", tuned("forward", dim, size, best), x, pattern)
        }
        if size == 128 and share == 0.1:
            out, lse = forward_module.forward(q, k, v, *lists)
            d_lse = torch.zeros_like(lse)
            tiles = (
                tuned("dq", dim, size, best) or forward_module.preferred(backward_module.DQ, q),
                tuned("dkdv", dim, size, best) or forward_module.preferred(backward_module.DKDV, q),
            )
            saved = (d_out, d_lse, q, k, v, out, lse, *lists)
            calls["triton", "backward"] = lambda s=saved, t=tiles: backward_module.backward(*s, tiles=t)
            if has_fa4():
                from sparseland.ops.block_sparse_attention import fa4

                calls["fa4", "backward"] = lambda s=saved: fa4.backward(*s)
        if size == 128 and has_gluon():
            from sparseland.ops.block_sparse_attention import gluon

            calls["gluon", "forward"] = lambda a=lists: gluon.forward(q, k, v, *a)
        if size == 128 and has_fa4():
            from sparseland.ops.block_sparse_attention import fa4

            calls["fa4", "forward"] = lambda a=lists: fa4.forward(q, k, v, *a)
        results: dict[str, Any] = {}
        for (backend, way), call in calls.items():
            row: dict[str, Any] = {"N": n, "D": dim, "what": f"{backend} block {size}", "direction": way}
            row |= {"lists": "uneven" if uneven else "even", "density": density}
            try:
                rival, dense_ms = fastest(rivals, way)
                results[backend + way] = call()
                row["ms"] = milliseconds(call)
                row["TFLOPs"] = flops(way, dim, pairs * density, row["ms"])
                row |= {
                    "ideal_ms": density * dense_ms,
                    "ideal_of": rival,
                    "of_ideal": density * dense_ms / row["ms"],
                }
            except Exception as problem:
                row["failed"] = f"{type(problem).__name__}: {problem}"[:300]
            rows.append(row)
        for way in ("forward", "backward"):
            if "triton" + way in results and "fa4" + way in results:
                names = ("out", "lse") if way == "forward" else ("dq", "dk", "dv")
                each = zip(names, results["triton" + way], results["fa4" + way], strict=True)
                difference = {name: error(a, b) for name, a, b in each}
                rows.append(
                    {"N": n, "D": dim, "what": f"triton against fa4, {way}", "lists": uneven, **difference}
                )
        del results, calls
        torch.cuda.empty_cache()
    return rows


def lists_only(n: int, dim: int) -> list[dict[str, Any]]:
    """Forward on random lists by the kernels for Hopper: the short form of :func:`compare`.

    Blocks of 64 in heads of 128 beside Triton's kernel, on lists that neighbours share in part, too: together
    they list about 1.3 times as many blocks as one of them, as they do where methods select on text.
    """
    from sparseland.ops.block_sparse_attention import fa4, gluon

    x = qkv(n, dim)
    rival, dense_ms = fastest(dense_rivals(x, backward=False), "forward")
    rows: list[dict[str, Any]] = []
    kernels: dict[int, dict[str, Any]] = {128: {"gluon": gluon, "fa4": fa4}}
    if dim == 128:
        kernels[64] = {"gluon": gluon, "triton": forward_module}
    for size, modules in kernels.items():
        for share in (0.1, 0.05, 0.02):
            for name in ("even", "uneven", "alike")[: 3 if size == 64 else 2]:
                alike = 0.8 if name == "alike" else 0
                pattern = random_lists(n, size, share, name == "uneven", alike=alike)
                density = float(pattern.density().mean())
                lists = (pattern.counts, pattern.indices, size, dim**-0.5)
                first = None
                for backend, module in modules.items():
                    call = partial(module.forward, *x[:3], *lists)
                    got = call()[0]
                    first = got if first is None else first
                    ms = milliseconds(call, 0.2)
                    rows.append(
                        {
                            "N": n, "D": dim, "what": f"{backend} block {size}", "direction": "forward",
                            "lists": name, "density": density, "ms": ms, "ideal_ms": density * dense_ms,
                            "ideal_of": rival, "of_ideal": density * dense_ms / ms,
                            "against_first": error(got, first),
                        }
                    )  # fmt: skip
    return rows


def tuned(kind: str, dim: int, size: int, best: dict[tuple[str, int, int], Tile]) -> tuple[Tile, ...] | None:
    tile = best.get((kind, dim, size))
    return (tile,) if tile else None


def flops(way: str, dim: int, pairs: float, ms: float) -> float:
    """TFLOP/s: two matrix products forward, five backward (recomputation is not counted)."""
    return (4 if way == "forward" else 10) * dim * pairs / ms / 1e9


# ---------------------------------------------------------------- the run


def compile_one(job: tuple[str, int, int, Tile | None]) -> None:
    """In its own process: compile one kernel into the cache on disk by running it on small inputs."""
    kind, dim, size, tile = job
    try:
        if kind.startswith("check "):
            check(dim, size, kind.removeprefix("check "))
        elif kind == "dense":
            dense_rivals(qkv(2048, dim))
        elif kind == "fa4":
            from sparseland.ops.block_sparse_attention import fa4

            q, k, v, d_out = qkv(2048, dim)
            p = random_lists(2048, size, 0.3, uneven=False)
            lists = (p.counts, p.indices, size, dim**-0.5)
            out, lse = fa4.forward(q, k, v, *lists)
            fa4.backward(d_out, torch.zeros_like(lse), q, k, v, out, lse, *lists)
        else:
            x, p = qkv(2048, dim), random_lists(2048, size, 0.3, uneven=False)
            launch(kind, (tile,) if tile else None, x, p)()
        torch.cuda.synchronize()
    except Exception:
        pass  # the run itself meets the same problem and records it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, 32K tokens only, no sweep")
    parser.add_argument(
        "--lists-only", action="store_true", help="forward on random lists at 128K, nothing else"
    )
    options = parser.parse_args()
    started = time.time()
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "date": now(),
        "machine": machine(),
        "versions": versions(),
        "inputs": "Gaussian q, k, v; random block lists, densities are those before the diagonal is added",
        "shape": f"bf16, batch 1, {HEADS} query and {KV_HEADS} key heads, causal",
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

    if options.lists_only:
        for dim in (128, 64):
            section(f"lists 131072 D{dim}", lambda dim=dim: lists_only(131072, dim))
        report(result)
        return
    sizes = ((64, 128), (128, 128)) if options.quick else SIZES
    keys = [] if options.quick else list(CANDIDATES)
    jobs: list[tuple[str, int, int, Tile | None]] = []
    if has_fa4():
        # FA4's compilations take longest, so they go first.
        jobs += [
            ("check fa4", dim, size, None) for dim, size in sizes if size == 128 and dim in (64, 96, 128)
        ]
        jobs += [(kind, dim, 128, None) for kind in ("dense", "fa4") for dim in (128, 64)]
    jobs += [("check triton", dim, size, None) for dim, size in sizes]
    jobs += [(*key, tile) for key in keys for tile in CANDIDATES[key]]

    def precompile() -> int:
        workers = min(12, os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.map_async(compile_one, jobs, chunksize=1).get(timeout=150)
        return len(jobs)

    best: dict[tuple[str, int, int], Tile] = {}

    def tune() -> list[dict[str, Any]]:
        rows = []
        for key in keys:
            found = sweep(key, 32768)
            rows += found
            if "ms" in found[0]:
                best[key] = next(tile for tile in CANDIDATES[key] if str(tile) == found[0]["tile"])
        return rows

    def checks(backend: str) -> list[dict[str, Any]]:
        rows = []
        for dim, size in sizes:
            if backend == "triton" or (
                size == 128 and dim in ((64, 96, 128) if backend == "fa4" else (64, 128))
            ):
                try:
                    rows += check(dim, size, backend)
                except Exception as problem:
                    text = f"{type(problem).__name__}: {problem}"[:500]
                    rows.append({"backend": backend, "D": dim, "block": size, "ok": False, "failed": text})
        return rows

    section("precompiled", precompile)
    section("correct triton", lambda: checks("triton"))
    if has_fa4():
        section("correct fa4", lambda: checks("fa4"))
    if has_gluon():
        section("correct gluon", lambda: checks("gluon"))
    section("sweep", tune)
    for n in (32768,) if options.quick else (32768, 131072):
        for dim in (128, 64):
            section(f"times {n} D{dim}", lambda n=n, dim=dim: compare(n, dim, best))
    result["tiles used"] = {str(key): str(tile) for key, tile in best.items()}
    options.out.write_text(json.dumps(result, indent=1))
    report(result)


def report(result: dict[str, Any]) -> None:
    """A short table of everything."""
    for name, rows in result.items():
        if isinstance(rows, list):
            print(f"\n{name}")
            for row in rows:
                print(
                    "  "
                    + "  ".join(
                        f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()
                    )
                )


if __name__ == "__main__":
    main()
