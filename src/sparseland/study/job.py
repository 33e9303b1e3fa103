"""The study of the Sparse Frontier on given models: settings that fit, cells measured, rows written.

A *cell* is a model, a task, a length, a unit and a compression; its samples are the same for every unit, so
that all comparisons are paired.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseland.attention.sparse_frontier import DECODE_UNITS, PREFILL_UNITS, UNITS, SparseFrontier
from sparseland.errors import SparselandError
from sparseland.handle import apply
from sparseland.laws._flops import ModelShape
from sparseland.machine import circumstances
from sparseland.method import parse_spec
from sparseland.models import LoadedModel, load_model
from sparseland.models.capture import capture_qkv
from sparseland.models.surgery import attention_layers
from sparseland.study import ask
from sparseland.study.analysis import can_do
from sparseland.study.journal import Journal
from sparseland.tasks import TASKS, Sample
from sparseland.tasks.text import default_text, load_text, tokenize

SCHEMA = 1
LENGTHS = (1024,)
COMPRESSIONS = (1.0, 2.0, 4.0, 8.0, 16.0)
STUDY_TASKS = ("needle", "variables", "story-retrieval")
# Layers whose attention the budgets are fitted on.
FIT_LAYERS = 3
# Tokens read at once: bounds memory; more keep a GPU busy.
BATCH_TOKENS = {"cpu": 8192, "cuda": 131_072}
# The size that these belong to; larger models read fewer at once.
BATCH_PARAMS = 2e8

Progress = Callable[[str, float], None]
# Dense prompts kept for all decoding cells of a task; beyond, they are read again.
READ_BYTES = 8 * 2**30


@dataclass(frozen=True)
class StudyOptions:
    """What ``sparseland study sparse-frontier`` was asked for.

    Args:
        models: Hugging Face ids or folders, one size each; empty = the embedded default.
        units: names of units.
        compressions: nominal ones; the measured ones are what counts. Dense (1) is always measured.
        lengths: prompt lengths in tokens.
        tasks: names in ``TASKS``.
        samples: per task and length.
        out: folder for results.jsonl, summary.json and report.html.
        generate: also decode greedily, beside comparing likelihoods.
        choose: ask sparse settings for the wrong answers, too; else only the dense model is asked, which
            decides whether the task counts.
        uncounted: also measure sparse settings on tasks that the dense model can't do.
        seconds: start no more cells after this time (None: measure all).
    """

    models: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=lambda: list(UNITS))
    compressions: list[float] = field(default_factory=lambda: list(COMPRESSIONS))
    lengths: list[int] = field(default_factory=lambda: list(LENGTHS))
    tasks: list[str] = field(default_factory=lambda: list(STUDY_TASKS))
    samples: int = 12
    out: Path = Path("study")
    text: Path | None = None
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    generate: bool = True
    choose: bool = True
    uncounted: bool = False
    seconds: float | None = None
    command: str = "sparseland study sparse-frontier"


def check(options: StudyOptions) -> None:
    """Refuse what can be refused without a model.

    Raises:
        SparselandError: an unknown unit or task, a length, compression or number that is not allowed.
    """
    for name, given, known in (("units", options.units, UNITS), ("tasks", options.tasks, tuple(TASKS))):
        if not given:
            raise SparselandError(f"--{name} is empty; choose from {', '.join(known)}")
        for value in given:
            if value not in known:
                raise SparselandError(f"--{name}: no {value!r}; it must be one of {', '.join(known)}")
    for length in options.lengths or [0]:
        if length < 128:
            raise SparselandError(f"--lengths: {length} is not allowed; a prompt has at least 128 tokens")
    for compression in options.compressions:
        if not 1 <= compression <= 1000:
            raise SparselandError(f"--compression: {compression:g} is not allowed; it must be 1 to 1000")
    if options.samples < 1:
        raise SparselandError(f"--samples {options.samples} is not allowed; it must be 1 or more")


def measure(options: StudyOptions, progress: Progress | None = None) -> list[dict[str, Any]]:
    """Measure every cell that is not in ``results.jsonl`` yet; all its rows are returned.

    Raises:
        SparselandError: a model, text, task or folder can't be used.
    """
    check(options)
    say = progress or (lambda message, done: None)
    text = default_text() if options.text is None else load_text(options.text)
    with _Lazy(options, text) as lazy:
        names: list[str | None] = [*options.models] or [None]
        for i, name in enumerate(names):
            say(f"loading {name or 'the embedded model'}", i / len(names))
            loaded = load_model(name, options.dtype, options.device, length=max(options.lengths))
            part = partial(_part, say, i, len(names))
            _Model(options, loaded, text, lazy, part).run()
        return lazy.journal.rows


def _part(say: Progress, index: int, count: int, message: str, done: float) -> None:
    """Progress within the ``index``-th of ``count`` models."""
    say(message, (index + done) / count)


class _Lazy:
    """The journal, opened when the first model has been loaded: a mistake before that leaves no folder."""

    def __init__(self, options: StudyOptions, text: str) -> None:
        self._options = options
        self._journal: Journal | None = None
        parts = [SCHEMA, options.seed, options.samples, options.dtype, options.generate, options.choose]
        digest = hashlib.sha256(json.dumps(parts).encode())
        digest.update(text.encode())
        self._fingerprint = digest.hexdigest()
        self.start = time.perf_counter()

    @property
    def journal(self) -> Journal:
        if self._journal is None:
            self._journal = Journal(self._options.out, self._fingerprint)
            head = {"kind": "study", "fingerprint": self._fingerprint, **circumstances(self._options.command)}
            self._journal.add(head)
        return self._journal

    def __enter__(self) -> _Lazy:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._journal is not None:
            self._journal.__exit__(*error)


class _Model:
    """One model's part of the study."""

    def __init__(
        self, options: StudyOptions, loaded: LoadedModel, text: str, lazy: _Lazy, say: Progress
    ) -> None:
        self.options, self.text, self.say, self.lazy = options, text, say, lazy
        self.model: Any = loaded.model
        self.tokenizer, self.name = loaded.tokenizer, loaded.name
        self.device = next(self.model.parameters()).device
        self.shape = ModelShape.of(self.model)
        self.journal: Journal
        cells = len(options.units) * len([c for c in options.compressions if c > 1]) + 1
        self.total = cells * sum(options.lengths) * len(options.tasks)
        self.done = 0

    def run(self) -> None:
        """Every length and task; the dense cell first, which the others are paired with."""
        wanted = [(task, n) for n in sorted(set(self.options.lengths)) for task in self.options.tasks]
        # Tokenizers let go of the interpreter, so that threads make long prompts while others are measured.
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            self.say(f"{self.name}: making prompts", self.done / self.total)
            # One of each first: a length or text that does not fit is told before there is a folder.
            for first in [pool.submit(self._make, task, length, 1) for task, length in wanted]:
                first.result()
            made = [pool.submit(self._make, task, length, self.options.samples) for task, length in wanted]
            try:
                self._measure(wanted, made)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, task: str, length: int, count: int) -> list[Sample]:
        return TASKS[task](self.tokenizer, self.text, length, count, self.options.seed)

    def _measure(self, wanted: Sequence[tuple[str, int]], made: Sequence[Future[list[Sample]]]) -> None:
        self.journal = self.lazy.journal
        if not self.journal.of("model", model=self.name):
            dtype = str(next(self.model.parameters()).dtype).removeprefix("torch.")
            shape = {name: getattr(self.shape, name) for name in self.shape.__dataclass_fields__}
            device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
            self.journal.add({"kind": "model", "model": self.name, "dtype": dtype, "device": device, **shape})
        for (task, length), samples in zip(wanted, made, strict=True):
            self._task(task, length, samples.result())

    # ---------------------------------------------------------------- settings

    def _settings(self, length: int) -> dict[tuple[str, float], str]:
        """Unit and compression -> spec, fitted to a prompt of real text."""
        found: dict[tuple[str, float], str] = {}
        inputs: list[Any] | None = None
        for unit in self.options.units:
            for compression in sorted({c for c in self.options.compressions if c > 1}):
                place = {"model": self.name, "length": length, "unit": unit, "compression": compression}
                known = self.journal.of("setting", **place)
                if not known:
                    if unit in ("vertical-slash", "flexprefill") and inputs is None:
                        self.say(f"{self.name}: fitting budgets, {length} tokens", self.done / self.total)
                        inputs = list(self._inputs(length))
                    method = SparseFrontier.at_sparsity(unit, compression, length, inputs or ())
                    known = [self.journal.add({"kind": "setting", **place, "spec": method.spec})]
                found[unit, compression] = known[0]["spec"]
        return found

    def _inputs(self, length: int) -> Iterator[Any]:
        ids = tokenize(self.tokenizer, self.text)
        if ids.numel() < length:
            raise SparselandError(f"the text has {ids.numel()} tokens; {length} are needed")
        start = (ids.numel() - length) // 2
        layers = sorted(attention_layers(self.model))
        some = {layers[(2 * i + 1) * len(layers) // (2 * FIT_LAYERS)] for i in range(FIT_LAYERS)}
        return capture_qkv(self.model, ids[None, start : start + length], some)

    # ------------------------------------------------------------------- cells

    def _task(self, task: str, length: int, samples: Sequence[Sample]) -> None:
        if self._late():
            return
        plan: list[tuple[str, float, str]] = [("dense", 1.0, "")]
        for (unit, compression), spec in self._settings(length).items():
            # A unit that can't be sparser gets the same setting for a higher compression: measured once.
            if spec not in {known for *_, known in plan}:
                plan.append((unit, compression, spec))
        ids = ask.equal_prompts(samples, self.tokenizer)
        # What opens the answer is decoded; it differs by a token or two between samples.
        cut = ids.shape[1] - max(1, min(s.opened for s in samples))
        reads: dict[int, ask.Read] = {}
        size = self._batch(ids.shape[1])
        for unit, compression, spec in plan:
            place = {
                "model": self.name,
                "task": task,
                "length": length,
                "unit": unit,
                "compression": compression,
            }
            what = "dense" if unit == "dense" else f"{unit} {compression:g}x"
            self.say(f"{self.name}: {task}, {length} tokens, {what}", min(1.0, self.done / self.total))
            self.done += length
            known = self.journal.of("cell", status="ok", **place)
            if known or self._late() or (unit != "dense" and self._beyond(task, length)):
                continue
            begun = time.perf_counter()
            try:
                scores, density = self._cell(spec, ids, cut, samples, size, reads)
                row = {"status": "ok", "density": density, **vars(scores), "tokens": ids.shape[1]}
                row["offered"] = 1 + min(len(s.others) for s in samples)
            except (torch.OutOfMemoryError, MemoryError) as error:
                reads.clear()
                row = {"status": "failed", "reason": f"out of memory: {error}".splitlines()[0]}
            row["seconds"] = round(time.perf_counter() - begun, 3)
            self.journal.add({"kind": "cell", **place, "phase": phase_of(unit), "spec": spec, **row})

    def _beyond(self, task: str, length: int) -> bool:
        """Whether the dense model can't do a task, so that what sparse settings do would not count."""
        dense = self.journal.of("cell", status="ok", model=self.name, task=task, length=length, unit="dense")
        return not self.options.uncounted and bool(dense) and not can_do(dense[0])

    def _late(self) -> bool:
        limit = self.options.seconds
        return limit is not None and time.perf_counter() - self.lazy.start > limit

    def _batch(self, length: int) -> int:
        tokens = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cpu"])
        return max(1, int(tokens * min(1.0, BATCH_PARAMS / self.shape.params)) // length)

    def _cell(
        self,
        spec: str,
        ids: Tensor,
        cut: int,
        samples: Sequence[Sample],
        size: int,
        reads: dict[int, ask.Read],
    ) -> tuple[ask.Scores, float]:
        """Scores of all samples, and the density of the phase that the unit acts in."""
        scores, densities = ask.Scores(), []
        method = parse_spec(spec) if spec else None
        decoding = method is not None and "prefill" not in method.roles
        for at in range(0, len(samples), size):
            batch, part = samples[at : at + size], ids[at : at + size].to(self.device)
            if decoding:
                assert isinstance(method, SparseFrontier)
                found, density = self._decode(method, part, cut, batch, reads, at)
            else:
                found, density = self._prompt(method, part, batch)
            scores.extend(found)
            densities.append((density, len(batch)))
        return scores, sum(d * n for d, n in densities) / len(samples)

    @torch.no_grad()
    def _prompt(self, method: Any, ids: Tensor, batch: Sequence[Sample]) -> tuple[ask.Scores, float]:
        """A method on the prompt; the answer is dense."""
        if method is None:
            out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
            density = 1.0
        else:
            with apply(self.model, method) as handle:
                out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
                density = handle.stats().density or 1.0
        scores = ask.answers(
            self.model, out.past_key_values, out.logits[:, -1], batch, stepwise=False,
            generate=self.options.generate, choose=self.options.choose or method is None,
        )  # fmt: skip
        return scores, density

    @torch.no_grad()
    def _decode(
        self,
        method: SparseFrontier,
        ids: Tensor,
        cut: int,
        batch: Sequence[Sample],
        reads: dict[int, ask.Read],
        at: int,
    ) -> tuple[ask.Scores, float]:
        """A method on the answer; the prompt is dense, read once for all decoding cells."""
        shared = not ask.windowed(self.model)
        if shared and at not in reads:
            new = ask.read(self.model, ids[:, :cut])
            if sum(r.nbytes() for r in (new, *reads.values())) > READ_BYTES:
                reads.clear()
            reads[at] = new
        with apply(self.model, method) as handle:
            if shared:
                cache, logits = ask.shown(self.model, handle, reads[at]), reads[at].logits
            else:
                out = self.model(input_ids=ids[:, :cut], use_cache=True, logits_to_keep=1)
                cache, logits = out.past_key_values, out.logits[:, -1]
            for token in torch.split(ids[:, cut:], 1, dim=1):
                logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            scores = ask.answers(
                self.model, cache, logits, batch, stepwise=True, generate=self.options.generate,
                choose=self.options.choose,
            )  # fmt: skip
            density = handle.stats().decode_density
        assert density is not None
        return scores, density


def phase_of(unit: str) -> str:
    """``prefill``, ``decode`` or ``dense``."""
    return "prefill" if unit in PREFILL_UNITS else "decode" if unit in DECODE_UNITS else "dense"
