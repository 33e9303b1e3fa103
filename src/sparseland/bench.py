"""Ops against the fastest dense rival on this machine, in one run, on inputs from a real model.

Times are medians of interleaved runs: dense, ours, dense, ours, …, so that a drifting machine treats
both alike. *Ideal* is what the rival's time would be if it could skip pairs (or bytes) for free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, parse_spec

LENGTH = 8192
DECODE_LENGTH = 8192
LAYERS = (8, 15, 22)
ROUNDS = 7


def run(op: str, length: int | None = None) -> list[dict[str, Any]]:
    """Rows of one op's benchmark (``sparseland bench OP``).

    Raises:
        SparselandError: there is no benchmark of that name.
    """
    if op not in BENCHMARKS:
        raise SparselandError(f"no benchmark {op!r}; there are {', '.join(BENCHMARKS)}")
    with torch.no_grad():
        return list(BENCHMARKS[op](length))


def interleaved(works: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of each piece of work, run in turn after one warm-up each."""
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def captured(length: int, dtype: torch.dtype, layers: tuple[int, ...] = LAYERS) -> Iterator[AttentionInputs]:
    """q, k, v of the embedded model on the default text."""
    from sparseland.models import load_embedded
    from sparseland.models.capture import capture_qkv
    from sparseland.tasks.text import default_text, tokenize

    loaded = load_embedded("float32")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = tokenize(loaded.tokenizer, default_text())[:length]
    for x in capture_qkv(loaded.model.to(device), ids[None], layers):
        yield replace(x, q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


def dense_rivals(x: AttentionInputs) -> dict[str, Callable[[], Tensor]]:
    """Dense causal attention as torch does it: with grouped and with repeated key heads."""
    k, v = x.k.repeat_interleave(x.group, 1), x.v.repeat_interleave(x.group, 1)
    return {
        "sdpa": lambda: F.scaled_dot_product_attention(x.q, k, v, is_causal=True, scale=x.scale),
        "sdpa_gqa": lambda: F.scaled_dot_product_attention(
            x.q, x.k, x.v, is_causal=True, scale=x.scale, enable_gqa=True
        ),
    }


# Each at about 10-13 % density on these inputs; FlexPrefill's density is its own choice.
_PATTERNS = (
    "oracle:budget=0.12",
    "random-blocks:budget=0.12",
    "flexprefill:gamma=0.7,min_budget=256",
    "streaming:sinks=64,window=512",
)


def _attention(length: int | None, specs: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    from sparseland.ops.attend import attend

    n = length or LENGTH
    for dtype in (torch.float32, torch.bfloat16):
        for x in captured(n, dtype):
            rivals = dense_rivals(x)
            for spec in specs:
                method: Any = parse_spec(spec)
                pattern = method.pattern(x)
                density = pattern.density().mean().item()
                times = interleaved(
                    {
                        **rivals,
                        "ours": partial(attend, x.q, x.k, x.v, pattern, scale=x.scale),
                        "selection": partial(method.pattern, x),
                    }
                )
                dense = min(times[name] for name in rivals)
                yield {
                    "op": type(pattern).__name__, "pattern": spec, "dtype": str(dtype).removeprefix("torch."),
                    "length": n, "layer": x.layer, "heads": x.q.shape[1], "kv_heads": x.k.shape[1],
                    "head_dim": x.q.shape[3], "density": density, "dense_ms": 1e3 * dense,
                    "ours_ms": 1e3 * times["ours"], "selection_ms": 1e3 * times["selection"],
                    "speedup": dense / times["ours"], "of_ideal": density * dense / times["ours"],
                }  # fmt: skip


def _block_sparse(length: int | None) -> Iterator[dict[str, Any]]:
    return _attention(length, _PATTERNS[:3])


def _window(length: int | None) -> Iterator[dict[str, Any]]:
    return _attention(length, _PATTERNS[3:])


def _block_column(length: int | None) -> Iterator[dict[str, Any]]:
    return _attention(length, ("minference:vertical=128,slash=256",))


def _gather_decode(length: int | None) -> Iterator[dict[str, Any]]:
    from sparseland.ops.gather_decode import dense_decode, gather_decode

    n = length or DECODE_LENGTH
    for dtype in (torch.float32, torch.bfloat16):
        for x in captured(n, dtype, LAYERS[:1]):
            q = x.q[:, :, -1:]
            for share in (1 / 16, 1 / 8, 1 / 4):
                scores = (q.view(1, -1, x.group, *q.shape[2:]) @ x.k[:, :, None].mT).sum((2, 3))
                index = scores.topk(int(n * share), dim=-1).indices.sort(-1).values
                times = interleaved(
                    {
                        "dense": partial(dense_decode, q, x.k, x.v, scale=x.scale),
                        "ours": partial(gather_decode, q, x.k, x.v, index, scale=x.scale),
                    },
                    50,
                )
                yield {
                    "op": "gather_decode", "dtype": str(dtype).removeprefix("torch."), "length": n,
                    "share": share, "dense_ms": 1e3 * times["dense"], "ours_ms": 1e3 * times["ours"],
                    "speedup": times["dense"] / times["ours"],
                    "of_ideal": share * times["dense"] / times["ours"],
                }  # fmt: skip


def _dense_rows(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return F.linear(x, next(weights))


def _dense_columns(x: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return x @ next(weights)


def _ours(x: Tensor, weights: Iterator[Tensor], threshold: Tensor) -> Tensor:
    from sparseland.ops.sparse_gemv import sparse_gemv

    return sparse_gemv(x, next(weights), threshold)


def _sparse_gemv(length: int | None) -> Iterator[dict[str, Any]]:
    inputs, outputs, copies = 4096, 11008, 3
    for dtype in (torch.float32, torch.bfloat16):
        # Several weights in turn: one alone would stay in the cache, as no model's weights do.
        stored = [torch.randn(outputs, inputs, dtype=dtype) for _ in range(copies)]
        columns = cycle([w.T.contiguous() for w in stored])
        rows = cycle(stored)
        x = torch.randn(1, inputs, dtype=dtype)
        for sparsity in (0.0, 0.25, 0.4, 0.5, 0.7, 0.9):
            threshold = (
                x.abs().float().quantile(sparsity).to(dtype) if sparsity else torch.tensor(-1.0, dtype=dtype)
            )
            times = interleaved(
                {
                    "dense_rows": partial(_dense_rows, x, rows),
                    "dense_columns": partial(_dense_columns, x, columns),
                    "ours": partial(_ours, x, columns, threshold),
                },
                31,
            )
            times["dense"] = min(times["dense_rows"], times["dense_columns"])
            yield {
                "op": "sparse_gemv", "dtype": str(dtype).removeprefix("torch."), "in": inputs, "out": outputs,
                "sparsity": sparsity, "dense_ms": 1e3 * times["dense"], "ours_ms": 1e3 * times["ours"],
                "speedup": times["dense"] / times["ours"],
                "of_ideal": (1 - sparsity) * times["dense"] / times["ours"],
            }  # fmt: skip


BENCHMARKS: dict[str, Callable[[int | None], Iterator[dict[str, Any]]]] = {
    "block_sparse_attention": _block_sparse,
    "block_column_attention": _block_column,
    "window_attention": _window,
    "gather_decode": _gather_decode,
    "sparse_gemv": _sparse_gemv,
}
