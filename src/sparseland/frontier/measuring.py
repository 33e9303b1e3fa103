"""Measuring configurations of one model on one text; each measurement is a row of the log."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sparseland.errors import SparselandError, out_of_memory
from sparseland.frontier.runlog import RunLog
from sparseland.handle import Handle, apply
from sparseland.measure import DECODE_TOKENS, TAIL_TOKENS, Window, quality, run_window
from sparseland.method import Calibration, Method
from sparseland.report.words import recipe_name

CALIBRATION_TOKENS = 2048
REPEATS = 2
# Decoded tokens when dense is timed again at the end.
AGAIN_TOKENS = 32
SCREEN_TOKENS = 24
WARM_TOKENS = 2


# What :func:`survivable` is asked about.
FAILURES = (SparselandError, MemoryError, RuntimeError)


def survivable(error: BaseException) -> str:
    """In a line, why one configuration can't be measured; what the run can't survive either is raised."""
    if isinstance(error, SparselandError):
        return str(error).splitlines()[0]
    if not out_of_memory(error):
        raise error
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return f"out of memory: {asked[1]} more were asked for" if asked else "out of memory"


@dataclass
class Measuring:
    """Measures configurations, unless the log knows them; failures become rows.

    Args:
        model: the model, as dense as it came.
        ids: tokens of the text; the first ``CALIBRATION_TOKENS`` are for calibration and never measured.
        log: where the rows go.
        tick: told what comes next, and how many tokens of work it is.
    """

    model: Any
    ids: Tensor
    lengths: list[int]
    log: RunLog
    tick: Callable[[str, float], None]
    calibrations: dict[str, Calibration] = field(default_factory=dict)
    dense: dict[int, Window] = field(default_factory=dict)

    @property
    def calibration_ids(self) -> Tensor:
        return self.ids[None, :CALIBRATION_TOKENS]

    def rows(self, **values: Any) -> list[dict[str, Any]]:
        """The measurements so far with these values."""
        return self.log.of("measurement", **values)

    def window(self, length: int) -> Tensor:
        """The tokens measured at a length: from the middle of what calibration did not see."""
        start = CALIBRATION_TOKENS + (self.ids.numel() - CALIBRATION_TOKENS - length - DECODE_TOKENS - 1) // 2
        return self.ids[start : start + length + DECODE_TOKENS + 1]

    def measure_dense(self, length: int) -> None:
        self.tick(f"dense, {length} tokens", length)
        if not self.dense:  # the first call allocates and loads kernels
            run_window(self.model, self.window(length), length, decode_tokens=WARM_TOKENS)
        self.dense[length] = run = run_window(self.model, self.window(length), length, REPEATS)
        if not self.log.of("measurement", label="dense", length=length):
            self.log.add(self._row([], "dense", length, run, None))

    def time_dense_again(self, length: int) -> None:
        """Note dense's times after all others: what changed meanwhile is noise in all of them."""
        self.tick(f"dense again, {length} tokens", length)
        before = self.dense[length]
        after = run_window(self.model, self.window(length), length, REPEATS, AGAIN_TOKENS)
        self.log.add(
            {
                "kind": "drift", "length": length, "before_s": before.prefill_s, "after_s": after.prefill_s,
                "before_decode_ms": before.decode_ms, "after_decode_ms": after.decode_ms,
            }
        )  # fmt: skip

    def measure_all(self, methods: Sequence[Method], role: str) -> None:
        """One configuration at every length."""
        for length in self.lengths:
            self.tick(f"{' + '.join(m.spec for m in methods)}, {length} tokens", length)
            self.measure_one(methods, role, length)

    def measure_one(self, methods: Sequence[Method], role: str, length: int, *, stage: str = "full") -> None:
        """One configuration at one length, unless it is known; failures become rows."""
        specs = [m.spec for m in methods]
        if self.rows(recipe=specs, length=length, stage=stage, status="ok"):
            return
        try:
            row = self._measure(methods, role, length, stage)
        except FAILURES as error:
            row = self._failed(specs, role, length, stage, survivable(error))
        self.log.add(row)

    def _measure(self, methods: Sequence[Method], role: str, length: int, stage: str) -> dict[str, Any]:
        with self.applied(methods) as handle:
            assert handle is not None
            # Controls but dense, which is a rival, are yardsticks of quality: one prompt, no decoding. What
            # leaves the prompt alone needs no second one either.
            rival = stage == "full" and (role != "control" or methods[0].card.slug == "dense")
            timed = rival and any("prefill" in m.roles for m in methods)
            decodes = rival or any(m.roles - {"prefill"} for m in methods)
            tokens = (DECODE_TOKENS if stage == "full" else SCREEN_TOKENS) if decodes else 0
            run = run_window(self.model, self.window(length), length, REPEATS if timed else 1, tokens)
            return self._row(methods, role, length, run, handle.stats(), stage)

    @contextmanager
    def applied(self, methods: Sequence[Method], **options: bool) -> Iterator[Handle | None]:
        """The model with these methods on it, calibrated once for all runs; with none of them, as it is."""
        if not methods:
            yield None
            return
        known = self.known(methods)
        with apply(
            self.model, list(methods), calibration_ids=self.calibration_ids, calibrations=known, **options
        ) as handle:
            for method in methods:
                if method.card.slug in handle.calibrations:
                    self.calibrations[method.calibration_key] = handle.calibrations[method.card.slug]
            yield handle

    def known(self, methods: Sequence[Method]) -> dict[str, Calibration]:
        """What calibration has learnt for these methods so far, by slug."""
        return {
            m.card.slug: self.calibrations[m.calibration_key]
            for m in methods
            if m.calibration_key in self.calibrations
        }

    def _row(
        self, methods: Sequence[Method], role: str, length: int, run: Window, stats: Any, stage: str = "full"
    ) -> dict[str, Any]:
        dense, ids = self.dense[length], self.window(length)
        decoded = run.decode_logits.shape[0]  # one more than there were decoding steps
        # Dense as it was after as many tokens: its cache grows by the same for each.
        held = round(dense.cache_bytes * (length + decoded - 1) / (length + dense.decode_logits.shape[0] - 1))
        same = replace(dense, decode_logits=dense.decode_logits[:decoded], cache_bytes=held)
        q, base = quality(run, ids, length, dense), quality(same, ids, length, dense)
        specs = [m.spec for m in methods]
        heads = [layer.density for layer in stats.layers] if stats else None
        return {
            "kind": "measurement", "recipe": specs, "label": recipe_name(specs), "role": role,
            "length": length, "stage": stage, "status": "ok", "reason": None,
            "density": stats.density if stats else 1.0,
            "decode_density": stats.decode_density if stats else 1.0,
            "neuron_density": stats.neuron_density if stats else 1.0,
            "loss": q.loss, "decode_loss": q.decode_loss, "dense_loss": base.loss,
            "dense_decode_loss": base.decode_loss, "kl": q.kl, "top1": q.top1,
            "prefill_s": run.prefill_s, "dense_prefill_s": dense.prefill_s,
            "decode_ms": run.decode_ms, "dense_decode_ms": dense.decode_ms,
            "cache_bytes": run.cache_bytes, "dense_cache_bytes": same.cache_bytes,
            "head_density": heads if heads and all(heads) else None,
            # Whether decoding is dense, on the library's kernels: such rows time the same thing.
            "dense_decoding": bool(methods) and not any(m.roles - {"prefill"} for m in methods),
            "windows": 1, "tail_tokens": min(TAIL_TOKENS, length - 1), "decode_tokens": decoded - 1,
        }  # fmt: skip

    def _failed(self, specs: list[str], role: str, length: int, stage: str, reason: str) -> dict[str, Any]:
        return {
            "kind": "measurement", "recipe": specs, "label": recipe_name(specs), "role": role,
            "length": length, "stage": stage, "status": "failed", "reason": reason,
        }  # fmt: skip
