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
from sparseland.study.analysis import curves, score_at, summary
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
PHASES = ("prefill", "decode")


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
    best = {phase: _best(safe, phase) for phase in PHASES}
    kept, kept_at = _kept(found["cells"])
    slopes = {p: (found["law"]["coefficients"] or {}).get(f"log compression, {p}") for p in PHASES}
    hurt = [
        c for c in found["cells"]
        if c["unit"] != "dense" and c["counts"] and c["comparison"]["verdict"] == "lost"
    ]  # fmt: skip
    least = min((c["measured"] for c in hurt), default=None)
    held = {h["axis"]: h["r_squared"] for h in found["law"].get("hold_out", [])}
    more_in_decoding = _more(best["decode"], best["prefill"])
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
            "safe_compression_prompts": best["prefill"] and best["prefill"]["mean"],
            "safe_compression_decoding": best["decode"] and best["decode"]["mean"],
            "more_in_decoding": more_in_decoding,
            "flatter_in_decoding": flatter,
            "score_kept_prompts": kept.get("prefill"),
            "score_kept_decoding": kept.get("decode"),
            "score_kept_at": kept_at,
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
        "measured": _measured(rows),
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


def _best(safe: list[dict[str, Any]], phase: str) -> dict[str, Any] | None:
    """The row of the largest safe compression, of those whose samples could tell a loss."""
    told = [r for r in safe if r["phase"] == phase and r["mean_can_tell"]]
    return max(told, key=lambda r: r["mean"], default=None)


def _more(decode: dict[str, Any] | None, prefill: dict[str, Any] | None) -> bool | None:
    """Whether more is safe in decoding; None where what was tried does not tell.

    It does not where decoding is safe as far as it was tried, and prompts are, too, or go further.
    """
    if decode is None or prefill is None:
        return None
    decode_ends, prefill_ends = (r["mean"] == r["tried"] for r in (decode, prefill))
    more = bool(decode["mean"] > prefill["mean"])
    return None if decode_ends and (prefill_ends or not more) else more


def _kept(cells: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Per phase the mean score over dense's, over its units; and the compressions at which they are compared.

    At every task and length it is the largest compression that all units of both phases reach; where one was
    not measured, none is compared.
    """
    phases = {c["unit"]: c["phase"] for c in cells if c["unit"] != "dense"}
    units: dict[str, dict[str, Any]] = {}
    for (_, task, length, unit), curve in curves(c for c in cells if c["counts"]).items():
        units.setdefault(f"{task}, {length} tokens", {})[unit] = curve
    alike = {place: own for place, own in units.items() if own.keys() == phases.keys()}
    at = {place: min(curve[-1][0] for curve in own.values()) for place, own in alike.items()}
    parts: dict[str, list[float]] = {}
    for place, own in alike.items():
        for unit, curve in own.items():
            (_, dense), *_ = curve
            parts.setdefault(phases[unit], []).append(score_at(curve, at[place]) / dense)
    return {phase: statistics.fmean(own) for phase, own in parts.items()}, at


def _law_holds(held: dict[str, float]) -> bool:
    """Whether the law tells what was held out better than its mean does, on every axis that was tried."""
    return bool(held) and all(r2 > 0 for r2 in held.values())


def _best_units(ranking: list[dict[str, Any]]) -> dict[str, str]:
    """Per task and phase the unit with the best mean rank over lengths and compressions.

    Lengths at which a unit was not measured are left out.
    """
    found = {}
    for (task, phase), group in grouped(ranking, "task", "phase").items():
        most = max(len(r["units"]) for r in group)
        places: dict[str, list[int]] = {}
        for r in group:
            if len(r["units"]) == most:
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
            "loss_ruled_out": r["ruled_out"] if r["ruled_out_can_tell"] else None,
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
                "loss_bound": comparison.get("bound"),
                "p": comparison.get("p"),
                "samples": c["samples"],
                "spec": c["spec"],
            }
        )
    return rows


def _measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The study's rows, every sample to four decimals: :func:`summary` can be asked of them again."""
    return [
        {k: [round(x, 4) for x in v] if k == "nats" else v for k, v in row.items() if k != "gold"}
        for row in rows
        if row["kind"] in ("model", "cell")
    ]


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
