"""What selection costs on a GPU: every prefill method's pattern(), apart from the attention it selects for.

    PYTHONPATH=src python benchmarks/gpu_selection.py --out FILE.json [--lengths 32768,131072] [--kernels]

Inputs are those of :mod:`inputs` (a real model reading real text), or a file: ``.pt`` with a list of
dictionaries ``q, k, v, scale, layer``, or ``.safetensors`` with ``q.<layer>, k.<layer>, v.<layer>``. Each
method runs at the first setting of its grid for the length. ``select_ms`` is the device's time between two
events (median, warm), ``wall_ms`` what a caller waits for who needs the result at once, launches included.
Dense is the fastest rival there is; shares are of its time.
``synchronises`` says whether pattern() waits for the device; ``--kernels`` lists where the time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_block_sparse import dense_rivals, milliseconds

from sparseland.errors import SparselandError
from sparseland.machine import circumstances
from sparseland.method import AttentionInputs, LayerShape, PrefillMethod, method_class, method_slugs
from sparseland.ops.attend import attend

# What needs no selection, or all of attention for it.
LEFT_OUT = ("dense", "oracle")


def from_file(path: Path) -> list[AttentionInputs]:
    """Captured inputs, on the GPU in bfloat16."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors = load_file(path)
        layers = sorted({int(name.partition(".")[2]) for name in tensors})
        rows = [{"layer": i, **{n: tensors[f"{n}.{i}"] for n in "qkv"}} for i in layers]
    else:
        rows = torch.load(path, map_location="cpu", weights_only=True)
    found = []
    for row in rows:
        q, k, v = (row[n].to("cuda", torch.bfloat16) for n in "qkv")
        found.append(AttentionInputs(q, k, v, row.get("scale", q.shape[-1] ** -0.5), row["layer"]))
    return found


def ready(method: PrefillMethod, x: AttentionInputs) -> AttentionInputs:
    """The inputs with the method's own parameters, as a new model has them."""
    shape = LayerShape(x.layer, x.n_layers or 1, x.q.shape[1], x.k.shape[1], x.q.shape[3])
    torch.manual_seed(0)
    learner = method.new_learner(shape)
    return x if learner is None else replace(x, learner=learner.to(x.q.device, x.q.dtype))


def wall_milliseconds(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median time until the result is there."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def synchronises(run: Callable[[], Any]) -> bool:
    """Whether the call waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as problem:
        if "synchroniz" not in str(problem):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def kernels(run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The device time of one call, kernel by kernel, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as measured:
        run()
        torch.cuda.synchronize()
    rows = [
        {"kernel": event.key[:100], "calls": event.count, "us": event.self_device_time_total}
        for event in measured.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row["us"])


@torch.no_grad()
def measure(method: PrefillMethod, x: AttentionInputs, by_kernel: bool) -> dict[str, Any]:
    """One method on one layer."""
    x = ready(method, x)
    pattern = method.pattern(x)

    def select() -> Any:
        return method.pattern(x)

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    row = {
        "layer": x.layer,
        "density": float(pattern.density().mean()),
        "select_ms": milliseconds(select, 0.1),
        "wall_ms": wall_milliseconds(select),
        "selection_mb": (torch.cuda.max_memory_allocated() - before) / 1e6,
        "pairs_ms": milliseconds(pattern.pairs, 0.05),
        "attend_ms": milliseconds(lambda: attend(x.q, x.k, x.v, pattern, scale=x.scale), 0.15),
        "synchronises": synchronises(select),
    }
    return {**row, "kernels": kernels(select)} if by_kernel else row


def measured(cls: type[PrefillMethod], inputs: list[AttentionInputs], by_kernel: bool) -> dict[str, Any]:
    """The means over layers, or why there are none."""
    method = cls.grid(inputs[0].k.shape[2])[0]
    try:
        rows = [measure(method, x, by_kernel) for x in inputs]
    except SparselandError as reason:
        return {"method": method.spec, "skipped": str(reason)}
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as problem:
        torch.cuda.empty_cache()
        return {"method": method.spec, "failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
    numbers = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {
        "method": method.spec,
        **{name: statistics.fmean(row[name] for row in rows) for name in numbers},
        "synchronises": any(row["synchronises"] for row in rows),
        "layers": rows,
    }


def report(row: dict[str, Any]) -> None:
    """One line, and the kernels where they were asked for."""
    name = f"  {row['method']:52s}"
    for reason in ("skipped", "failed"):
        if reason in row:
            print(f"{name} {reason}: {row[reason]}", flush=True)
            return
    print(
        f"{name} density {row['density']:.4f}  select {row['select_ms']:7.3f} ms ({row['share']:.1%})  "
        f"wall {row['wall_ms']:7.3f}  pairs {row['pairs_ms']:6.3f}  attend {row['attend_ms']:8.3f}  "
        f"{row['selection_mb']:8.1f} MB{'  SYNCHRONISES' if row['synchronises'] else ''}",
        flush=True,
    )
    for kernel in row["layers"][0].get("kernels", [])[:16]:
        print(f"      {kernel['us']:9.1f} us  {kernel['calls']:3d} x {kernel['kernel']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", default="32768,131072")
    parser.add_argument("--shapes", default="smollm2", help="smollm2, llama-8b")
    parser.add_argument("--inputs", type=Path, help="captured inputs, instead of lengths and shapes")
    parser.add_argument("--methods", default="", help="slugs; default: all that act on prompts")
    parser.add_argument("--kernels", action="store_true", help="profile each selection")
    options = parser.parse_args()

    def cases() -> Any:
        if options.inputs:
            yield options.inputs.name, from_file(options.inputs)
            return
        from inputs import load_inputs

        for shape in options.shapes.split(","):
            for length in options.lengths.split(","):
                yield shape, load_inputs(int(length), shape)

    result: dict[str, Any] = {**circumstances("python " + " ".join(sys.argv)), "rows": []}
    slugs = options.methods.split(",") if options.methods else method_slugs()
    for name, inputs in cases():
        x = inputs[0]
        n = x.k.shape[2]
        rivals = dense_rivals([x.q, x.k, x.v, torch.randn_like(x.q)], backward=False)
        dense = min(float(times["forward"]) for times in rivals.values() if "forward" in times)
        heads = f"{x.q.shape[1]} query and {x.k.shape[1]} key heads of {x.q.shape[3]}"
        print(f"\n{name}, {n} tokens, {heads}: dense {dense:.2f} ms", flush=True)
        for slug in slugs:
            cls = method_class(slug)
            if not issubclass(cls, PrefillMethod) or slug in LEFT_OUT:
                continue
            row = {"inputs": name, "length": n, "heads": heads, "dense_ms": dense, "slug": slug}
            row |= measured(cls, inputs, options.kernels)
            if "select_ms" in row:
                row["share"] = row["select_ms"] / dense
            report(row)
            result["rows"].append(row)
            options.out.write_text(json.dumps(result, indent=1))
        del inputs, x


if __name__ == "__main__":
    main()
