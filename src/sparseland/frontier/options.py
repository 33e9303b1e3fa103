"""What a run of the frontier was asked for, and the settings that it therefore tries."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparseland.errors import SparselandError
from sparseland.method import Method, method_class, method_slugs, parse_spec

# A default run takes the last settings of each grid: the likeliest to stay within a small tolerance. Where
# calibration takes minutes on a CPU, only the last.
DEFAULT_SETTINGS = 2
SLOW_SETTINGS = 1
DEFAULT_LENGTHS = (2048, 4096)
GPU_LENGTHS = (8192, 32_768)
# Minutes of measuring in the default run, on either scale.
DEFAULT_MINUTES = 14.0


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
        rope_scale: YaRN factor for lengths beyond the model's own context; "fit": what the longest needs.
        minutes: after about so many, what is left to measure is left out, and named; a rerun with more goes
            on from there. 0: no limit. None: 14 where model, methods and lengths are the defaults (of a CPU
            or of ``--gpu``), else 0.
        seed: for the tasks.
        command: shown in the report.
    """

    model: str | None = None
    text: Path | None = None
    methods: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [*DEFAULT_LENGTHS])
    tolerance: float = 0.01
    out: Path = Path("frontier")
    dtype: str = "auto"
    device: str | None = None
    rope_scale: float | Literal["fit"] | None = None
    minutes: float | None = None
    seed: int = 0
    command: str = "sparseland frontier"


def check(options: FrontierOptions) -> None:
    if not options.lengths or min(options.lengths) < 128:
        raise SparselandError(f"lengths={options.lengths} is not allowed; each must be at least 128 tokens")
    if options.minutes is not None and not 0 <= options.minutes < 1e6:
        raise SparselandError(f"minutes={options.minutes} is not allowed; it must be >= 0 and < 1000000")
    if not 0 <= options.tolerance < 10:
        raise SparselandError(f"tolerance={options.tolerance} is not allowed; it must be >= 0 and < 10")


def time_limit(options: FrontierOptions) -> float:
    """Minutes that measuring may take."""
    if options.minutes is None:
        lengths = tuple(sorted(options.lengths)) in (DEFAULT_LENGTHS, GPU_LENGTHS)
        return DEFAULT_MINUTES if lengths and not options.model and not options.methods else math.inf
    return options.minutes or math.inf


def candidates(options: FrontierOptions) -> list[Method]:
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
    # Grids for short prompts repeat themselves.
    return list({method.spec: method for method in chosen}.values())


def left_out() -> dict[str, str]:
    """Methods measured only if they are named, and why."""
    classes = [method_class(slug) for slug in method_slugs()]
    why = {c.card.slug: "it has to be trained first" for c in classes if c.card.training == "training"}
    return why | {c.card.slug: c.left_out for c in classes if c.left_out}
