"""A results file as a real run writes it, for the tests: plausible shapes, awkward names, every kind."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

LAYERS, HEADS, BINS = 30, 9, 64

LONG_NAME = "flexprefill:gamma=0.7,min_budget=256"
METHODS = {
    "minference": ["minference", "minference:budget=1/4", "minference:budget=1/8"],
    "flexprefill": ["flexprefill:gamma=0.95", "flexprefill", "flexprefill:gamma=0.8", LONG_NAME],
    "double-sparsity": ["double-sparsity:budget=1/4", "double-sparsity", "double-sparsity:budget=1/32"],
    "mustafar": ["mustafar:sparsity=0.5", "mustafar:sparsity=0.7"],
    "r-sparse": ["r-sparse:sparsity=0.4", "r-sparse:sparsity=0.5"],
}  # fmt: skip


def rows(length: int, rng: random.Random) -> list[dict[str, Any]]:
    """Measurements at one length."""
    dense_s, dense_ms = 4.4 * (length / 4096) ** 1.5, 21 + length / 1000
    cache = length * 2 * LAYERS * 3 * 64 * 4

    def row(recipe: list[str], role: str, **changes: Any) -> dict[str, Any]:
        base = {
            "kind": "measurement", "recipe": recipe, "label": " + ".join(recipe) or "dense", "role": role,
            "length": length, "stage": "full", "status": "ok", "reason": None, "density": None,
            "decode_density": None, "neuron_density": 1.0, "loss": 2.713,
            "decode_loss": 2.69, "dense_loss": 2.713,
            "dense_decode_loss": 2.69, "kl": 0.0, "top1": 1.0, "prefill_s": dense_s * rng.uniform(0.99, 1.02),
            "dense_prefill_s": dense_s, "decode_ms": dense_ms * rng.uniform(0.99, 1.02),
            "dense_decode_ms": dense_ms, "cache_bytes": cache, "dense_cache_bytes": cache,
            "head_density": None, "windows": 1, "tail_tokens": 512, "decode_tokens": 64, "seconds": 12.5,
        }  # fmt: skip
        return base | changes

    out = [row([], "dense", density=1.0, decode_density=1.0, prefill_s=dense_s, decode_ms=dense_ms)]

    def prompt(density: float, harm: float, overhead: float = 0.04) -> dict[str, Any]:
        heads = [
            [min(1, max(0.01, density * math.exp(rng.gauss(0, 0.5)))) for _ in range(HEADS)]
            for _ in range(LAYERS)
        ]
        change = harm * (1 - density) ** 3 / density * rng.uniform(0.8, 1.2)
        return {
            "density": density, "loss": 2.713 * (1 + change), "decode_loss": 2.69 * (1 + 0.8 * change),
            "kl": 3 * change, "top1": max(0.2, 1 - 2 * math.sqrt(change) / 3), "head_density": heads,
            "prefill_s": dense_s * (0.55 + 0.45 * density + overhead),
        }  # fmt: skip

    for i, spec in enumerate(METHODS["minference"]):
        out.append(row([spec], "method", **prompt((0.5, 0.28, 0.17)[i], 0.004)))
    for i, spec in enumerate(METHODS["flexprefill"]):
        out.append(
            row(
                [spec],
                "method",
                **prompt((0.45, 0.3, 0.2, 0.13)[i], 0.002),
                stage="screen" if i == 3 else "full",
            )
        )
    for i, spec in enumerate(METHODS["double-sparsity"]):
        d = (0.25, 1 / 16, 1 / 32)[i]
        out.append(
            row(
                [spec],
                "method",
                density=1.0,
                decode_density=d,
                decode_loss=2.69 * (1 + 0.001 / d / 3),
                decode_ms=dense_ms * (0.8 + 0.2 * d),
            )
        )
    for i, spec in enumerate(METHODS["mustafar"]):
        s = (0.5, 0.7)[i]
        out.append(
            row(
                [spec],
                "method",
                density=1.0,
                decode_density=1.0,
                decode_loss=2.69 * (1 + 0.006 * s),
                cache_bytes=int(cache * (1.12 - s)),
                decode_ms=dense_ms * 1.1,
            )
        )
    for i, spec in enumerate(METHODS["r-sparse"]):
        out.append(
            row(
                [spec],
                "method",
                density=1.0,
                decode_density=1.0,
                neuron_density=0.6 - 0.1 * i,
                loss=2.713 * (1.01 + 0.02 * i),
                decode_loss=2.69 * (1.01 + 0.02 * i),
                kl=0.03,
                top1=0.93,
                prefill_s=dense_s * 1.03,
                decode_ms=dense_ms * (0.75 - 0.05 * i),
            )
        )
    for spec, d, harm in (
        ("streaming:window=512", 0.24, 0.08),
        ("random-blocks:density=0.25", 0.25, 0.25),
        ("oracle:budget=0.25", 0.25, 0.0004),
    ):
        slow = 9.0 if spec.startswith("oracle") else 0.02
        out.append(row([spec], "control", **prompt(d, harm, slow)))
    winner = ["flexprefill", "double-sparsity", "mustafar:sparsity=0.5", "r-sparse:sparsity=0.4"]
    out.append(
        row(
            winner,
            "composition",
            **prompt(0.3, 0.0019, 0.0),
            decode_density=1 / 16,
            decode_ms=dense_ms * 0.66,
            cache_bytes=int(cache * 0.62),
        )
    )
    out.append(
        row(
            ["flexprefill", "double-sparsity"],
            "composition",
            **prompt(0.3, 0.002),
            decode_density=1 / 16,
            decode_ms=dense_ms * 0.81,
        )
    )
    out.append(
        row(
            ["minference:budget=1/2"],
            "method",
            status="failed",
            reason="out of memory: <script>alert(1)</script> & 3 GB wanted",
            **dict.fromkeys(("loss", "decode_loss", "kl", "top1", "prefill_s", "decode_ms", "cache_bytes")),
        )
    )
    return out


def write_sample(path: Path, lengths: tuple[int, ...] = (2048, 4096), *, finished: bool = True) -> Path:
    """Write the sample; ``finished=False`` stops in the middle of a line."""
    rng = random.Random(0)
    winner = ["flexprefill", "double-sparsity", "mustafar:sparsity=0.5", "r-sparse:sparsity=0.4"]
    lines: list[dict[str, Any]] = [
        {
            "kind": "run", "schema": 1, "date": "2026-02-03T10:11:12+00:00", "lengths": list(lengths),
            "command": "sparseland frontier --text 'my <b>notes</b> & drafts' --lengths 2048,4096",
            "machine": {"cpu": "Example CPU @ 2.6 GHz", "cores": 2, "memory_gb": 15.6, "gpu": None,
                        "os": "Linux 6.1"},
            "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0",
                         "sparseland": "0.1.0"},
            "model": {"name": "SmolLM2-135M-Instruct", "parameters": 134515008, "layers": LAYERS,
                      "heads": HEADS, "kv_heads": 3, "head_dim": 64, "dtype": "float32"},
            "text": {"name": "my <b>notes</b> & drafts", "tokens": 151234}, "tolerance": 0.01, "threads": 2,
        },
        {"kind": "weather", "sunny": True},
    ]  # fmt: skip
    for length in lengths:
        lines += rows(length, rng)
        lines.append(
            {
                "kind": "drift",
                "length": length,
                "before_s": 4.4,
                "after_s": 4.4 * (1.012 if length < 4096 else 1.08),
            }
        )
        for depth in (0.0, 0.25, 0.5, 0.75, 1.0):
            for recipe, p in (([], 0.95), (winner, 0.85), (["flexprefill:gamma=0.8"], 0.7)):
                for _ in range(3):
                    lines.append(
                        {
                            "kind": "task",
                            "recipe": recipe,
                            "task": "needle",
                            "length": length,
                            "depth": depth,
                            "correct": rng.random() < p,
                        }
                    )
    for layer, head in ((2, 0), (9, 4), (15, 7), (28, 3)):
        lines.append(attention_map(winner, lengths[-1], layer, head, rng))
    lines.append(
        {
            "kind": "choice",
            "recipe": winner,
            "length": lengths[-1],
            "reason": "fastest within 1.0% of dense's loss: a request takes 5.13 s, dense 7.61 s",
            "recipe_file": "recipe.json",
        }
    )
    lines += inspections(4096)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text if finished else text[: text.rindex('{"kind": "map"') + 40], encoding="utf-8")
    return path


def inspections(length: int) -> list[dict[str, Any]]:
    """Recall and the split of attention time of two methods' settings."""
    numbers = {
        "flexprefill:gamma=0.95": (0.45, 0.97, 0.2, 1.1), "flexprefill": (0.3, 0.93, 0.2, 0.8),
        "minference": (0.5, 0.95, 0.4, 1.4), "minference:budget=1/4": (0.28, 0.84, 0.4, 0.9),
    }  # fmt: skip
    return [
        {
            "kind": "inspection", "recipe": [spec], "length": length, "density": density, "recall": recall,
            "select_s": select, "attend_s": attend,
        }
        for spec, (density, recall, select, attend) in numbers.items()
    ]  # fmt: skip


def attention_map(
    recipe: list[str], length: int, layer: int, head: int, rng: random.Random
) -> dict[str, Any]:
    """Sinks, a local band, a few verticals; blocks and single columns computed."""
    stripes = [rng.randrange(4, BINS - 4) for _ in range(3)]
    mass = [[0.0] * BINS for _ in range(BINS)]
    computed = [[0.0] * BINS for _ in range(BINS)]
    for i in range(BINS):
        for j in range(i + 1):
            mass[i][j] = (
                1e-4 * rng.random() + 0.3 * (j == 0) + 0.4 * math.exp(-(i - j) / 1.5) + 0.05 * (j in stripes)
            )
            near = i // 4 - j // 4 <= 1 or j < 4 or (i // 4 * 7 + j // 4 * 3 + head) % 19 == 0
            computed[i][j] = 1.0 if near else (1 / 64 if j in stripes else 0.0)
        total = sum(mass[i])
        mass[i] = [m / total for m in mass[i]]
    return {
        "kind": "map",
        "recipe": recipe,
        "length": length,
        "layer": layer,
        "head": head,
        "mass": mass,
        "computed": computed,
    }


if __name__ == "__main__":
    import sys

    write_sample(Path(sys.argv[1]))
