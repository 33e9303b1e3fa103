"""The Sparse Frontier's claims: how sparse prompts and decoding may be, what is lost where, and its law."""

from __future__ import annotations

import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sparseland.errors import SparselandError
from sparseland.laws._flops import QWEN, equal_cost_compression
from sparseland.laws.sparse_frontier import grouped
from sparseland.study.analysis import summary
from sparseland.study.job import StudyOptions, measure

CLAIM = (
    "more sparsity is possible without significant loss in decoding than for prompts, even moderate sparsity "
    "hurts at least one task, and a log-linear law of score against length and compression holds beyond the "
    "range it was fitted on"
)
# Seconds after which a full run starts no more measurements: shorter prompts come first.
FULL_SECONDS = 400.0
# A loss that the paper would call moderate sparsity's: at most this compression.
MODERATE = 8.0


def reproduce(scale: str = "smoke", seed: int = 0) -> dict[str, Any]:
    """The study on the embedded model: units, compressions, lengths and tasks, and its analyses.

    Args:
        scale: ``smoke`` (one unit for prompts and one for decoding on short needles, CPU) or ``full`` (all
            six units at 1K to 8K tokens, on a GPU if there is one).
        seed: of the tasks.
    """
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(_options(scale, seed, Path(folder) / "study"))
    if not any(row["kind"] == "cell" and row["unit"] != "dense" for row in rows):
        raise SparselandError(f"sparse-frontier: nothing was measured within {FULL_SECONDS:g} seconds")
    found = summary(rows)
    safe = found["safe"]
    best = {
        phase: max((r["mean"] for r in safe if r["phase"] == phase), default=1.0)
        for phase in ("prefill", "decode")
    }
    kept = {phase: _kept(found["cells"], phase) for phase in best}
    slopes = {p: (found["law"]["coefficients"] or {}).get(f"log compression, {p}") for p in best}
    hurt = [
        c for c in found["cells"]
        if c["unit"] != "dense" and c["counts"] and c["comparison"]["verdict"] == "lost"
    ]  # fmt: skip
    least = min((c["measured"] for c in hurt), default=None)
    held = {h["axis"]: h["r_squared"] for h in found["law"].get("hold_out", [])}
    more_in_decoding = best["decode"] >= best["prefill"]
    falls = {phase: slope is not None and slope < 0 for phase, slope in slopes.items()}
    down, flat = slopes["prefill"], slopes["decode"]
    flatter = down is not None and flat is not None and flat > down
    hurts = least is not None and least <= MODERATE
    result: dict[str, Any] = {
        "slug": "sparse-frontier",
        "claim": CLAIM,
        "paper": {
            "models": "Qwen2.5 7B to 72B, 16K to 128K tokens, nine tasks, compression 1 to 20",
            "safe_compression": "higher in decoding than for prompts",
        },
        "ours": {
            "lengths": sorted({c["length"] for c in found["cells"]}),
            "tasks_that_count": sorted({c["task"] for c in found["cells"] if c["counts"]}),
            "tasks_that_dense_can_not_do": sorted({c["task"] for c in found["cells"] if not c["counts"]}),
            "safe_compression_prompts": best["prefill"],
            "safe_compression_decoding": best["decode"],
            "more_in_decoding": more_in_decoding,
            "flatter_in_decoding": flatter,
            "score_kept_prompts": kept["prefill"],
            "score_kept_decoding": kept["decode"],
            "law_slope_prompts": slopes["prefill"],
            "law_slope_decoding": slopes["decode"],
            "law_slope_length": (found["law"]["coefficients"] or {}).get("log length"),
            "law_r2": found["law"].get("r_squared"),
            "law_r2_held_out": held or None,
            "least_compression_that_hurts_a_task": least,
            "best_unit_per_task": _best_units(found["ranking"]),
            "test": found["test"],
        },
        "differs": (
            "one model size (SmolLM2-135M; no other weights are at hand), so that what the paper says of "
            "sizes is not tried; at most 8K tokens; likelihood of the right answer, not generated answers; "
            "tasks that the dense model can't do are left out. The rows on equal cost are arithmetic on the "
            "paper's models" + ("" if scale == "full" else ". Smoke: two units, one task, 640 tokens")
        ),
        # A single compression tells the slopes' signs and order, not what is safe.
        "holds": bool(
            falls["prefill"] and flatter
            if scale == "smoke"
            else all(falls.values()) and flatter and more_in_decoding and hurts and _law_holds(held)
        ),
        "rows": [*_safe_rows(safe), *_cell_rows(found["cells"]), *_cost_rows()],
    }
    return result


def _options(scale: str, seed: int, out: Path) -> StudyOptions:
    if scale == "smoke":
        return StudyOptions(
            units=["block", "ada-snapkv"], compressions=[8.0], lengths=[640], tasks=["needle"], samples=8,
            out=out, device="cpu", seed=seed, generate=False, choose=False,
        )  # fmt: skip
    cuda = torch.cuda.is_available()
    return StudyOptions(
        compressions=[2.0, 4.0, 8.0, 16.0],
        lengths=[1024, 4096, 8192] if cuda else [1024],
        tasks=["needle", "needle-multi-key", "retrieval", "story-retrieval"],
        samples=24 if cuda else 12,
        out=out,
        seed=seed,
        generate=False,
        choose=False,
        seconds=FULL_SECONDS if cuda else None,
    )


def _kept(cells: list[dict[str, Any]], phase: str) -> float | None:
    """Mean score over dense's at the highest compression, over the units of a phase."""
    dense = {(c["task"], c["length"]): c["score"] for c in cells if c["unit"] == "dense"}
    own = [c for c in cells if c["phase"] == phase and c["counts"]]
    if not own:
        return None
    top = max(c["compression"] for c in own)
    return statistics.fmean(
        c["score"] / dense[c["task"], c["length"]] for c in own if c["compression"] == top
    )


def _law_holds(held: dict[str, float]) -> bool:
    """Whether the law tells what was held out better than its mean does, on every axis that was tried."""
    return bool(held) and all(r2 > 0 for r2 in held.values())


def _best_units(ranking: list[dict[str, Any]]) -> dict[str, str]:
    """Per task and phase the unit with the best mean rank over compressions."""
    found = {}
    for (task, phase), group in grouped(ranking, "task", "phase").items():
        places: dict[str, list[int]] = {}
        for r in group:
            for place, unit in enumerate(r["units"]):
                places.setdefault(unit["unit"], []).append(place)
        found[f"{task}, {phase}"] = min(places, key=lambda u: statistics.fmean(places[u]))
    return found


def _safe_rows(safe: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "setting": f"{r['unit']}, {r['length']} tokens",
            "phase": r["phase"],
            "tried_to": r["tried"],
            "safe_mean": r["mean"] if r["mean_can_tell"] else None,
            "loss_ruled_out": r["ruled_out"],
            "safe_worst": r["worst"] if r["worst_can_tell"] else None,
            "worst_task": r["worst_task"],
        }
        for r in safe
    ]


def _cell_rows(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for c in cells:
        comparison = c.get("comparison", {})
        low, high = comparison.get("interval", (None, None))
        rows.append(
            {
                "setting": f"{c['unit']}, {c['length']} tokens",
                "task": c["task"],
                "counts": c["counts"],
                "compression": c["measured"],
                "score": c["score"],
                "loss": comparison.get("loss"),
                "loss_low": low,
                "loss_high": high,
                "p": comparison.get("p"),
                "samples": c["samples"],
                "spec": c["spec"],
            }
        )
    return rows


def _cost_rows() -> list[dict[str, Any]]:
    """The compression at which the paper's larger models cost what the next smaller one costs densely."""
    return [
        {
            "setting": f"{large} at the cost of dense {small}, {length} tokens",
            "compression": equal_cost_compression(QWEN[large], QWEN[small], length),
        }
        for small, large in pairwise(QWEN)
        for length in (16_384, 65_536, 131_072, 524_288)
    ]
