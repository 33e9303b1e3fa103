"""What a benchmark consists of, and how its times become rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparseland.bench.inputs import device
from sparseland.errors import SparselandError
from sparseland.measure import timed

ROUNDS = 15
FEWEST_ROUNDS = 3
SECONDS = 1.0  # of one case, as soon as the fewest rounds are done

Work = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Args:
        labels: what tells the row from others.
        ours: the op.
        rivals: dense rivals, each a piece of work or the reason why it can't run here.
        density: part of the rivals' pairs or bytes that the op needs; None where there is no such part.
        beside: what is timed but is no dense rival: the selection, sparse peers.
    """

    labels: dict[str, Any]
    ours: Work
    rivals: dict[str, Work | str]
    density: float | None = None
    beside: dict[str, Work | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Cases of a length and a density (None: the defaults); a case's inputs are made when it is called."""

    cases: Callable[[int | None, float | None], Sequence[Callable[[], Case]]]
    options: frozenset[str] = frozenset({"length", "density"})


def measure(case: Case) -> dict[str, Any]:
    """The row of a case; a rival that can't run or fails stands in ``not_run`` with its reason.

    Raises:
        SparselandError: no rival could run.
    """
    not_run = {}
    works = {}
    for name, work in {**case.rivals, **case.beside}.items():
        if isinstance(work, str):
            not_run[name] = work
            continue
        try:
            work()
        except Exception as problem:  # a rival's failure is a result, whatever it is
            not_run[name] = _reason(problem)
        else:
            works[name] = work
    rivals = [name for name in case.rivals if name in works]
    if not rivals:
        raise SparselandError(
            f"no dense rival could run ({'; '.join(f'{k}: {v}' for k, v in not_run.items())})"
        )
    case.ours()
    times = interleaved({**works, "ours": case.ours})
    rival = min(rivals, key=lambda name: times[name])
    dense, ours = times[rival], times["ours"]
    return {
        **case.labels,
        **({} if case.density is None else {"density": case.density}),
        "rival": rival,
        "dense_ms": 1e3 * dense,
        "ours_ms": 1e3 * ours,
        **{f"{name}_ms": 1e3 * times[name] for name in case.beside if name in times},
        "speedup": dense / ours,
        **({} if case.density is None else {"of_ideal": case.density * dense / ours}),
        "rivals_ms": {name: 1e3 * times[name] for name in rivals},
        "not_run": not_run,
    }


def interleaved(works: dict[str, Work]) -> dict[str, float]:
    """Median seconds of each piece of work (warm already), run in turn."""
    times: dict[str, list[float]] = {name: [] for name in works}
    where, begun = torch.device(device()), time.perf_counter()
    for done in range(ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begun > SECONDS:
            break
        for name, work in works.items():
            times[name].append(timed(work, where)[0])
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def _reason(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0][:200]}" if lines else type(problem).__name__
