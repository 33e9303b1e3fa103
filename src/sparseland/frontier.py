"""The main job: measure methods and budgets on a model, keep the Pareto front, write the recipe.

Order of work: dense; every method of the grid at every length; controls at the density of the best
prefill method; compositions of the best of each role; dense again (to show drift); tasks for dense and
the best; attention maps. Each measurement is appended to ``results.jsonl`` as it is made, and a rerun
with the same model, text and settings continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.handle import apply
from sparseland.machine import circumstances, machine
from sparseland.measure import DECODE_TOKENS, TAIL_TOKENS, Window, quality, run_window
from sparseland.method import Calibration, Method, Role, method_class, method_slugs, parse_spec
from sparseland.models import load_model
from sparseland.recipe import Recipe, describe_model
from sparseland.report import write_report
from sparseland.report.words import recipe_name
from sparseland.tasks import TASKS, score_sample
from sparseland.tasks.text import default_text, load_text, tokenize

SCHEMA = 1
CALIBRATION_TOKENS = 2048
# A request, for choosing the fastest recipe: the prompt and this many new tokens.
NEW_TOKENS = 128
TASK_NAMES = ("needle",)
TASK_SAMPLES = 4
MAP_BINS = 64
LONGEST_MAP = 8192
REPEATS = 2

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FrontierOptions:
    """What ``sparseland frontier`` was asked for.

    Args:
        model: Hugging Face id or folder; None = the embedded default.
        text: file or folder; None = the default text.
        methods: specs; a bare slug stands for its grid; empty = every method.
        lengths: prompt lengths in tokens.
        tolerance: allowed relative increase of the loss, e.g. 0.01.
        out: folder for recipe.json, results.jsonl, report.html.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: torch device; None = CUDA if there is one.
        rope_scale: YaRN factor for lengths beyond the model's own context.
        seed: for the tasks.
        command: shown in the report.
    """

    model: str | None = None
    text: Path | None = None
    methods: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [2048, 4096])
    tolerance: float = 0.01
    out: Path = Path("frontier")
    dtype: str = "auto"
    device: str | None = None
    rope_scale: float | None = None
    seed: int = 0
    command: str = "sparseland frontier"


@dataclass(frozen=True)
class FrontierResult:
    """Rows of ``results.jsonl`` of kind ``measurement``, the choice, and where the files are."""

    rows: list[dict[str, Any]]
    choice: dict[str, Any] | None
    out: Path


def run(options: FrontierOptions, progress: Progress | None = None) -> FrontierResult:
    """Measure, choose, and write ``recipe.json``, ``results.jsonl`` and ``report.html``.

    Raises:
        SparselandError: the model, text, lengths or output folder can't be used (nothing is written).
    """
    _check(options)
    candidates = _candidates(options)
    text = default_text() if options.text is None else load_text(options.text)
    say = progress or (lambda message, done: None)
    say("loading the model", 0.0)
    longest = max(options.lengths)
    loaded = load_model(options.model, options.dtype, options.device, options.rope_scale, longest)
    ids = tokenize(loaded.tokenizer, text)
    needed = CALIBRATION_TOKENS + longest + DECODE_TOKENS + 1
    if ids.numel() < needed:
        raise SparselandError(f"the text has {ids.numel()} tokens; {needed} are needed for length {longest}")
    job = _Job(options, loaded, text, ids, _Log(options.out, _fingerprint(options, loaded.model, ids)), say)
    return job.run(candidates)


def _check(options: FrontierOptions) -> None:
    if not options.lengths or min(options.lengths) < 128:
        raise SparselandError(f"lengths={options.lengths} is not allowed; each must be at least 128 tokens")
    if not 0 <= options.tolerance < 10:
        raise SparselandError(f"tolerance={options.tolerance} is not allowed; it must be >= 0 and < 10")


def _candidates(options: FrontierOptions) -> list[Method]:
    """The methods to measure, grids expanded; controls wait for a density to be compared at."""
    longest = max(options.lengths)
    chosen: list[Method] = []
    for spec in options.methods or method_slugs():
        if ":" in spec:
            chosen.append(parse_spec(spec))
        elif not method_class(spec).card.control:
            chosen.extend(method_class(spec).grid(longest))
        elif options.methods and spec != "dense":
            chosen.append(parse_spec(spec))
    return chosen


class _Log:
    """``results.jsonl``: appended to as measurements are made, read again by a rerun."""

    def __init__(self, out: Path, fingerprint: str) -> None:
        self.path = out / "results.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.rows = list(_read_rows(self.path)) if self.path.exists() else []
            known = next((r["fingerprint"] for r in self.rows if r["kind"] == "run"), fingerprint)
            if known != fingerprint:
                raise SparselandError(
                    f"{self.path} holds results of another model, text or setting; choose another --out"
                )
            # A line cut short by an interrupt is dropped, so that the next one starts on its own.
            self._file = self.path.open("w", encoding="utf-8")
            for row in self.rows:
                self._put(row)
        except OSError as cause:
            raise SparselandError(f"can't write to {out}: {cause.strerror or cause}") from cause
        self.fingerprint = fingerprint

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Append a row; it is on disk when this returns."""
        self.rows.append(row)
        try:
            self._put(row)
        except OSError as cause:
            raise SparselandError(f"can't write to {self.path}: {cause.strerror or cause}") from cause
        return row

    def _put(self, row: dict[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def of(self, kind: str, **values: Any) -> list[dict[str, Any]]:
        """Rows of a kind with these values."""
        return [r for r in self.rows if r["kind"] == kind and all(r.get(k) == v for k, v in values.items())]

    def close(self) -> None:
        """Done writing."""
        self._file.close()


def _read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("kind"), str):
            yield row


def _fingerprint(options: FrontierOptions, model: torch.nn.Module, ids: Tensor) -> str:
    """What makes earlier rows comparable: same model, tokens, type, device and machine."""
    device = str(next(model.parameters()).device)
    parts = [describe_model(model), str(next(model.parameters()).dtype), device, options.rope_scale]
    parts += [machine(), torch.get_num_threads(), SCHEMA]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


class _Job:
    """One run of the frontier: shared state of its steps."""

    def __init__(
        self, options: FrontierOptions, loaded: Any, text: str, ids: Tensor, log: _Log, say: Progress
    ) -> None:
        self.options, self.loaded, self.text, self.ids, self.log = options, loaded, text, ids, log
        self.model: Any = loaded.model
        self.lengths = sorted(set(options.lengths))
        self.calibration_ids = ids[None, :CALIBRATION_TOKENS]
        self.calibrations: dict[str, Calibration] = {}
        self.dense: dict[int, Window] = {}
        self._say, self._done, self._total = say, 0.0, 1.0

    def run(self, candidates: Sequence[Method]) -> FrontierResult:
        """All steps in order."""
        # Work is counted in tokens: about two dense-equivalents of tasks, controls and compositions each.
        self._total = (len(candidates) + 10) * sum(self.lengths) + 3 * TASK_SAMPLES * sum(self.lengths)
        self.log.add(self._run_row())
        before = {n: self._measure_dense(n) for n in self.lengths}
        for method in candidates:
            self._measure_all([method], "method")
        for control in self._controls(candidates):
            self._measure_all([control], "control")
        for composition in self._compositions(candidates):
            self._measure_all(composition, "composition")
        for n in self.lengths:
            self.log.add(
                {"kind": "drift", "length": n, "before_s": before[n], "after_s": self._time_dense(n)}
            )
        choice = self._choose()
        self._tasks([[], *self._finalists()])
        self._maps([parse_spec(s) for s in choice["recipe"]])
        recipe = self._recipe(choice)
        recipe.save(self.options.out / "recipe.json")
        self.log.add(choice)
        self.log.close()
        self._say("writing the report", 1.0)
        write_report(self.log.path, self.options.out / "report.html")
        return FrontierResult(self._measurements(), choice, self.options.out)

    # ------------------------------------------------------- measuring

    def _window(self, length: int) -> Tensor:
        """The tokens measured at a length: from the middle of what calibration did not see."""
        start = CALIBRATION_TOKENS + (self.ids.numel() - CALIBRATION_TOKENS - length - DECODE_TOKENS - 1) // 2
        return self.ids[start : start + length + DECODE_TOKENS + 1]

    def _measure_dense(self, length: int) -> float:
        self._tick(f"dense, {length} tokens", length)
        run_window(self.model, self._window(length), length)  # the first call allocates and loads kernels
        self.dense[length] = run = run_window(self.model, self._window(length), length, REPEATS)
        if not self.log.of("measurement", label="dense", length=length):
            self.log.add(self._row([], "dense", length, run, None))
        return run.prefill_s

    def _time_dense(self, length: int) -> float:
        return run_window(self.model, self._window(length), length, REPEATS).prefill_s

    def _measure_all(self, methods: Sequence[Method], role: str) -> None:
        """One configuration at every length; failures become rows."""
        specs = [m.spec for m in methods]
        for length in self.lengths:
            self._tick(f"{' + '.join(specs)}, {length} tokens", length)
            if self.log.of("measurement", recipe=specs, length=length, status="ok"):
                continue
            try:
                row = self._measure(methods, role, length)
            except SparselandError as error:
                row = self._failed(specs, role, length, str(error))
            except (torch.OutOfMemoryError, MemoryError) as error:
                row = self._failed(specs, role, length, f"out of memory: {error}")
            except RuntimeError as error:
                if "memory" not in str(error).lower():
                    raise
                row = self._failed(specs, role, length, f"out of memory: {error}")
            self.log.add(row)

    def _measure(self, methods: Sequence[Method], role: str, length: int) -> dict[str, Any]:
        with apply(
            self.model, list(methods), calibration_ids=self.calibration_ids, calibrations=self._known(methods)
        ) as handle:
            self._remember(methods, handle.calibrations)
            # What leaves the prompt alone, and yardsticks that may be slow, need no second prompt.
            timed = role != "control" and any("prefill" in m.roles for m in methods)
            run = run_window(self.model, self._window(length), length, REPEATS if timed else 1)
            return self._row(methods, role, length, run, handle.stats())

    def _known(self, methods: Sequence[Method]) -> dict[str, Calibration]:
        return {
            m.card.slug: self.calibrations[m.calibration_key]
            for m in methods
            if m.calibration_key in self.calibrations
        }

    def _remember(self, methods: Sequence[Method], found: dict[str, Calibration]) -> None:
        for method in methods:
            if method.card.slug in found:
                self.calibrations[method.calibration_key] = found[method.card.slug]

    def _row(
        self, methods: Sequence[Method], role: str, length: int, run: Window, stats: Any
    ) -> dict[str, Any]:
        dense, ids = self.dense[length], self._window(length)
        q, base = quality(run, ids, length, dense), quality(dense, ids, length, dense)
        specs = [m.spec for m in methods]
        heads = [layer.density for layer in stats.layers] if stats else None
        return {
            "kind": "measurement", "recipe": specs, "label": recipe_name(specs), "role": role,
            "length": length, "stage": "full", "status": "ok", "reason": None,
            "density": stats.density if stats else 1.0,
            "decode_density": stats.decode_density if stats else 1.0,
            "neuron_density": stats.neuron_density if stats else 1.0,
            "loss": q.loss, "decode_loss": q.decode_loss, "dense_loss": base.loss,
            "dense_decode_loss": base.decode_loss, "kl": q.kl, "top1": q.top1,
            "prefill_s": run.prefill_s, "dense_prefill_s": dense.prefill_s,
            "decode_ms": run.decode_ms, "dense_decode_ms": dense.decode_ms,
            "cache_bytes": run.cache_bytes, "dense_cache_bytes": dense.cache_bytes,
            "head_density": heads if heads and all(heads) else None,
            "windows": 1, "tail_tokens": min(TAIL_TOKENS, length - 1), "decode_tokens": DECODE_TOKENS,
        }  # fmt: skip

    def _failed(self, specs: list[str], role: str, length: int, reason: str) -> dict[str, Any]:
        return {
            "kind": "measurement", "recipe": specs, "label": recipe_name(specs), "role": role,
            "length": length, "stage": "full", "status": "failed", "reason": reason.splitlines()[0],
        }  # fmt: skip

    # -------------------------------------------------------- choosing

    def _measurements(self, **values: Any) -> list[dict[str, Any]]:
        return self.log.of("measurement", **values)

    def _within(self, specs: list[str]) -> bool:
        """Whether a configuration stays within the tolerance at every length."""
        rows = [r for n in self.lengths for r in self._measurements(recipe=specs, length=n, status="ok")]
        limit = 1 + self.options.tolerance
        return len(rows) >= len(self.lengths) and all(
            r["loss"] <= limit * r["dense_loss"] and r["decode_loss"] <= limit * r["dense_decode_loss"]
            for r in rows
        )

    def _cost(self, specs: list[str]) -> float:
        """Time of a request of the longest length (see :meth:`_seconds`) relative to dense.

        Relative, because a resumed run has timed dense anew, on what may be a slower or a faster day.
        """
        ours, dense = self._seconds(specs)
        return ours / dense

    def _seconds(self, specs: list[str]) -> tuple[float, float]:
        """Seconds for a prompt of the longest length and ``NEW_TOKENS`` more; and dense's."""
        r = self._measurements(recipe=specs, length=self.lengths[-1], status="ok")[-1]
        return (
            r["prefill_s"] + 1e-3 * NEW_TOKENS * r["decode_ms"],
            r["dense_prefill_s"] + 1e-3 * NEW_TOKENS * r["dense_decode_ms"],
        )

    def _best(self, candidates: Sequence[Method], role: Role) -> Method | None:
        """The fastest method of a role within the tolerance."""
        fit = [m for m in candidates if role in m.roles and self._within([m.spec])]
        return min(fit, key=lambda m: self._cost([m.spec]), default=None)

    def _compositions(self, candidates: Sequence[Method]) -> list[list[Method]]:
        """The best of each role together, and pairs with the best prefill method."""
        roles: tuple[Role, ...] = ("prefill", "select", "store", "linear")
        best = [m for role in roles if (m := self._best(candidates, role)) is not None]
        best = list(dict.fromkeys(best))
        if len(best) < 2:
            return []
        pairs = [[best[0], other] for other in best[1:]] if "prefill" in best[0].roles else []
        return [*pairs, best] if len(best) > 2 or not pairs else pairs

    def _controls(self, candidates: Sequence[Method]) -> list[Method]:
        """Dense on the same kernels, and controls at the density of the best prefill method.

        The first shows what the kernels alone win, the others what the choice of pairs does.
        """
        if self.options.methods:
            return []
        dense = method_class("dense").full_budget(self.lengths[-1])
        method = self._best(candidates, "prefill")
        if method is None:
            return [dense]
        row = self._measurements(recipe=[method.spec], length=self.lengths[-1], status="ok")[-1]
        classes = [method_class(s) for s in method_slugs()]
        return [dense] + [
            cls.at_density(row["density"], self.lengths[-1])
            for cls in classes
            if cls.card.control and cls.card.slug != "dense"
        ]

    def _finalists(self) -> list[list[str]]:
        """The two fastest configurations within the tolerance (dense and controls apart)."""
        specs = [r["recipe"] for r in self._measurements(length=self.lengths[-1], status="ok")]
        fit = [s for s in specs if s and self._within(s) and not self._is_control(s)]
        return sorted(fit, key=self._cost)[:2]

    @staticmethod
    def _is_control(specs: list[str]) -> bool:
        return any(parse_spec(s).card.control for s in specs)

    def _choose(self) -> dict[str, Any]:
        n, tolerance = self.lengths[-1], self.options.tolerance
        best = next(iter(self._finalists()), [])
        # The library's own dense path is often the faster rival: its decoding copies no keys.
        rivals = [s for s in ([], ["dense"]) if self._measurements(recipe=s, length=n, status="ok")]
        rival = min(rivals, key=self._cost)
        if not best or self._cost(best) >= self._cost(rival):
            tried = len({tuple(r["recipe"]) for r in self._measurements()}) - 1
            reason = f"none of {tried} configurations is faster than dense within {tolerance:.1%} loss"
            return {
                "kind": "choice",
                "recipe": [],
                "length": n,
                "reason": reason,
                "recipe_file": "recipe.json",
            }
        ours, dense = self._seconds(best)[0], self._seconds(rival)[0]
        reason = (
            f"fastest within {tolerance:.1%} of dense's loss at {', '.join(map(str, self.lengths))} tokens: "
            f"a prompt of {n} and {NEW_TOKENS} new tokens take {ours:.2f} s, "
            f"{recipe_name(rival)} {dense:.2f} s"
        )
        return {"kind": "choice", "recipe": best, "length": n, "reason": reason, "recipe_file": "recipe.json"}

    def _recipe(self, choice: dict[str, Any]) -> Recipe:
        methods = [parse_spec(s) for s in choice["recipe"]]
        known = self._known(methods)
        missing = [m for m in methods if m.calibrates() and m.card.slug not in known]
        if missing:  # a resumed run measured it before; learn it again, from the same tokens
            with apply(
                self.model, methods, calibration_ids=self.calibration_ids, calibrations=known
            ) as handle:
                known = dict(handle.calibrations)
        rows = [r for n in self.lengths for r in self._measurements(recipe=choice["recipe"], length=n)]
        kept = [{k: v for k, v in r.items() if k != "head_density"} for r in rows]
        evidence = {"reason": choice["reason"], "measurements": kept, **circumstances(self.options.command)}
        return Recipe.of(self.model, methods, known, evidence)

    # --------------------------------------------------- tasks and maps

    def _tasks(self, recipes: Sequence[Sequence[str]]) -> None:
        """Needles, for dense and the finalists, at every length."""
        for name in TASK_NAMES:
            for length in self.lengths:
                samples = TASKS[name](
                    self.loaded.tokenizer, self.text, length, TASK_SAMPLES, self.options.seed
                )
                for specs in recipes:
                    self._tick(
                        f"{name}: {' + '.join(specs) or 'dense'}, {length} tokens", len(samples) * length
                    )
                    if len(self.log.of("task", recipe=list(specs), task=name, length=length)) >= len(samples):
                        continue
                    methods = [parse_spec(s) for s in specs]
                    handle = (
                        apply(
                            self.model, methods, calibration_ids=self.calibration_ids,
                            calibrations=self._known(methods),
                        )
                        if methods
                        else None
                    )  # fmt: skip
                    try:
                        for sample in samples:
                            self.log.add(
                                {
                                    "kind": "task",
                                    "recipe": list(specs),
                                    "task": name,
                                    "length": length,
                                    "depth": sample.depth,
                                    "correct": score_sample(self.model, sample),
                                }
                            )
                    finally:
                        if handle is not None:
                            handle.remove()

    def _maps(self, methods: Sequence[Method]) -> None:
        """Where the true attention lies and what the chosen recipe computes, for a few heads."""
        from sparseland.report.attention_maps import attention_map_rows

        if not any("prefill" in m.roles for m in methods) or self.log.of("map"):
            return
        length = min(self.lengths[-1], LONGEST_MAP)  # at short lengths many methods are dense
        for row in attention_map_rows(
            self.model, methods, self._known(methods), self._window(length)[:length], bins=MAP_BINS
        ):
            self.log.add({"kind": "map", "recipe": [m.spec for m in methods], "length": length, **row})

    def _run_row(self) -> dict[str, Any]:
        config = self.model.config.get_text_config()
        heads = config.num_attention_heads
        return {
            "kind": "run", "schema": SCHEMA, "fingerprint": self.log.fingerprint,
            **circumstances(self.options.command),
            "model": {
                "name": self.loaded.name,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "layers": config.num_hidden_layers, "heads": heads,
                "kv_heads": getattr(config, "num_key_value_heads", heads),
                "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            },
            "text": {"name": str(self.options.text or "Python documentation"), "tokens": self.ids.numel()},
            "lengths": self.lengths, "tolerance": self.options.tolerance,
        }  # fmt: skip

    def _tick(self, message: str, tokens: int) -> None:
        """Tell what comes next; the share of work is counted in tokens."""
        self._say(message, min(self._done / self._total, 0.99))
        self._done += tokens


__all__ = ["FrontierOptions", "FrontierResult", "run"]
