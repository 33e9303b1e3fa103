"""Where the numbers of the page come from: machine, versions, what each number means, drift."""

from __future__ import annotations

import datetime
from typing import Any

from sparseland.report.pareto import number, ratio
from sparseland.report.results import Results
from sparseland.report.words import percent, significant

DRIFT_TO_MENTION = 0.05


def drifts(results: Results) -> list[dict[str, Any]]:
    """The dense model's times before and after the measurements, of a prompt and of a decoded token."""
    out = []
    for drift in results.drifts:
        for what, before, after, unit in (
            ("prompt", "before_s", "after_s", " s"),
            ("decoding", "before_decode_ms", "after_decode_ms", " ms"),
        ):
            change = ratio(drift, after, before)
            if change is None:
                continue
            out.append(
                {
                    "length": drift.get("length"),
                    "what": what,
                    "before": significant(number(drift, before), unit),
                    "after": significant(number(drift, after), unit),
                    "change": percent(change - 1),
                    "large": abs(change - 1) > DRIFT_TO_MENTION,
                }
            )
    return out


def facts(results: Results) -> list[tuple[str, str]]:
    """Machine, versions, model and text."""
    run = results.run
    machine, versions, model, text = (run.get(k) or {} for k in ("machine", "versions", "model", "text"))
    heads = f"{model.get('heads')} query and {model.get('kv_heads')} key heads of {model.get('head_dim')}"
    tolerance = number(run, "tolerance")
    found = [
        ("date", "; resumed ".join(_date(r.get("date")) for r in results.runs)),
        (
            "processor",
            _words(
                machine.get("cpu"), _count(machine, "cores", "cores"), _count(run, "threads", "threads used")
            ),
        ),
        ("memory", _count(machine, "memory_gb", "GB")),
        ("graphics processor", machine.get("gpu") or "none"),
        ("system", machine.get("os") or ""),
        ("versions", _words(*(f"{name} {version}" for name, version in versions.items()))),
        (
            "model",
            _words(
                model.get("name"),
                _count(model, "parameters", "parameters"),
                _count(model, "layers", "layers"),
                model.get("heads") and heads,
                model.get("dtype"),
            ),
        ),
        ("text", _words(text.get("name"), _count(text, "tokens", "tokens"))),
        ("lengths", _words(*(f"{n:,}" for n in results.lengths)) + " tokens"),
        ("not measured", _left_out(run.get("not_measured"))),
        ("left out", _words(*(f"{_what(r)} ({r.get('reason')})" for r in results.left_out))),
        ("loss allowed", "" if tolerance is None else f"{100 * tolerance:g} % over dense"),
    ]
    return [(name, str(value)) for name, value in found if value]


def protocol(results: Results) -> list[tuple[str, str]]:
    """What each number is."""
    rows = [r for r in results.measurements if r.get("status", "ok") == "ok"]

    def spread(name: str, unit: str) -> str:
        values = sorted({int(n) for r in rows if (n := number(r, name)) is not None})
        return f" ({' or '.join(map(str, values))} {unit})" if values else ""

    tail, decoded = spread("tail_tokens", "tokens"), spread("decode_tokens", "tokens")
    return [
        (
            "density",
            "Query–key pairs computed over all causal pairs, mean of layers and heads. While decoding: "
            "cached tokens read over all cached tokens. Of linear layers: inputs used over all inputs.",
        ),
        (
            "loss",
            f"Mean negative log-likelihood in nats a token of the last part{tail} of the prompt. The "
            f"decoding loss is that of the tokens after the prompt{decoded}, fed from the text one at a time "
            "through the recipe's own cache. Δ is relative to dense on the same tokens.",
        ),
        (
            "KL, top-1",
            "Kullback–Leibler divergence of the recipe's next-token distribution from dense's in nats a "
            "token, and the share of tokens where both have the same most likely next token; over all "
            "scored tokens.",
        ),
        (
            "prompt time",
            "Wall-clock seconds to read one prompt into an empty cache, selection included, at batch 1; the "
            "fastest of the repeats, for dense alike, in one process.",
        ),
        (
            "decoding time",
            "Wall-clock milliseconds for one token after a prompt of that length, median of the tokens. "
            "Recipes that act on prompts only decode alike, densely on this library's kernels: the fastest "
            "of their times stands for all.",
        ),
        (
            "cache bytes",
            "Bytes held for keys and values after decoding, with the method's own side structures.",
        ),
        (
            "recall, time split",
            "One more prompt a recipe: attention mass on the computed pairs by the softmax denominators, and "
            "wall-clock seconds of choosing and of computing, each waited for, summed over the layers.",
        ),
        ("tasks", "Items made from a seed and answered greedily; dense gets the same items."),
        (
            "choice",
            "Among the recipes whose loss and decoding loss stay within the allowed change at every length, "
            "the one with the fastest request, as the verdict says.",
        ),
    ]


def _what(row: dict[str, Any]) -> str:
    return str(row["what"]) if "what" in row else f"{row.get('length')} tokens"


def _left_out(why: Any) -> str:
    return _words(*(f"{slug} ({reason})" for slug, reason in why.items())) if isinstance(why, dict) else ""


def _count(row: dict[str, Any], key: str, unit: str) -> str:
    value = number(row, key)
    return "" if value is None else f"{value:,.10g} {unit}"


def _words(*parts: Any) -> str:
    return ", ".join(str(p) for p in parts if p)


def _date(text: Any) -> str:
    try:
        return datetime.datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return str(text or "")
