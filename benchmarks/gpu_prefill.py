"""One attention layer's prefill on a GPU: every method's selection and computation against dense attention.

    PYTHONPATH=src python benchmarks/gpu_prefill.py --out FILE.json [--lengths 32768,131072] [--peers DIR]

Inputs are those of :mod:`inputs` (a real model reading real text). Each method runs at the settings of its
paper (a class's defaults); recall is the attention mass on the computed pairs by the softmax denominators,
error the relative Frobenius norm against dense. Dense is FlashAttention-4 where installed, else the fastest
of PyTorch's. Times are medians over CUDA events, warm; selection and computation are timed apart and
together. ``select_ms`` is the selection's time on the device, launched ahead as within a model;
``select_alone_ms`` and ``whole_ms`` hold what the host takes to launch it, too.

``--peers`` names a folder with the authors' own code, timed in the same run on the same inputs: FlexPrefill's
Triton operator (``flex_prefill_peer/flex_prefill_attention.py``) and MInference's vertical-slash kernel
(``mi/``, its CUDA index builder compiled on the spot).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_block_sparse import dense_rivals, has_fa4, milliseconds
from inputs import load_inputs
from torch import Tensor

from sparseland.machine import circumstances
from sparseland.method import AttentionInputs, LayerShape, PrefillMethod, method_class, method_slugs
from sparseland.ops.attend import attend
from sparseland.patterns import IntervalPattern

PEER_GAMMA, PEER_TAU, PEER_MINIMUM = 0.95, 0.1, 1024


def dense(x: AttentionInputs) -> tuple[dict[str, float], Tensor, Tensor]:
    """Milliseconds of each dense rival, and dense output and log-sum-exp."""
    from sparseland.patterns import WindowPattern

    q, k, v = x.q, x.k, x.v
    rivals = dense_rivals([q, k, v, torch.randn_like(q)], backward=False)
    times = {name: float(t["forward"]) for name, t in rivals.items() if "forward" in t}
    if has_fa4():
        from flash_attn.cute import interface

        turned = [t.transpose(1, 2) for t in (q, k, v)]
        out, lse = interface._flash_attn_fwd(*turned, causal=True, return_lse=True)[:2]
        return times, out.transpose(1, 2), lse
    out, lse = attend(q, k, v, WindowPattern.dense(q.shape[2], k.shape[2]), scale=x.scale, return_lse=True)
    return times, out, lse


def ready(method: PrefillMethod, x: AttentionInputs) -> AttentionInputs:
    """The inputs with the method's own parameters, as a new model has them."""
    from dataclasses import replace

    shape = LayerShape(x.layer, x.n_layers or 1, x.q.shape[1], x.k.shape[1], x.q.shape[3])
    torch.manual_seed(0)
    learner = method.new_learner(shape)
    return x if learner is None else replace(x, learner=learner.to(x.q.device))


@torch.no_grad()
def measure(
    method: PrefillMethod, x: AttentionInputs, dense_out: Tensor, dense_lse: Tensor
) -> dict[str, Any]:
    """One method on one layer."""
    x = ready(method, x)
    pattern = method.pattern(x)
    out, lse = attend(x.q, x.k, x.v, pattern, scale=x.scale, return_lse=True)
    # A bias moves the logits: what is kept is then no share of dense's mass.
    biased = isinstance(pattern, IntervalPattern) and pattern.bias is not None
    recall = None if biased else float((lse - dense_lse).float().exp().mean())
    error = float((out.float() - dense_out.float()).norm() / dense_out.float().norm())
    del out, lse
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    select = milliseconds(lambda: method.pattern(x), 0.1, queued=True)
    peak = torch.cuda.max_memory_allocated() - before
    alone = milliseconds(lambda: method.pattern(x), 0.05)
    compute = milliseconds(lambda: attend(x.q, x.k, x.v, pattern, scale=x.scale), 0.15)
    whole = milliseconds(lambda: attend(x.q, x.k, x.v, method.pattern(x), scale=x.scale), 0.15)
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.pattern(x)
        synchronises = False
    except RuntimeError:
        synchronises = True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {
        "layer": x.layer, "density": float(pattern.density().mean()), "recall": recall, "error": error,
        "select_ms": select, "select_alone_ms": alone, "attend_ms": compute, "whole_ms": whole,
        "selection_mb": peak / 1e6, "synchronises": synchronises,
    }  # fmt: skip


def peers(folder: Path, x: AttentionInputs) -> dict[str, Callable[[], Any]]:
    """The authors' operators on the same inputs."""
    sys.path.insert(0, str(folder))
    found: dict[str, Callable[[], Any]] = {}
    try:
        from flex_prefill_peer import flex_prefill_attention as official

        turned = [t.transpose(1, 2).contiguous() for t in (x.q, x.k, x.v)]
        found["flexprefill (authors')"] = lambda: official.flex_prefill_attention(
            *turned, PEER_GAMMA, PEER_TAU, PEER_MINIMUM, softmax_scale=x.scale, block_size=128
        )
    except Exception:
        traceback.print_exc()
    try:
        from mi.ops import pit

        from sparseland.ops.block_scores import probe_vertical_slash

        vertical, slash = probe_vertical_slash(x.q, x.k, 64, x.scale)
        n = x.k.shape[2]
        v_idx = vertical.topk(1000, -1).indices
        s_idx = slash.topk(6096, -1).indices
        group = x.group
        heads = [t.repeat_interleave(group, 1).contiguous() for t in (x.k, x.v)]
        assert int(s_idx.max()) < n
        found["minference kernel (authors')"] = lambda: pit.vertical_slash_sparse_attention(
            x.q, *heads, v_idx, s_idx
        )
    except Exception:
        traceback.print_exc()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--shapes", default="smollm2,llama-8b")
    parser.add_argument("--layers", default="1,15,28")
    parser.add_argument("--methods", default="")
    parser.add_argument("--peers", type=Path)
    options = parser.parse_args()
    layers = tuple(int(n) for n in options.layers.split(","))
    slugs = options.methods.split(",") if options.methods else method_slugs()
    started = time.time()
    result: dict[str, Any] = {
        **circumstances("python " + " ".join(sys.argv)),
        "inputs": "SmolLM2-135M on the standard library's sources, YaRN beyond 8192 (benchmarks/inputs.py)",
        "rows": [],
    }
    for shape in options.shapes.split(","):
        for length in (int(n) for n in options.lengths.split(",")):
            inputs = load_inputs(length, shape, layers)
            known = [dense(x) for x in inputs]
            times = {name: sum(t[0][name] for t in known) / len(known) for name in known[0][0]}
            rival = "fa4" if "fa4" in times else min(times, key=lambda n: times[n])
            print(f"\n{shape} {length}: dense " + ", ".join(f"{n} {t:.2f} ms" for n, t in times.items()))
            base = {
                "shape": shape,
                "length": length,
                "dense": rival,
                "dense_ms": times[rival],
                "dense_times": times,
            }
            if options.peers:
                for name, call in peers(options.peers, inputs[0]).items():
                    try:
                        ms = milliseconds(call, 0.2)
                        result["rows"].append(
                            {**base, "method": name, "layer": inputs[0].layer, "whole_ms": ms}
                        )
                        print(f"  {name:32s} whole {ms:8.2f} ms ({times[rival] / ms:.2f}x)", flush=True)
                    except Exception as problem:
                        result["rows"].append({**base, "method": name, "failed": str(problem)[:300]})
                        print(f"  {name:32s} failed: {str(problem)[:200]}", flush=True)
            for slug in slugs:
                cls = method_class(slug)
                if not issubclass(cls, PrefillMethod) or slug in ("dense", "oracle"):
                    continue
                settings = [cls.at_density(0.1, length)] if cls.card.control else [cls()]
                if slug == "flexprefill":
                    settings.append(cls(gamma=PEER_GAMMA, tau=PEER_TAU, min_budget=PEER_MINIMUM))
                    settings.append(cls(gamma=PEER_GAMMA, tau=1.0, min_budget=PEER_MINIMUM, neighbours=1))
                for method in settings:
                    row: dict[str, Any] = {**base, "slug": slug, "method": method.spec}
                    try:
                        found = [
                            partial(measure, method, x, *k[1:])() for x, k in zip(inputs, known, strict=True)
                        ]
                        mean = {
                            name: sum(f[name] for f in found) / len(found)
                            for name in found[0]
                            if isinstance(found[0][name], float)
                        }
                        row |= mean | {"layers": found, "synchronises": any(f["synchronises"] for f in found)}
                        row["speedup"] = times[rival] / mean["whole_ms"]
                        row["select_share"] = mean["select_ms"] / times[rival]
                        row["of_ideal"] = mean["density"] * times[rival] / mean["attend_ms"]
                        print(
                            f"  {method.spec:44s} density {row['density']:.4f} "
                            f"recall {row.get('recall', math.nan):.3f} "
                            f"error {row['error']:.3f} "
                            f"select {row['select_ms']:8.3f} ({row['select_share']:.1%}) "
                            f"attend {row['attend_ms']:8.3f} ({row['of_ideal']:.2f} of ideal) "
                            f"whole {row['whole_ms']:8.3f} ({row['speedup']:.2f}x)"
                            f"{' SYNC' if row['synchronises'] else ''}",
                            flush=True,
                        )
                    except Exception as problem:
                        row["failed"] = f"{type(problem).__name__}: {str(problem)[:300]}"
                        print(f"  {method.spec:44s} failed: {row['failed'][:250]}", flush=True)
                        torch.cuda.empty_cache()
                    result["rows"].append(row)
                    options.out.write_text(json.dumps(result, indent=1))
            del inputs, known
            torch.cuda.empty_cache()
    result["seconds"] = time.time() - started
    options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
