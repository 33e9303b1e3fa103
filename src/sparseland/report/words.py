"""Numbers and recipes in words, the same in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sparseland.report.pareto import Row, decode_loss_change, loss_change, number, ratio
from sparseland.report.results import Results, key, score

NONE = "–"
NAMED = 6  # of what a run left out, in its verdict


def spec_name(spec: str) -> str:
    """A spec; the control ``dense`` by what sets it apart from the stock model, which is "dense" too."""
    return "dense (own kernels)" if spec == "dense" else spec


def recipe_name(recipe: Sequence[str]) -> str:
    """``a:x=1 + b``; ``dense`` for the empty recipe."""
    return " + ".join(map(spec_name, recipe)) if recipe else "dense"


def fixed(value: float | None, digits: int, unit: str = "") -> str:
    """A number with ``digits`` decimals, or a dash."""
    return NONE if value is None else f"{value:,.{digits}f}{unit}"


def significant(value: float | None, unit: str = "") -> str:
    """A number with about three significant digits."""
    if value is None:
        return NONE
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}{unit}"


def percent(change: float | None) -> str:
    """A relative change, signed: ``+0.42 %``."""
    return NONE if change is None else signed(change) + " %"


def signed(change: float | None) -> str:
    """A relative change in percent, without the sign for percent."""
    if change is None:
        return NONE
    value = 100 * change
    text = f"{value:+,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"
    # "-0.00" would say that something got better.
    return "0.00" if float(text.replace(",", "")) == 0 else text


def times(value: float | None) -> str:
    """A speed against dense: ``1.42×``."""
    return fixed(value, 2, "×")


def size(n: float | None) -> str:
    """Bytes in decimal units: ``44.2 MB``."""
    if n is None:
        return NONE
    if n < 1000:
        return f"{n:.0f} B"
    power = min(int(math.log10(n)) // 3, 4)
    return f"{significant(n / 1000**power)} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def found(count: tuple[int, int] | None) -> str:
    """``4/5``, or a dash."""
    return NONE if count is None else f"{count[0]}/{count[1]}"


def speedup(row: Row, what: str) -> float | None:
    """Dense time over this row's time; ``what`` is ``prefill_s`` or ``decode_ms``."""
    return ratio(row, f"dense_{what}", what)


def facts(row: dict[str, Any], tasks: Sequence[dict[str, Any]] = ()) -> list[str]:
    """A measurement in short lines, the recipe first (tooltips and screen readers)."""
    lines = [str(row.get("label") or recipe_name(key(row)))]
    if row.get("label") and row["label"] != recipe_name(key(row)):
        lines.append(recipe_name(key(row)))
    lines += [
        f"prompt {significant(number(row, 'prefill_s'), ' s')} ({times(speedup(row, 'prefill_s'))} dense)",
        f"decoding {significant(number(row, 'decode_ms'), ' ms a token')} "
        f"({times(speedup(row, 'decode_ms'))} dense)",
        f"loss {fixed(number(row, 'loss'), 3)} ({percent(loss_change(row))})",
    ]
    if number(row, "density") is not None:
        lines.append(f"density {fixed(number(row, 'density'), 3)}")
    if number(row, "decode_density") is not None:
        lines.append(f"density while decoding {fixed(number(row, 'decode_density'), 3)}")
    if (number(row, "neuron_density") or 1) < 1:
        lines.append(f"density of linear layers {fixed(number(row, 'neuron_density'), 3)}")
    lines.append(f"cache {size(number(row, 'cache_bytes'))}")
    needles = score(tasks, key(row), row["length"])
    if needles:
        lines.append(f"needles {found(needles)} (dense {found(score(tasks, (), row['length']))})")
    if row.get("stage") == "screen":
        lines.append("short screening only")
    return lines


def verdict(results: Results) -> list[str]:
    """The outcome in plain sentences; shared by the page and the terminal."""
    late = [
        f"Left out because {row['reason']}: {_some(row['what'])}. "
        "The same command with more --minutes goes on from here."
        for row in results.left_out
        if row.get("late")
    ]
    return [*_outcome(results), *late]


def _some(what: str) -> str:
    """A list in words that a small screen has room for; results.jsonl holds it whole."""
    parts = what.split("; ")
    return what if len(parts) <= NAMED else f"{'; '.join(parts[:NAMED])}; and {len(parts) - NAMED} more"


def _outcome(results: Results) -> list[str]:
    if results.choice is None:
        return ["No recipe is chosen yet: the run has not finished. Run the same command again to go on."]
    recipe, length = results.chosen or (), int(results.choice.get("length") or 0)
    reason = str(results.choice.get("reason") or "").strip().rstrip(".")
    if not recipe:
        return [f"Keep the dense model: {reason or 'nothing that was measured is better'}."]
    row = results.row(recipe, length)
    if row is None:
        return [f"{recipe_name(recipe)} is chosen, but its measurement is missing from the results."]
    sentences = [_speed_sentence(recipe_name(recipe), row), _quality_sentence(results, row)]
    return [*sentences, f"Why this one: {reason}."] if reason else sentences


def _speed_sentence(name: str, row: dict[str, Any]) -> str:
    """Prompt, decoding, cache."""
    prompt = _compared(speedup(row, "prefill_s"), "as fast as the dense model")
    decode = _compared(speedup(row, "decode_ms"), "as fast")
    cache = ratio(row, "cache_bytes", "dense_cache_bytes")
    if cache is None:
        stored = "the cache was not measured"
    elif abs(cache - 1) < 0.005:
        stored = f"the cache stays at {size(number(row, 'cache_bytes'))}"
    else:
        stored = (
            f"the cache takes {cache:.2f}× the bytes "
            f"({size(number(row, 'cache_bytes'))} instead of {size(number(row, 'dense_cache_bytes'))})"
        )
    seconds = (significant(number(row, k), " s") for k in ("prefill_s", "dense_prefill_s"))
    milliseconds = (significant(number(row, k), " ms") for k in ("decode_ms", "dense_decode_ms"))
    return (
        f"{name} reads a prompt of {row['length']:,} tokens {prompt} ({' instead of '.join(seconds)}), "
        f"decodes {decode} ({' instead of '.join(milliseconds)} a token), and {stored}."
    )


def _quality_sentence(results: Results, row: dict[str, Any]) -> str:
    tolerance = number(results.run, "tolerance")
    text = (
        f"The loss on the text changes by {percent(loss_change(row))} "
        f"({fixed(number(row, 'dense_loss'), 3)} to {fixed(number(row, 'loss'), 3)})"
    )
    if (decode := decode_loss_change(row)) is not None:
        text += f" and that of decoded tokens by {percent(decode)}"
    changes = [c for c in (loss_change(row), decode) if c is not None]
    if changes and tolerance is not None:
        text += f", {'inside' if max(changes) <= tolerance else 'outside'} the allowed {100 * tolerance:g} %"
    ours, dense = (score(results.tasks, r, row["length"]) for r in (key(row), ()))
    if ours and dense and dense[0]:
        text += f"; it finds {ours[0]} of {ours[1]} needles, the dense model {dense[0]} of {dense[1]}"
    elif ours and dense:
        text += "; the dense model itself finds no needle here, so needles say nothing"
    return text + "."


def _compared(value: float | None, words: str) -> str:
    return "at an unmeasured speed" if value is None else f"{value:.2f}× {words}"
