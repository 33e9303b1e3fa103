"""Choosing among measurements: what stays within the tolerance, what is fastest, what to combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseland.frontier.runlog import RunLog
from sparseland.measure import DECODE_TOKENS
from sparseland.method import Method, Role, parse_spec
from sparseland.report.results import with_shared_decoding
from sparseland.report.words import recipe_name

# A request, for choosing the fastest recipe: the prompt and this many new tokens.
NEW_TOKENS = 128


def relative_time(row: dict[str, Any]) -> float:
    """Time of a request against dense's, by what was measured (decoding only where it was)."""
    decode = row["dense_decode_ms"] if row["decode_ms"] is None else row["decode_ms"]
    return seconds(row["prefill_s"], decode) / seconds(row["dense_prefill_s"], row["dense_decode_ms"])


def seconds(prefill_s: float, decode_ms: float) -> float:
    """Seconds for a prompt and ``NEW_TOKENS`` more."""
    return prefill_s + 1e-3 * NEW_TOKENS * decode_ms


@dataclass(frozen=True)
class Judge:
    """Judges the measurements of a log as they stand."""

    log: RunLog
    lengths: list[int]
    tolerance: float

    def full(self, specs: list[str], length: int) -> list[dict[str, Any]]:
        """Full measurements of a configuration that came to an end."""
        rows = self.log.of("measurement", length=length, stage="full", status="ok")
        return [r for r in with_shared_decoding(rows) if r["recipe"] == specs]

    def excess(self, row: dict[str, Any]) -> float:
        """By how much a row's losses grow beyond the tolerance, at most (0: within it).

        A screening decodes too few tokens for their loss to tell anything.
        """
        changes = [row["loss"] / row["dense_loss"] - 1]
        if row["decode_loss"] is not None and row["decode_tokens"] >= DECODE_TOKENS:
            changes.append(row["decode_loss"] / row["dense_decode_loss"] - 1)
        return float(max(0.0, *(c - self.tolerance for c in changes)))

    def within(self, specs: list[str]) -> bool:
        """Whether a configuration stays within the tolerance at every length."""
        rows = [r for n in self.lengths for r in self.full(specs, n)]
        return len(rows) >= len(self.lengths) and all(self.excess(r) == 0 for r in rows)

    def cost(self, specs: list[str]) -> float:
        """Time of a request of the longest length relative to dense.

        Relative, because a resumed run has timed dense anew, on what may be a slower or a faster day. Dense
        itself is timed twice, and its faster time counts.
        """
        n = self.lengths[-1]
        if specs:
            return relative_time(self.full(specs, n)[-1])
        again = [
            seconds(d["after_s"], d["after_decode_ms"]) / seconds(d["before_s"], d["before_decode_ms"])
            for d in self.log.of("drift", length=n)
        ]
        return min([1.0, *again])

    def saves(self, specs: list[str]) -> bool:
        """Whether a configuration leaves anything out at the longest length: else only noise speeds it up."""
        row = self.full(specs, self.lengths[-1])[-1]
        shares = [row.get(name) for name in ("density", "decode_density", "neuron_density")]
        return any(s is not None and s < 1 for s in shares) or row["cache_bytes"] < row["dense_cache_bytes"]

    def best(self, candidates: Sequence[Method], role: Role) -> Method | None:
        """The fastest method of a role within the tolerance."""
        fit = [m for m in candidates if role in m.roles and self.within([m.spec])]
        return min(fit, key=lambda m: self.cost([m.spec]), default=None)

    def compositions(self, candidates: Sequence[Method]) -> list[list[Method]]:
        """The best of each role together, and pairs with the best prefill method, where they can combine."""
        best: list[Method] = []
        for role in ("prefill", "select", "store", "linear"):
            method = self.best(candidates, role)
            if method is not None and not any(method.roles & other.roles for other in best):
                best.append(method)
        if len(best) < 2:
            return []
        pairs = [[best[0], other] for other in best[1:]] if "prefill" in best[0].roles else []
        return [*pairs, best] if len(best) > 2 or not pairs else pairs

    def finalists(self) -> list[list[str]]:
        """The two fastest configurations within the tolerance (dense and controls apart)."""
        rows = self.log.of("measurement", length=self.lengths[-1], stage="full", status="ok")
        specs = list({tuple(r["recipe"]): r["recipe"] for r in rows}.values())
        controls = [s for s in specs if any(parse_spec(spec).card.control for spec in s)]
        fit = [s for s in specs if s and s not in controls and self.within(s) and self.saves(s)]
        return sorted(fit, key=self.cost)[:2]

    def _none_is_faster(self) -> str:
        """In words; a configuration that failed at every length is none that was slower."""
        tried = {tuple(r["recipe"]) for r in self.log.of("measurement")} - {()}
        measured = {tuple(r["recipe"]) for r in self.log.of("measurement", status="ok")} & tried
        failed = f" ({len(tried - measured)} more failed)" if tried - measured else ""
        allowed = f"within {self.tolerance:.1%} loss"
        return f"none of {len(measured)} configurations{failed} is faster than dense {allowed}"

    def choose(self) -> dict[str, Any]:
        """The choice as a row of the log: the fastest within the tolerance, or dense."""
        n = self.lengths[-1]
        best = next(iter(self.finalists()), [])
        # The library's own dense path is often the faster rival: its decoding copies no keys.
        rival = min((s for s in ([], ["dense"]) if self.full(s, n)), key=self.cost)
        choice = {"kind": "choice", "length": n, "recipe_file": "recipe.json"}
        if not best or self.cost(best) >= self.cost(rival):
            return {**choice, "recipe": [], "reason": self._none_is_faster()}
        dense = self.full([], n)[-1]
        whole = seconds(dense["prefill_s"], dense["decode_ms"])
        reason = (
            f"fastest within {self.tolerance:.1%} of dense's loss at {', '.join(map(str, self.lengths))} "
            f"tokens: a prompt of {n} and {NEW_TOKENS} new tokens take {whole * self.cost(best):.2f} s, "
            f"{recipe_name(rival)} {whole * self.cost(rival):.2f} s"
        )
        return {**choice, "recipe": best, "reason": reason}
