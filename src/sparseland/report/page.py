"""The page: what stands where, in plain data; ``report.html.jinja`` gives it its form."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from sparseland.errors import SparselandError
from sparseland.files import write_atomically
from sparseland.report import figures, provenance, selection
from sparseland.report.pareto import loss_change, number, ratio
from sparseland.report.results import Recipe, Results, key, read_results, score
from sparseland.report.rows import Line, lines
from sparseland.report.words import (
    NONE,
    fixed,
    percent,
    recipe_name,
    significant,
    size,
    spec_name,
    speedup,
    times,
    verdict,
)

MAX_DENSITY_MAPS = 8
MAX_ATTENTION_MAPS = 6
MAX_NEEDLE_GRIDS = 4


def write_page(results: Path, out: Path) -> None:
    """See :func:`sparseland.report.write_report`."""
    page = render(read_results(results))
    try:
        write_atomically(out, page.encode())
    except OSError as cause:
        raise SparselandError(f"can't write {out}: {cause.strerror or cause}") from cause


def render(results: Results) -> str:
    """The whole page as HTML."""
    if not results.measurements:
        raise SparselandError("there is no measurement to report yet")
    files = resources.files("sparseland.report")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files / "report.html.jinja").read_text(encoding="utf-8"))
    marks = figures.families(results.measurements)
    return template.render(
        # The package's own files, not a user's text: the only strings besides plots that are not escaped.
        css=Markup((files / "report.css").read_text(encoding="utf-8")),
        js=Markup((files / "report.js").read_text(encoding="utf-8")),
        run=results.run,
        subtitle=_subtitle(results.run),
        verdict=_lead(results),
        spell=_spell,
        tiles=_tiles(results),
        usage=_usage(results),
        sections=[_section(results, length, marks) for length in results.lengths],
        marks=[(mark, Markup(_SHAPES[mark.marker])) for mark in marks.values()],
        selections=_selections(results, marks),
        densities=_densities(results),
        maps=_maps(results),
        needles=_needles(results),
        drifts=provenance.drifts(results),
        facts=provenance.facts(results),
        protocol=provenance.protocol(results),
        none=NONE,
    )


# Legend symbols in a box of 12 × 12, the same shapes that matplotlib draws.
_SHAPES = {
    "o": '<circle cx="6" cy="6" r="4"/>',
    "s": '<rect x="2.4" y="2.4" width="7.2" height="7.2"/>',
    "^": '<path d="M6 2 10.2 10H1.8Z"/>',
    "v": '<path d="M6 10 10.2 2H1.8Z"/>',
    "D": '<path d="M6 1 11 6 6 11 1 6Z"/>',
    "P": '<path d="M4.4 1.5h3.2v2.9h2.9v3.2H7.6v2.9H4.4V7.6H1.5V4.4h2.9Z"/>',
    "X": '<path transform="rotate(45 6 6)" d="M4.4 1.5h3.2v2.9h2.9v3.2H7.6v2.9H4.4V7.6H1.5V4.4h2.9Z"/>',
    "*": '<path d="M6 .4 7.4 4.3h4.2L8.2 6.8l1.3 4L6 8.4l-3.5 2.4 1.3-4L.4 4.3h4.2Z"/>',
}


def _spell(recipe: Sequence[str]) -> Markup:
    """A recipe that may break between its specs and parameters, but not inside a name."""
    if not recipe:
        return Markup("dense")
    specs = []
    for spec in recipe:
        pieces = (f"<span>{escape(piece)}</span>" for piece in re.split(r"(?<=[:,])", spec_name(spec)))
        specs.append("<wbr>".join(pieces))
    return Markup('<span class="recipe">{}</span>').format(Markup(" + ".join(specs)))


def _lead(results: Results) -> Markup:
    """The verdict, with the recipe's name spelt so that it breaks well."""
    text = " ".join(verdict(results))
    name = recipe_name(results.chosen or ())
    if results.chosen and text.startswith(name):
        return Markup("<strong>{}</strong>{}").format(_spell(results.chosen), text.removeprefix(name))
    return Markup("{}").format(text)


def _subtitle(run: dict[str, Any]) -> str:
    model, text, machine = (run.get(k) or {} for k in ("model", "text", "machine"))
    parts = [
        model.get("dtype"),
        text.get("name") and f"text: {text['name']}",
        machine.get("gpu") or machine.get("cpu"),
    ]
    return " · ".join(str(p) for p in parts if p)


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """The choice at a glance: name, number, the numbers behind it."""
    if not results.choice or not results.chosen:
        return []
    row = results.row(results.chosen, results.choice.get("length", 0))
    if row is None:
        return []
    tasks, length = results.tasks, row["length"]
    ours, dense = score(tasks, key(row), length), score(tasks, (), length)

    def both(text: Callable[[float | None], str], name: str) -> str:
        return f"{text(number(row, name))}, dense {text(number(row, f'dense_{name}'))}"

    cache = ratio(row, "cache_bytes", "dense_cache_bytes")
    tiles = [
        ("prompt", times(speedup(row, "prefill_s")), both(lambda v: significant(v, " s"), "prefill_s")),
        ("decoding", times(speedup(row, "decode_ms")), both(lambda v: significant(v, " ms"), "decode_ms")),
        ("cache bytes", times(cache), both(size, "cache_bytes")),
        ("loss", percent(loss_change(row)), both(lambda v: fixed(v, 3), "loss")),
    ]
    if ours and dense:
        tiles.append(("needles", f"{ours[0]} of {ours[1]}", f"dense {dense[0]} of {dense[1]}"))
    return tiles


def _usage(results: Results) -> dict[str, str] | None:
    """The chosen recipe in Python and on the command line."""
    if not results.choice or not results.chosen:
        return None
    recipe = str(results.choice.get("recipe_file") or "recipe.json")
    name = str((results.run.get("model") or {}).get("name") or "")
    from sparseland.models.embedded import NAME

    hub = name != NAME
    source = "import transformers" if hub else "from sparseland.models import load_model"
    model = f"transformers.AutoModelForCausalLM.from_pretrained({name!r})" if hub else "load_model().model"
    argument = shlex.quote(name) + " " if hub else ""
    return {
        "python": f"import sparseland as sl\n{source}\nmodel = {model}\n"
        f"handle = sl.Recipe.load({recipe!r}).apply(model)  # handle.remove() gives the dense model back",
        "shell": f"sparseland generate {argument}--recipe {shlex.quote(recipe)} --prompt-file prompt.txt",
    }


def _section(results: Results, length: int, marks: dict[str, figures.Mark]) -> dict[str, Any]:
    """One length: its table and its plots."""
    table = lines(results, length)
    rows = [line.row for line in table]
    numbers = {i: line.number for i, line in enumerate(table)}
    plots = [
        (kind.title, picture)
        for kind in figures.TRADEOFFS
        if (
            picture := figures.tradeoff(
                kind, rows, marks, numbers=numbers, tasks=results.tasks, chosen=results.chosen,
                tolerance=number(results.run, "tolerance"),
            )
        )
    ]  # fmt: skip
    return {
        "length": length,
        "lines": table,
        "plots": plots,
        "tasks": Line.tasks(results, length),
        "densities": Line.densities(results),
    }


def _interesting(results: Results, rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The chosen row first, then the sparsest setting of each other family, at most ``limit``."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (key(r) != results.chosen, number(r, "density") or 0)):
        best.setdefault("chosen" if key(row) == results.chosen else figures.family(row), row)
    order = sorted(best.values(), key=lambda r: (key(r) != results.chosen, r.get("role") == "control"))
    return order[:limit]


def _densities(results: Results) -> list[dict[str, Any]]:
    """Density per layer and head, for the chosen and a few other recipes at the longest length."""
    # Where the prompt is dense every head is 1; a picture of that says nothing.
    rows = [
        r
        for r in results.measurements
        if r.get("head_density") and r.get("status", "ok") == "ok" and (number(r, "density") or 0) < 1
    ]
    if not rows:
        return []
    length = (results.choice or {}).get("length")
    if not any(r["length"] == length for r in rows):
        length = max(r["length"] for r in rows)
    chosen = _interesting(results, [r for r in rows if r["length"] == length], MAX_DENSITY_MAPS)
    return [
        {
            "recipe": key(row),
            "chosen": key(row) == results.chosen,
            "caption": f"mean density {fixed(number(row, 'density'), 3)} at {length:,} tokens",
            "picture": figures.densities(
                row["head_density"],
                f"density-{i}",
                f"Density of each layer and head, {recipe_name(key(row))}",
            ),
        }
        for i, row in enumerate(chosen)
    ]


def _selections(results: Results, marks: dict[str, figures.Mark]) -> list[dict[str, Any]]:
    """Per length: recall curves, and where the time of attention goes."""
    out = []
    for length in sorted({row["length"] for row in results.inspections}):
        rows = [row for row in results.inspections if row["length"] == length]
        out.append(
            {
                "length": length,
                "recall": selection.recall_curves(rows, marks),
                "times": selection.time_split(rows),
            }
        )
    return out


def _maps(results: Results) -> list[dict[str, Any]]:
    """Attention maps, grouped by recipe, the chosen one first."""
    groups: dict[tuple[Recipe, int], list[dict[str, Any]]] = {}
    for m in results.maps:
        groups.setdefault((key(m), int(m["length"])), []).append(m)
    out = []
    for g, ((recipe, length), maps) in enumerate(
        sorted(groups.items(), key=lambda item: (item[0][0] != results.chosen, item[0]))
    ):
        pictures = [
            (
                f"layer {m['layer']}, head {m['head']}",
                figures.attention_map(
                    m["mass"], m["computed"], f"map-{g}-{i}",
                    f"Attention of layer {m['layer']}, head {m['head']}: true mass and computed pairs",
                ),
            )
            for i, m in enumerate(maps[:MAX_ATTENTION_MAPS])
        ]  # fmt: skip
        out.append({"recipe": recipe, "length": length, "pictures": pictures})
    return out


def _needles(results: Results) -> list[dict[str, Any]]:
    """Grids of found / asked over depth and length, per task: dense, the chosen, a few others."""
    grids = []
    for task in dict.fromkeys(str(t.get("task")) for t in results.tasks):
        items = [t for t in results.tasks if t.get("task") == task]
        recipes = sorted({key(t) for t in items}, key=lambda r: (r != (), r != results.chosen, r))
        columns = sorted({t["length"] for t in items})
        depths = sorted({float(t["depth"]) for t in items})
        for recipe in recipes[:MAX_NEEDLE_GRIDS]:
            own = [t for t in items if key(t) == recipe]
            table = []
            for depth in depths:
                cells = [
                    score([t for t in own if float(t["depth"]) == depth], recipe, length, task)
                    for length in columns
                ]
                table.append((f"{100 * depth:.0f} %", cells))
            grids.append(
                {
                    "task": task, "recipe": recipe, "name": recipe_name(recipe),
                    "chosen": recipe == results.chosen and bool(recipe), "lengths": columns, "rows": table,
                    "total": score(own, recipe, None, task),
                }
            )  # fmt: skip
    return grids
