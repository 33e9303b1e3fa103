"""Input-skipping products against dense ones on the CPU, for one token.

    python benchmarks/cpu_sparse_gemv.py --out FILE.json [--quick]

The dense rival is ``F.linear`` on a weight in its usual layout and on the transposed one that ours reads;
the faster of the two counts. The three run in turn, each time on the next of several weights and inputs, so
that none is left in a cache and a drifting machine treats all alike. Medians. *Ideal* is density times
the rival's time. Inputs and weights are Gaussian: the time depends only on how many inputs are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseland.machine import circumstances
from sparseland.ops.sparse_gemv import sparse_gemv

SHAPES = ((4096, 11008), (4096, 14336))
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.7, 0.9)
COPIES = 3


def skipping(inputs: list[Tensor], weights: list[Tensor], cuts: list[Tensor], i: int) -> Tensor:
    return sparse_gemv(inputs[i], weights[i], cuts[i])


def measure(n_in: int, n_out: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One row per sparsity."""
    weights = [torch.randn(n_in, n_out).to(dtype) for _ in range(COPIES)]
    usual = [w.t().contiguous() for w in weights]
    inputs = [torch.randn(1, n_in).to(dtype) for _ in range(COPIES)]
    rows = []
    for sparsity in SPARSITIES:
        cuts = [x.abs().float().flatten().sort().values[int(sparsity * n_in) - 1] for x in inputs]
        if sparsity == 0:
            cuts = [torch.tensor(-1.0)] * COPIES
        density = (
            sum(float((x.abs() > cut).float().mean()) for x, cut in zip(inputs, cuts, strict=True)) / COPIES
        )
        works: dict[str, Callable[[int], Tensor]] = {
            "linear": lambda i: F.linear(inputs[i], usual[i]),
            "linear_transposed": lambda i: F.linear(inputs[i], weights[i].t()),
            "ours": partial(skipping, inputs, weights, cuts),
        }
        times: dict[str, list[float]] = {name: [] for name in works}
        for step in range(-1, rounds):
            for shift, (name, work) in enumerate(works.items()):
                start = time.perf_counter()
                work((step + shift) % COPIES)
                if step >= 0:
                    times[name].append(1e3 * (time.perf_counter() - start))
        exact = torch.where(inputs[0].abs() > cuts[0], inputs[0], 0).double() @ weights[0].double()
        error = (works["ours"](0).double() - exact).norm() / exact.norm()
        ms = {name: sorted(t)[len(t) // 2] for name, t in times.items()}
        dense = min(ms["linear"], ms["linear_transposed"])
        rows.append(
            {
                "in": n_in, "out": n_out, "dtype": str(dtype).removeprefix("torch."), "sparsity": sparsity,
                "density": density, "ms": ms, "speedup": dense / ms["ours"],
                "speedup_over_linear": ms["linear"] / ms["ours"], "of_ideal": density * dense / ms["ours"],
                "relative_error": float(error),
            }
        )  # fmt: skip
        print(
            f"{n_in}x{n_out} {rows[-1]['dtype']:9} sparsity {sparsity:4.2f}: linear {ms['linear']:6.2f} ms, "
            f"transposed {ms['linear_transposed']:6.2f} ms, ours {ms['ours']:6.2f} ms, "
            f"{rows[-1]['speedup']:.2f}x ({rows[-1]['speedup_over_linear']:.2f}x over linear)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one shape, few rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {
        **circumstances("python " + " ".join(sys.argv)),
        "inputs": f"Gaussian x and weights, {COPIES} of each in turn, one token",
        "rows": [],
    }
    with torch.inference_mode():
        for n_in, n_out in SHAPES[:1] if options.quick else SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                result["rows"] += measure(n_in, n_out, dtype, 7 if options.quick else 41)
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
