"""The main job: measure methods and budgets on a model, keep the Pareto front, write the recipe.

Order of work: dense; a short screening of every method's grid at the shortest length; full measurements of
what it left, at every length; compositions of the best of each role; dense again (to show drift); attention
maps; recall and the time of selection; tasks for dense and the best; controls at the density of the best
prefill method. Each measurement is appended to ``results.jsonl`` as it is made, and a rerun with the same
model, text and settings continues where it stopped; so it does where a run's minutes were over.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from sparseland.errors import SparselandError
from sparseland.frontier.job import SCHEMA, FrontierResult, Job, Progress
from sparseland.frontier.measuring import CALIBRATION_TOKENS
from sparseland.frontier.options import FrontierOptions, candidates, check, left_out
from sparseland.frontier.runlog import RunLog
from sparseland.machine import machine
from sparseland.measure import DECODE_TOKENS
from sparseland.models import load_model
from sparseland.models.probe import probe
from sparseland.recipe import describe_model
from sparseland.tasks.text import default_text, load_text, tokenize


def run(options: FrontierOptions, progress: Progress | None = None) -> FrontierResult:
    """Measure, choose, and write ``recipe.json``, ``results.jsonl`` and ``report.html``.

    Raises:
        SparselandError: the model, text, lengths or output folder can't be used (nothing is written).
    """
    check(options)
    chosen = candidates(options)
    text = default_text() if options.text is None else load_text(options.text)
    say = progress or (lambda message, done: None)
    say("loading the model", 0.0)
    longest = max(options.lengths)
    loaded = load_model(options.model, options.dtype, options.device, options.rope_scale, longest)
    probe(loaded.model)  # what no method can serve is refused before anything is measured
    ids = tokenize(loaded.tokenizer, text)
    needed = CALIBRATION_TOKENS + longest + DECODE_TOKENS + 1
    if ids.numel() < needed:
        raise SparselandError(f"the text has {ids.numel()} tokens; {needed} are needed for length {longest}")
    log = RunLog(options.out, _fingerprint(options, loaded.model, ids))
    return Job(options, loaded, text, ids, log, say).run(chosen)


def _fingerprint(options: FrontierOptions, model: torch.nn.Module, ids: Tensor) -> str:
    """What makes earlier rows comparable: same model, tokens, type, device and machine."""
    device = str(next(model.parameters()).device)
    parts = [describe_model(model), str(next(model.parameters()).dtype), device, options.rope_scale]
    parts += [machine(), torch.get_num_threads(), SCHEMA]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update(ids.numpy().tobytes())
    return digest.hexdigest()


__all__ = ["FrontierOptions", "FrontierResult", "left_out", "run"]
