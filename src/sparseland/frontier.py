"""The main job: measure methods and budgets on a model, keep the Pareto front, write the recipe.

Order of work: dense; a short screening of every method's grid at the longest length; full measurements of
what it left, at every length; controls at the density of the best prefill method; compositions of the best
of each role; dense again (to show drift); recall and the time of selection; tasks for dense and the best;
attention maps. Each measurement is appended to ``results.jsonl`` as it is made, and a rerun with the same
model, text and settings continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseland.choosing import Judge, relative_time
from sparseland.errors import SparselandError
from sparseland.handle import apply
from sparseland.machine import circumstances, machine
from sparseland.measure import DECODE_TOKENS, TAIL_TOKENS, Window, quality, run_window
from sparseland.method import Calibration, Method, Role, method_class, method_slugs, parse_spec
from sparseland.models import load_model
from sparseland.recipe import Recipe, describe_model
from sparseland.report import write_report
from sparseland.report.words import recipe_name
from sparseland.runlog import RunLog
from sparseland.tasks import TASKS, score_sample
from sparseland.tasks.text import default_text, load_text, tokenize

SCHEMA = 1
CALIBRATION_TOKENS = 2048
TASK_NAMES = ("needle",)
TASK_SAMPLES = 4
TASK_RECIPES = 1  # besides dense
MAP_BINS = 64
LONGEST_MAP = 8192
REPEATS = 2
# Screening: with more candidates than this, each is first tried on one prompt of the shortest length, where
# least can be left out (and this many decoded tokens, if it acts on them); per role the best of different
# methods go on.
SCREEN_ABOVE = 8
# A default run takes the last settings of each grid: the likeliest to stay within a small tolerance. Where
# calibration takes minutes on a CPU, only the last.
DEFAULT_SETTINGS = 2
SLOW_SETTINGS = 1
SCREEN_TOKENS = 24
WARM_TOKENS = 2
# A store or a linear layer this much slower than dense goes no further: a prompt of up to ``SIMILAR`` times
# the tokens would not turn that round.
SLOWEST = 1.25
SIMILAR = 4
SURVIVORS: dict[Role, int] = {"prefill": 3, "select": 1, "store": 1, "linear": 1}
# Pictures of where methods spend their pairs: so many methods, besides the chosen recipe's.
MAPPED_METHODS = 3

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
    job = _Job(options, loaded, text, ids, RunLog(options.out, _fingerprint(options, loaded.model, ids)), say)
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
    for spec in options.methods or [s for s in method_slugs() if s not in left_out()]:
        if ":" in spec:
            chosen.append(parse_spec(spec))
        elif not method_class(spec).card.control:
            grid = method_class(spec).grid(longest)
            few = SLOW_SETTINGS if method_class(spec).calibrates_slowly else DEFAULT_SETTINGS
            chosen.extend(grid if options.methods else grid[-few:])
        elif options.methods and spec != "dense":
            chosen.append(parse_spec(spec))
    return chosen


def left_out() -> dict[str, str]:
    """Methods measured only if they are named, and why."""
    classes = [method_class(slug) for slug in method_slugs()]
    why = {c.card.slug: "it has to be trained first" for c in classes if c.card.training == "training"}
    return why | {c.card.slug: c.left_out for c in classes if c.left_out}


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
        self, options: FrontierOptions, loaded: Any, text: str, ids: Tensor, log: RunLog, say: Progress
    ) -> None:
        self.options, self.loaded, self.text, self.ids, self.log = options, loaded, text, ids, log
        self.model: Any = loaded.model
        self.lengths = sorted(set(options.lengths))
        self.calibration_ids = ids[None, :CALIBRATION_TOKENS]
        self.calibrations: dict[str, Calibration] = {}
        self.dense: dict[int, Window] = {}
        self.judge = Judge(log, self.lengths, options.tolerance)
        self._say, self._done, self._total = say, 0.0, 1.0

    def run(self, candidates: Sequence[Method]) -> FrontierResult:
        """All steps in order."""
        # Work is counted in tokens: about two dense-equivalents of tasks, controls and compositions each.
        screened = len(candidates) > SCREEN_ABOVE
        kept = min(len(candidates), sum(SURVIVORS.values())) if screened else len(candidates)
        self._total = (kept + 12 + (1 + TASK_RECIPES) * TASK_SAMPLES) * sum(self.lengths)
        self._total += len(candidates) * self.lengths[0] if screened else 0
        self.log.add(self._run_row())
        before = {n: self._measure_dense(n) for n in self.lengths}
        survivors = self._screen(candidates) if screened else candidates
        for method in survivors:
            self._measure_all([method], "method")
        for control in self._controls(survivors):
            self._measure_all([control], "control")
        for composition in self.judge.compositions(survivors):
            self._measure_all(composition, "composition")
        for n in self.lengths:
            self.log.add(
                {"kind": "drift", "length": n, "before_s": before[n], "after_s": self._time_dense(n)}
            )
        choice = self.judge.choose()
        self._inspect(survivors)
        self._tasks([[], *self.judge.finalists()[:TASK_RECIPES]])
        self._maps([parse_spec(s) for s in choice["recipe"]], survivors)
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
        # The first call allocates and loads kernels.
        run_window(self.model, self._window(length), length, decode_tokens=WARM_TOKENS)
        self.dense[length] = run = run_window(self.model, self._window(length), length, REPEATS)
        if not self.log.of("measurement", label="dense", length=length):
            self.log.add(self._row([], "dense", length, run, None))
        return run.prefill_s

    def _time_dense(self, length: int) -> float:
        return run_window(self.model, self._window(length), length, REPEATS, 0).prefill_s

    def _screen(self, candidates: Sequence[Method]) -> list[Method]:
        """Try every candidate shortly at the shortest length; per role the best of different methods go on.

        Those within the tolerance come first, the fastest in front; then the others by their loss. What
        exceeds the tolerance on a short prompt could not be chosen, whatever it does on longer ones; nor
        could a store or a linear layer that is far slower than dense.
        """
        length = self.lengths[0]
        similar = self.lengths[-1] <= SIMILAR * length
        best: dict[Role, list[tuple[bool, float, Method]]] = {role: [] for role in SURVIVORS}
        for method in candidates:
            self._tick(f"screening {method.spec}", length)
            self._measure_one([method], "method", length, stage="screen")
            rows = self._measurements(recipe=[method.spec], length=length, stage="screen", status="ok")
            if rows:
                role = next(r for r in SURVIVORS if r in method.roles)
                excess, time = self.judge.excess(rows[-1]), relative_time(rows[-1])
                if role in ("store", "linear") and similar and time > SLOWEST:
                    continue
                best[role].append((excess > 0, excess or time, method))
        survivors: list[Method] = []
        for role, ranked in best.items():
            ranked.sort(key=lambda entry: entry[:2])
            families = dict.fromkeys(m.card.slug for _, _, m in ranked)
            firsts = [next(m for _, _, m in ranked if m.card.slug == slug) for slug in families]
            rest = [m for _, _, m in ranked if m not in firsts]
            survivors += [*firsts, *rest][: SURVIVORS[role]]
        return survivors

    def _measure_all(self, methods: Sequence[Method], role: str) -> None:
        """One configuration at every length."""
        for length in self.lengths:
            self._tick(f"{' + '.join(m.spec for m in methods)}, {length} tokens", length)
            self._measure_one(methods, role, length)

    def _measure_one(self, methods: Sequence[Method], role: str, length: int, *, stage: str = "full") -> None:
        """One configuration at one length, unless it is known; failures become rows."""
        specs = [m.spec for m in methods]
        if self._measurements(recipe=specs, length=length, stage=stage, status="ok"):
            return
        try:
            row = self._measure(methods, role, length, stage)
        except SparselandError as error:
            row = self._failed(specs, role, length, stage, str(error))
        except (torch.OutOfMemoryError, MemoryError) as error:
            row = self._failed(specs, role, length, stage, f"out of memory: {error}")
        except RuntimeError as error:
            if "memory" not in str(error).lower():
                raise
            row = self._failed(specs, role, length, stage, f"out of memory: {error}")
        self.log.add(row)

    def _measure(self, methods: Sequence[Method], role: str, length: int, stage: str) -> dict[str, Any]:
        with apply(
            self.model, list(methods), calibration_ids=self.calibration_ids, calibrations=self._known(methods)
        ) as handle:
            self._remember(methods, handle.calibrations)
            # Controls but dense, which is a rival, are yardsticks of quality: one prompt, no decoding. What
            # leaves the prompt alone needs no second one either.
            rival = stage == "full" and (role != "control" or methods[0].card.slug == "dense")
            timed = rival and any("prefill" in m.roles for m in methods)
            decodes = rival or any(m.roles - {"prefill"} for m in methods)
            tokens = (DECODE_TOKENS if stage == "full" else SCREEN_TOKENS) if decodes else 0
            run = run_window(self.model, self._window(length), length, REPEATS if timed else 1, tokens)
            return self._row(methods, role, length, run, handle.stats(), stage)

    def _inspect(self, survivors: Sequence[Method]) -> None:
        """Recall, and the time of choosing against that of computing, for what acts on prompts."""
        length = self.lengths[-1]
        for method in survivors:
            if "prefill" not in method.roles or self.log.of("inspection", recipe=[method.spec]):
                continue
            if not self._measurements(recipe=[method.spec], length=length, stage="full", status="ok"):
                continue
            self._tick(f"recall of {method.spec}", 2 * length)
            with apply(
                self.model, method, calibrations=self._known([method]),
                calibration_ids=self.calibration_ids, recall=True, timing=True,
            ) as handle, torch.no_grad():  # fmt: skip
                ids = self._window(length)[None, :length].to(next(self.model.parameters()).device)
                self.model(input_ids=ids, use_cache=False, logits_to_keep=1)
                stats = handle.stats()
            layers = [layer for layer in stats.layers if layer.attend_s is not None]
            self.log.add(
                {
                    "kind": "inspection", "recipe": [method.spec], "length": length,
                    "density": stats.density, "recall": stats.recall,
                    "select_s": sum(layer.select_s or 0.0 for layer in layers),
                    "attend_s": sum(layer.attend_s or 0.0 for layer in layers),
                }
            )  # fmt: skip

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
        self, methods: Sequence[Method], role: str, length: int, run: Window, stats: Any, stage: str = "full"
    ) -> dict[str, Any]:
        dense, ids = self.dense[length], self._window(length)
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
            "windows": 1, "tail_tokens": min(TAIL_TOKENS, length - 1), "decode_tokens": decoded - 1,
        }  # fmt: skip

    def _failed(self, specs: list[str], role: str, length: int, stage: str, reason: str) -> dict[str, Any]:
        return {
            "kind": "measurement", "recipe": specs, "label": recipe_name(specs), "role": role,
            "length": length, "stage": stage, "status": "failed", "reason": reason.splitlines()[0],
        }  # fmt: skip

    # -------------------------------------------------------- choosing

    def _measurements(self, **values: Any) -> list[dict[str, Any]]:
        return self.log.of("measurement", **values)

    def _controls(self, candidates: Sequence[Method]) -> list[Method]:
        """Dense on the same kernels, and controls at the density of the best prefill method.

        The first shows what the kernels alone win, the others what the choice of pairs does.
        """
        if self.options.methods:
            return []
        dense = method_class("dense").full_budget(self.lengths[-1])
        method = self.judge.best(candidates, "prefill")
        if method is None:
            return [dense]
        row = self.judge.full([method.spec], self.lengths[-1])[-1]
        classes = [method_class(s) for s in method_slugs()]
        return [dense] + [
            cls.at_density(row["density"], self.lengths[-1])
            for cls in classes
            if cls.card.control and cls.card.slug != "dense"
        ]

    def _recipe(self, choice: dict[str, Any]) -> Recipe:
        methods = [parse_spec(s) for s in choice["recipe"]]
        known = self._known(methods)
        missing = [m for m in methods if m.calibrates() and m.card.slug not in known]
        if missing:  # a resumed run measured it before; learn it again, from the same tokens
            with apply(
                self.model, methods, calibration_ids=self.calibration_ids, calibrations=known
            ) as handle:
                known = dict(handle.calibrations)
        rows = [r for n in self.lengths for r in self.judge.full(choice["recipe"], n)]
        kept = [{k: v for k, v in r.items() if k != "head_density"} for r in rows]
        evidence = {"reason": choice["reason"], "measurements": kept, **circumstances(self.options.command)}
        return Recipe.of(self.model, methods, known, evidence)

    # --------------------------------------------------- tasks and maps

    def _tasks(self, recipes: Sequence[Sequence[str]]) -> None:
        """Needles, for dense and these recipes, at every length."""
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

    def _maps(self, chosen: Sequence[Method], survivors: Sequence[Method]) -> None:
        """Where the true attention lies and what is computed: heads of the chosen recipe, one of others."""
        from sparseland.report.attention_maps import attention_map_rows

        length = min(self.lengths[-1], LONGEST_MAP)  # at short lengths many methods are dense
        others = [
            m for m in survivors if "prefill" in m.roles and m.card.slug not in {c.card.slug for c in chosen}
        ]
        first_of_each = {m.card.slug: m for m in reversed(others)}.values()
        recipes: list[tuple[Sequence[Method], dict[str, int]]] = [(chosen, {})]
        recipes += [([m], {"layers": 1, "heads": 2}) for m in [*first_of_each][:MAPPED_METHODS]]
        for methods, size in recipes:
            specs = [m.spec for m in methods]
            if not any("prefill" in m.roles for m in methods) or self.log.of("map", recipe=specs):
                continue
            self._tick(f"attention maps of {' + '.join(specs)}", length)
            rows = attention_map_rows(
                self.model,
                methods,
                self._known(methods),
                self._window(length)[:length],
                bins=MAP_BINS,
                **size,
            )
            for row in rows:
                self.log.add({"kind": "map", "recipe": specs, "length": length, **row})

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
            "not_measured": [] if self.options.methods else left_out(),
        }  # fmt: skip

    def _tick(self, message: str, tokens: float) -> None:
        """Tell what comes next; the share of work is counted in tokens."""
        self._say(message, min(self._done / self._total, 0.99))
        self._done += tokens


__all__ = ["FrontierOptions", "FrontierResult", "run"]
