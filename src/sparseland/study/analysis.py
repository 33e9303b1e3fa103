"""What the study's rows say: which compression keeps the accuracy, which unit is best for what, the law.

Only tasks that the dense model can do count: at least half of its samples right, by greedy decoding or by
choosing, and then more than chance explains. The others are shown, since leaving them out silently would hide
what was tried; nothing is tested on them. What is tested at one model and length is corrected together.

Units are compared at equal *measured* compression: a setting that was asked for 16x may well compute a fifth.
A unit's score between two measured compressions is read off the line between them, over the logarithm of the
compression and from dense (1x) on; beyond its last one nothing is said.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from sparseland.attention.sparse_frontier import SparseFrontier
from sparseland.errors import SparselandError
from sparseland.laws._flops import ModelShape, decode_bytes, decode_flops, prefill_flops
from sparseland.laws._statistics import bootstrap_interval, smallest_bound, smallest_p
from sparseland.laws.sparse_frontier import (
    ALPHA,
    MARGIN,
    TEST,
    Comparison,
    Law,
    Point,
    compare,
    front,
    grouped,
    hold_out,
    largest_safe,
)
from sparseland.method import parse_spec
from sparseland.tasks import countable

Row = dict[str, Any]
# (measured compression, score), ascending.
Curve = list[tuple[float, float]]

# What a sample's score may be: the geometric mean probability of the right answer's tokens, or right/wrong.
SCORES = ("likelihood", "chosen", "generated")
# So many samples make the link's correction vanish where scores are graded.
_GRADED = 10**6


def sample_scores(row: Row, score: str) -> list[float]:
    """One number in [0, 1] per sample of a cell."""
    if score == "likelihood":
        return [math.exp(-nats) for nats in row["nats"]]
    return [float(right) for right in row[score]]


def summary(rows: Sequence[Row], score: str = "likelihood") -> dict[str, Any]:
    """All analyses of a study, JSON-able.

    Args:
        rows: of ``results.jsonl``.
        score: one of :data:`SCORES`.

    Raises:
        SparselandError: there is no such score.
    """
    if score not in SCORES:
        raise SparselandError(f"score={score} is not allowed; it must be one of {', '.join(SCORES)}")
    cells = _cells(rows, score)
    counted = [c for c in cells if c["counts"]]
    return {
        "score": score,
        "test": (
            f"{TEST} over the tasks that count at a model and length; intervals: paired bootstrap, 95 %; "
            f"a loss above {MARGIN:g} is ruled out by Gaffke's upper bound, 95 %"
        ),
        "models": [{k: v for k, v in r.items() if k != "kind"} for r in rows if r["kind"] == "model"],
        "cells": [{k: v for k, v in c.items() if k not in ("scores", "dense_scores")} for c in cells],
        "dense": [
            {k: c[k] for k in ("model", "task", "length", "score", "chosen", "generated", "chance", "counts")}
            for c in cells
            if c["unit"] == "dense"
        ],
        "failed": [r for r in rows if r["kind"] == "cell" and r["status"] != "ok"],
        "safe": _safe(counted),
        "ranking": _ranking(counted),
        "isoflops": _isoflops(counted, rows),
        "law": _law(counted, rows, score),
    }


def _cells(rows: Sequence[Row], score: str) -> list[Row]:
    """Measured cells with their scores, whether their task counts, and then what they lose against dense."""
    cells = _distinct([r for r in rows if r["kind"] == "cell" and r["status"] == "ok"])
    if score != "likelihood":
        cells = [c for c in cells if c[score]]
    dense = {(c["model"], c["task"], c["length"]): c for c in cells if c["unit"] == "dense"}
    made: list[Row] = []
    for c in cells:
        reference = dense.get((c["model"], c["task"], c["length"]))
        if reference is None or len(reference["nats"]) != len(c["nats"]):
            continue
        values = sample_scores(c, score)
        low, high = bootstrap_interval(values)
        names = ("model", "task", "length", "unit", "phase", "compression", "density", "spec")
        made.append(
            {
                **{name: c[name] for name in names},
                "measured": 1 / c["density"],
                "samples": len(values),
                "score": statistics.fmean(values),
                "interval": [low, high],
                "chosen": statistics.fmean(c["chosen"]) if c["chosen"] else None,
                "generated": statistics.fmean(c["generated"]) if c["generated"] else None,
                "chance": 1 / c["offered"],
                "counts": can_do(reference),
                "scores": values,
                "dense_scores": sample_scores(reference, score),
            }
        )
    sparse_counted = [c for c in made if c["unit"] != "dense" and c["counts"]]
    for sparse in grouped(sparse_counted, "model", "length").values():
        found = compare([(c["scores"], c["dense_scores"]) for c in sparse])
        for c, comparison in zip(sparse, found, strict=True):
            c["comparison"] = asdict(comparison)
    return made


def _distinct(cells: Sequence[Row]) -> list[Row]:
    """One cell per setting: where a unit can't be sparser, two nominal compressions come to the same spec."""
    settings = grouped(cells, "model", "task", "length", "unit", "spec")
    return [same[0] for same in settings.values()]


def can_do(dense: Row) -> bool:
    """Whether the dense model gets half of a task right, and not by chance where it only had to choose."""
    if not dense["chosen"]:
        return countable(dense["generated"])
    right, samples, chance = sum(dense["chosen"]), len(dense["chosen"]), 1 / dense["offered"]
    by_chance = sum(
        math.comb(samples, n) * chance**n * (1 - chance) ** (samples - n) for n in range(right, samples + 1)
    )
    return (countable(dense["chosen"]) and by_chance <= ALPHA) or countable(dense["generated"])


# ----------------------------------------------------------------- safe budgets


def _safe(cells: Sequence[Row]) -> list[Row]:
    """Per model, length and unit: the largest compression without significant loss.

    On the mean of all tasks that count (their samples together), on the worst of them, and the largest at
    which a loss above the margin is ruled out on the mean.
    """
    sparse = [c for c in cells if c["unit"] != "dense"]
    found = []
    for (model, length), group in grouped(sparse, "model", "length").items():
        settings = grouped(group, "unit", "spec")
        pooled = compare([(_all(g, "scores"), _all(g, "dense_scores")) for g in settings.values()])
        by_unit: dict[str, list[tuple[float, Comparison]]] = {}
        for ((unit, _), g), comparison in zip(settings.items(), pooled, strict=True):
            measured = statistics.harmonic_mean([c["measured"] for c in g])
            by_unit.setdefault(unit, []).append((measured, comparison))
        for unit, comparisons in by_unit.items():
            tasks = grouped([c for c in group if c["unit"] == unit], "task")
            worst = {
                task: largest_safe((c["measured"], Comparison(**c["comparison"])) for c in own)
                for (task,), own in tasks.items()
            }
            least = min(worst, key=lambda t: worst[t])
            ruled_out = largest_safe(comparisons, within=True)
            samples = min(
                sum(c["samples"] for c in g) for (own_unit, _), g in settings.items() if own_unit == unit
            )
            found.append(
                {
                    "model": model,
                    "length": length,
                    "unit": unit,
                    "phase": next(c["phase"] for c in group if c["unit"] == unit),
                    "tried": max(c for c, _ in comparisons),
                    "mean": largest_safe(comparisons),
                    "ruled_out": ruled_out,
                    "worst": worst[least],
                    "worst_task": least,
                    # With too few samples no loss can be significant, and everything would pass as safe.
                    "mean_can_tell": _can_tell(samples, len(settings)),
                    "worst_can_tell": _can_tell(min(c["samples"] for c in group), len(group)),
                    # Nor can one be ruled out, but where samples gained.
                    "ruled_out_can_tell": ruled_out > 1 or smallest_bound(samples, ALPHA) < MARGIN,
                    "losses": [
                        {"compression": m, **asdict(c)} for m, c in sorted(comparisons, key=lambda x: x[0])
                    ],
                }
            )
    return found


def _can_tell(samples: int, comparisons: int) -> bool:
    """Whether a loss in every sample would be significant among so many comparisons."""
    return comparisons * smallest_p(samples, comparisons, ALPHA) <= ALPHA


def _all(cells: Sequence[Row], name: str) -> list[float]:
    """The samples of several cells."""
    return [score for c in cells for score in c[name]]


# --------------------------------------------------------------------- ranking


def curves(cells: Iterable[Row]) -> dict[tuple[str, str, int, str], Curve]:
    """Model, task, length and unit -> score against measured compression, from dense on."""
    found: dict[tuple[str, str, int, str], Curve] = {}
    for (model, task, length), group in grouped(cells, "model", "task", "length").items():
        by_unit = grouped(group, "unit")
        dense = [(1.0, c["score"]) for c in by_unit.pop(("dense",), [])]
        for (unit,), own in by_unit.items():
            points = sorted((max(1.0, c["measured"]), c["score"]) for c in own)
            found[model, task, length, unit] = [*dense, *points]
    return found


def score_at(curve: Curve, compression: float) -> float:
    """A unit's score at a compression that it reaches, between the measured ones."""
    measured, scores = zip(*curve, strict=True)
    return float(np.interp(math.log(compression), np.log(measured), scores))


def _ranking(cells: Sequence[Row]) -> list[Row]:
    """Per task, phase, length and compression: units by score, the mean over models.

    The compressions are those that were asked for, as far as every unit goes; compared are the models on
    which every unit was measured.
    """
    found = []
    own = curves(cells)
    sparse = [c for c in cells if c["unit"] != "dense"]
    for (task, phase, length), group in grouped(sparse, "task", "phase", "length").items():
        units = list(dict.fromkeys(c["unit"] for c in group))
        models = [
            model
            for model in dict.fromkeys(c["model"] for c in group)
            if all((model, task, length, unit) in own for unit in units)
        ]
        if not models:
            continue
        last = min(own[model, task, length, unit][-1][0] for model in models for unit in units)
        for compression in sorted({min(c["compression"], last) for c in group} - {1.0}):
            ranked = [
                {
                    "unit": unit,
                    "score": statistics.fmean(
                        score_at(own[model, task, length, unit], compression) for model in models
                    ),
                    "density": 1 / compression,
                }
                for unit in units
            ]
            ranked.sort(key=lambda r: -r["score"])
            found.append(
                {
                    "task": task,
                    "phase": phase,
                    "length": length,
                    "compression": compression,
                    "models": models,
                    "units": ranked,
                }
            )
    return found


# -------------------------------------------------------------------- isoFLOPS


def _isoflops(cells: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Cost and mean score of every setting, per phase and length; on the tasks that count for all models.

    Costs of prompts are operations; of decoding, operations and bytes per token.
    """
    shapes = _shapes(rows)
    found: list[Row] = []
    for (length,), group in grouped(cells, "length").items():
        models = {c["model"] for c in group}
        tasks = {c["task"] for c in group}
        tasks = {t for t in tasks if {c["model"] for c in group if c["task"] == t} == models}
        settings = grouped((c for c in group if c["task"] in tasks), "model", "unit", "spec")
        points: list[Row] = []
        for (model, unit, spec), g in settings.items():
            if {c["task"] for c in g} != tasks:
                continue
            density = statistics.fmean(c["density"] for c in g)
            method = None if unit == "dense" else _unit(spec)
            shape = shapes[model]
            for phase in ("prefill", "decode"):
                if unit != "dense" and g[0]["phase"] != phase:
                    continue
                cost = prefill_flops if phase == "prefill" else decode_flops
                point = {
                    "length": length,
                    "phase": phase,
                    "model": model,
                    "unit": unit,
                    "compression": g[0]["compression"],
                    "density": density,
                    "flops": cost(shape, length, density, method),
                    "score": statistics.fmean(c["score"] for c in g),
                }
                if phase == "decode":
                    point["bytes"] = decode_bytes(shape, length, density, method)  # type: ignore[arg-type]
                points.append(point)
        for phase in ("prefill", "decode"):
            own = [p for p in points if p["phase"] == phase]
            best = front(own, lambda p: p["flops"], lambda p: p["score"])
            found += [{**p, "front": any(p is b for b in best)} for p in own]
    return found


def _unit(spec: str) -> SparseFrontier:
    method = parse_spec(spec)
    assert isinstance(method, SparseFrontier)
    return method


def _shapes(rows: Iterable[Row]) -> dict[str, ModelShape]:
    names = ModelShape.__dataclass_fields__
    return {r["model"]: ModelShape(**{n: r[n] for n in names}) for r in rows if r["kind"] == "model"}


# ------------------------------------------------------------------------- law


def points_of(cells: Sequence[Row], rows: Sequence[Row], score: str) -> list[Point]:
    """The cells as points of the law."""
    shapes = _shapes(rows)
    return [
        Point(
            c["score"],
            _GRADED if score == "likelihood" else c["samples"],
            shapes[c["model"]].params,
            c["length"],
            max(1.0, c["measured"]),
            c["task"],
            c["phase"],
        )
        for c in cells
    ]


def _law(cells: Sequence[Row], rows: Sequence[Row], score: str) -> Row:
    points = points_of(cells, rows, score)
    try:
        law = Law.fit(points)
    except SparselandError as error:
        return {"coefficients": None, "reason": str(error)}
    held = [hold_out(points, axis) for axis in ("params", "length", "compression")]  # type: ignore[arg-type]
    fitted = [{"score": p.score, "expected": law.predict(p), "phase": p.phase} for p in points]
    return {
        "coefficients": law.coefficients,
        "constant": list(law.constant),
        "points": len(points),
        "r_squared": law.r_squared(points),
        "hold_out": [
            {
                "axis": h.axis,
                "from": h.value,
                "points": h.points,
                "r_squared": h.r_squared,
                "r_squared_fit": h.r_squared_fit,
                "error": h.error,
            }
            for h in held
            if h is not None
        ],
        "fitted": fitted,
    }
