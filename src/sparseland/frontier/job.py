"""The order of work of one run: what is measured, chosen and looked at more closely."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.frontier.choosing import Judge, relative_time
from sparseland.frontier.looking import Task, draw_maps, inspect, score_task
from sparseland.frontier.measuring import FAILURES, Measuring, survivable
from sparseland.frontier.options import FrontierOptions, left_out, time_limit
from sparseland.frontier.runlog import RunLog
from sparseland.machine import circumstances
from sparseland.method import Method, Role, method_class, method_slugs, parse_spec
from sparseland.models import LoadedModel
from sparseland.recipe import Recipe
from sparseland.report import write_report
from sparseland.report.results import with_fastest_dense

SCHEMA = 1
# Samples of each task at every length: a needle at four depths, and one among others like it.
TASK_SAMPLES = {"needle": 4, "needle-multi-key": 2}
TASK_RECIPES = 1  # besides dense
# Screening: with more candidates than this, each is first tried on one prompt of the shortest length, where
# least can be left out (and a few decoded tokens, if it acts on them); per role the best of different
# methods go on.
SCREEN_ABOVE = 8
# A store or a linear layer this much slower than dense goes no further: a prompt of up to ``SIMILAR`` times
# the tokens would not turn that round.
SLOWEST = 1.25
SIMILAR = 4
# What reads a prompt this much slower than dense, too: what a method adds grows with the tokens, what it
# leaves out with their square, and at twice the tokens both together are still slower than dense.
SLOWEST_PROMPT = 1.25
SURVIVORS: dict[Role, int] = {"prefill": 3, "select": 1, "store": 1, "linear": 1}
# Shares of a run's minutes after which no more is screened, or measured for the choice.
SCREENED_BY, CHOSEN_BY = 0.4, 0.75

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class FrontierResult:
    """Rows of ``results.jsonl`` of kind ``measurement``, the choice, and where the files are."""

    rows: list[dict[str, Any]]
    choice: dict[str, Any] | None
    out: Path


@dataclass(frozen=True)
class Screened:
    """A setting as its screening found it: density, loss beyond the tolerance, time against dense's."""

    method: Method
    density: float
    excess: float
    time: float


def _in_order(settings: Sequence[Screened], role: Role) -> list[Method]:
    """A method's settings in the order in which they are measured in full.

    For prompts those within the tolerance, the sparsest first: the time of a short prompt tells little of a
    long one's, and what computes everything there shows no loss. Otherwise the fastest of them; if there is
    none, the one that is nearest to the tolerance.
    """
    fit = [t for t in settings if t.excess == 0]
    if role == "prefill" and fit:
        return [t.method for t in sorted(fit, key=lambda t: (t.density, t.time))]
    return [min(settings, key=lambda t: (t.excess, t.time)).method]


def _hopeless(role: Role, row: dict[str, Any], time: float) -> bool:
    """Whether a setting is so slow on a short prompt that a similar one would not turn it round."""
    if role == "prefill":
        return time > 1 and row["prefill_s"] > SLOWEST_PROMPT * row["dense_prefill_s"]
    return role in ("store", "linear") and time > SLOWEST


def _by_turns(candidates: Sequence[Method]) -> list[Method]:
    """The first setting of every method, then the second of each, and so on."""
    turns: dict[str, int] = {}
    placed = []
    for method in candidates:
        turns[method.card.slug] = turn = turns.get(method.card.slug, -1) + 1
        placed.append((turn, method))
    return [method for _, method in sorted(placed, key=lambda pair: pair[0])]


class Job:
    """One run of the frontier: shared state of its steps."""

    def __init__(
        self,
        options: FrontierOptions,
        loaded: LoadedModel,
        text: str,
        ids: Tensor,
        log: RunLog,
        say: Progress,
    ) -> None:
        self.options, self.loaded, self.text, self.log = options, loaded, text, log
        self.lengths = sorted(set(options.lengths))
        self.measuring = Measuring(loaded.model, ids, self.lengths, log, self._tick)
        self.judge = Judge(log, self.lengths, options.tolerance)
        self._say, self._done, self._total = say, 0.0, 1.0
        self._started, self._minutes = time.monotonic(), time_limit(options)
        self._late: list[str] = []

    def run(self, candidates: Sequence[Method]) -> FrontierResult:
        """All steps in order."""
        measuring = self.measuring
        # Work is counted in tokens: about two dense-equivalents of tasks, controls and compositions each.
        screened = len(candidates) > SCREEN_ABOVE
        kept = min(len(candidates), sum(SURVIVORS.values())) if screened else len(candidates)
        self._total = (kept + 12 + (1 + TASK_RECIPES) * sum(TASK_SAMPLES.values())) * sum(self.lengths)
        self._total += len(candidates) * self.lengths[0] if screened else 0
        self.log.add(self._run_row())
        self._measure_dense()
        settings = self._screen(candidates) if screened else [[method] for method in candidates]
        survivors = self._measure_survivors(settings)
        for composition in self.judge.compositions(survivors):
            what = " + ".join(m.spec for m in composition)
            if self._in_time(CHOSEN_BY, what, known=self._measured(composition)):
                measuring.measure_all(composition, "composition")
        for n in self.lengths:
            measuring.time_dense_again(n)
        choice = self.judge.choose()
        self._recipe(choice).save(self.options.out / "recipe.json")
        self.log.add(choice)
        recipes = [[], *self.judge.finalists()[:TASK_RECIPES]]
        chosen = [parse_spec(s) for s in choice["recipe"]]
        # The choice stands; a look that does not fit into memory or time is left out.
        self._look("maps", lambda: draw_maps(measuring, chosen, survivors))
        for control in self._controls(survivors):
            if self._in_time(1.0, control.spec, known=self._measured([control])):
                measuring.measure_all([control], "control")
        if self._in_time(1.0, "recall", known=bool(self.log.of("inspection"))):
            self._look("recall", lambda: inspect(measuring, survivors))
        self._look("tasks", lambda: self._ask(recipes))
        if self._late:
            reason = f"the run's {self._minutes:g} minutes were over"
            self.log.add({"kind": "left_out", "what": "; ".join(self._late), "reason": reason, "late": True})
        self.log.close()
        self._say("writing the report", 1.0)
        write_report(self.log.path, self.options.out / "report.html")
        rows = with_fastest_dense(measuring.rows(), self.log.of("drift"))
        return FrontierResult(rows, choice, self.options.out)

    def _measure_dense(self) -> None:
        """The dense model at every length, then on the library's own kernels, the other rival.

        A length that it has no memory for is left out.

        Raises:
            SparselandError: it has none for any.
        """
        for n in [*self.lengths]:
            try:
                self.measuring.measure_dense(n)
            except (MemoryError, RuntimeError) as error:
                reason = survivable(error)
                self.lengths.remove(n)
                self.log.add({"kind": "left_out", "length": n, "reason": reason})
                if not self.lengths:
                    raise SparselandError(f"the dense model can't read {n} tokens here: {reason}") from error
        self.measuring.measure_all([method_class("dense").full_budget(self.lengths[-1])], "control")

    def _in_time(self, share: float, what: str, *, known: bool) -> bool:
        """Whether less than this share of the run's minutes has passed; what comes too late is noted.

        What the log knows from an earlier run takes no time.
        """
        if known or time.monotonic() - self._started < 60 * self._minutes * share:
            return True
        self._late.append(what)
        return False

    def _measured(self, methods: Sequence[Method]) -> bool:
        """Whether the log has a configuration at every length."""
        specs = [m.spec for m in methods]
        return all(self.judge.full(specs, n) for n in self.lengths)

    def _ask(self, recipes: Sequence[Sequence[str]]) -> None:
        """Each task at every length, the shortest prompts first."""
        for (name, count), length in itertools.product(TASK_SAMPLES.items(), self.lengths):
            asked = [self.log.of("task", recipe=[*r], task=name, length=length) for r in recipes]
            known = all(len(rows) >= count for rows in asked)
            if self._in_time(1.0, f"{name} at {length} tokens", known=known):
                task = Task(name, length, count, self.options.seed)
                score_task(self.measuring, self.loaded, self.text, recipes, task)

    def _look(self, what: str, look: Callable[[], None]) -> None:
        """A look at what was chosen; memory that does not suffice becomes a row."""
        try:
            look()
        except FAILURES as error:
            self.log.add({"kind": "left_out", "what": what, "reason": survivable(error)})

    def _screen(self, candidates: Sequence[Method]) -> list[list[Method]]:
        """Try every candidate shortly at the shortest length; per role the best methods go on.

        Returns:
            for each method that goes on, the settings to measure in full until one is within the tolerance
            (see ``_in_order``). Methods within the tolerance come first, the fastest in front: what exceeds
            it on a short prompt could not be chosen, whatever it does on longer ones; nor could a store or a
            linear layer that is far slower than dense.
        """
        length = self.lengths[0]
        similar = self.lengths[-1] <= SIMILAR * length
        found: dict[Role, dict[str, list[Screened]]] = {role: {} for role in SURVIVORS}
        skipped: list[Method] = []
        for method in _by_turns(candidates):
            tried = self.measuring.rows(recipe=[method.spec], length=length, stage="screen", status="ok")
            # One that acts on prompts, whatever the time: with nothing to choose from, a run is of no use.
            if found["prefill"] and not self._in_time(
                SCREENED_BY, f"screening {method.spec}", known=bool(tried)
            ):
                skipped.append(method)
                continue
            self._tick(f"screening {method.spec}", length)
            self.measuring.measure_one([method], "method", length, stage="screen")
            rows = self.measuring.rows(recipe=[method.spec], length=length, stage="screen", status="ok")
            if rows:
                row, role = rows[-1], next(r for r in SURVIVORS if r in method.roles)
                setting = Screened(method, row["density"], self.judge.excess(row), relative_time(row))
                if similar and _hopeless(role, row, setting.time):
                    continue
                found[role].setdefault(method.card.slug, []).append(setting)
        survivors: list[list[Method]] = []
        for role, by_slug in found.items():
            # By loss where the tolerance is exceeded, else by time.
            ranked = sorted(by_slug.values(), key=lambda settings: min((t.excess, t.time) for t in settings))
            survivors += [_in_order(settings, role) for settings in ranked[: SURVIVORS[role]]]
        # Settings that there was no time to try: a grid's later ones leave less out, and are tried if those
        # before them lose too much.
        return [[*some, *(m for m in skipped if m.card.slug == some[0].card.slug)] for some in survivors]

    def _measure_survivors(self, settings: Sequence[Sequence[Method]]) -> list[Method]:
        """Measure each method's settings until one stays within the tolerance at every length.

        The likeliest come first, and one of them is measured whatever the time.
        """
        survivors: list[Method] = []
        for some in settings:
            for method in some:
                known = not survivors or self._measured([method])
                if not self._in_time(CHOSEN_BY, f"{method.spec} in full", known=known):
                    break
                self.measuring.measure_all([method], "method")
                survivors.append(method)
                if self.judge.within([method.spec]):
                    break
        return survivors

    def _controls(self, candidates: Sequence[Method]) -> list[Method]:
        """Controls at the density of the best prefill method: they show what its choice of pairs does."""
        method = None if self.options.methods else self.judge.best(candidates, "prefill")
        if method is None:
            return []
        row = self.judge.full([method.spec], self.lengths[-1])[-1]
        classes = [method_class(s) for s in method_slugs()]
        return [
            cls.at_density(row["density"], self.lengths[-1])
            for cls in classes
            if cls.card.control and cls.card.slug != "dense"
        ]

    def _recipe(self, choice: dict[str, Any]) -> Recipe:
        methods = [parse_spec(s) for s in choice["recipe"]]
        known = self.measuring.known(methods)
        if any(m.calibrates() and m.card.slug not in known for m in methods):
            # A resumed run measured it before; learn it again, from the same tokens.
            with self.measuring.applied(methods):
                known = self.measuring.known(methods)
        rows = [r for n in self.lengths for r in self.judge.full(choice["recipe"], n)]
        rows = with_fastest_dense(rows, self.log.of("drift"))
        kept = [{k: v for k, v in r.items() if k != "head_density"} for r in rows]
        evidence = {"reason": choice["reason"], "measurements": kept, **circumstances(self.options.command)}
        return Recipe.of(self.loaded.model, methods, known, evidence)

    def _run_row(self) -> dict[str, Any]:
        model: Any = self.loaded.model
        tokens = self.measuring.ids.numel()
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        return {
            "kind": "run", "schema": SCHEMA, "fingerprint": self.log.fingerprint,
            **circumstances(self.options.command),
            "model": {
                "name": self.loaded.name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "layers": config.num_hidden_layers, "heads": heads,
                "kv_heads": getattr(config, "num_key_value_heads", heads),
                "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            },
            "text": {"name": str(self.options.text or "Python documentation"), "tokens": tokens},
            "lengths": self.lengths, "tolerance": self.options.tolerance,
            "not_measured": [] if self.options.methods else left_out(),
        }  # fmt: skip

    def _tick(self, message: str, tokens: float) -> None:
        """Tell what comes next; the share of work is counted in tokens."""
        self._say(message, min(self._done / self._total, 0.99))
        self._done += tokens
