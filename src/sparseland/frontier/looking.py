"""A closer look at what was measured: recall and selection time, tasks, maps of the computed pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparseland.frontier.measuring import Measuring
from sparseland.method import Method, parse_spec
from sparseland.models import LoadedModel
from sparseland.tasks import TASKS, score_sample

MAP_BINS = 64
LONGEST_MAP = 8192
# Pictures of where methods spend their pairs: so many methods, besides the chosen recipe's.
MAPPED_METHODS = 3


def inspect(measuring: Measuring, survivors: Sequence[Method]) -> None:
    """Recall, and the time of choosing against that of computing, for what acts on prompts."""
    length = measuring.lengths[-1]
    for method in survivors:
        if "prefill" not in method.roles or measuring.log.of("inspection", recipe=[method.spec]):
            continue
        if not measuring.rows(recipe=[method.spec], length=length, stage="full", status="ok"):
            continue
        measuring.tick(f"recall of {method.spec}", 2 * length)
        with measuring.applied([method], recall=True, timing=True) as handle, torch.no_grad():
            assert handle is not None
            ids = measuring.window(length)[None, :length].to(next(measuring.model.parameters()).device)
            measuring.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            stats = handle.stats()
        layers = [layer for layer in stats.layers if layer.attend_s is not None]
        measuring.log.add(
            {
                "kind": "inspection", "recipe": [method.spec], "length": length,
                "density": stats.density, "recall": stats.recall,
                "select_s": sum(layer.select_s or 0.0 for layer in layers),
                "attend_s": sum(layer.attend_s or 0.0 for layer in layers),
            }
        )  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is asked: a task's name, the prompt's tokens, how many samples, and their seed."""

    name: str
    length: int
    count: int
    seed: int


def score_task(
    measuring: Measuring, loaded: LoadedModel, text: str, recipes: Sequence[Sequence[str]], task: Task
) -> None:
    """One task, for dense and these recipes."""
    samples = TASKS[task.name](loaded.tokenizer, text, task.length, task.count, task.seed)
    for specs in map(list, recipes):
        work = len(samples) * task.length
        measuring.tick(f"{task.name}: {' + '.join(specs) or 'dense'}, {task.length} tokens", work)
        if len(measuring.log.of("task", recipe=specs, task=task.name, length=task.length)) >= len(samples):
            continue
        with measuring.applied([parse_spec(s) for s in specs]):
            for sample in samples:
                measuring.log.add(
                    {
                        "kind": "task", "recipe": specs, "task": task.name, "length": task.length,
                        "depth": sample.depth, "correct": score_sample(measuring.model, sample),
                    }
                )  # fmt: skip


def draw_maps(measuring: Measuring, chosen: Sequence[Method], survivors: Sequence[Method]) -> None:
    """Where the true attention lies and what is computed: heads of the chosen recipe, one of others."""
    from sparseland.report.attention_maps import attention_map_rows

    length = min(measuring.lengths[-1], LONGEST_MAP)  # at short lengths many methods are dense
    others = [
        m for m in survivors if "prefill" in m.roles and m.card.slug not in {c.card.slug for c in chosen}
    ]
    first_of_each = {m.card.slug: m for m in reversed(others)}.values()
    recipes: list[tuple[Sequence[Method], dict[str, int]]] = [(chosen, {})]
    recipes += [([m], {"layers": 1, "heads": 2}) for m in [*first_of_each][:MAPPED_METHODS]]
    for methods, size in recipes:
        specs = [m.spec for m in methods]
        if not any("prefill" in m.roles for m in methods) or measuring.log.of("map", recipe=specs):
            continue
        measuring.tick(f"attention maps of {' + '.join(specs)}", length)
        tokens = measuring.window(length)[:length]
        rows = attention_map_rows(
            measuring.model, methods, measuring.known(methods), tokens, bins=MAP_BINS, **size
        )
        for row in rows:
            measuring.log.add({"kind": "map", "recipe": specs, "length": length, **row})
