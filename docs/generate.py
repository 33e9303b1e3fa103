"""Write the generated pages of docs/ from the registry and the recorded results (``make docs``).

    python docs/generate.py            write them
    python docs/generate.py --check    exit code 1 and one line if what is written is stale

Pages: methods/SLUG.md and methods/index.md from the methods' cards, measurements.md from every JSON file
under benchmarks/results, which.md from some of them, curves/SLUG-TASK.svg from the claims of training. The
same input gives the same bytes: no date, no order of a folder gets in.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sparseland.cli.catalog import recorded_results
from sparseland.method import METHOD_PACKAGES, ROLES, Method, describe_params, method_class, method_slugs
from sparseland.report.curves import Task, curves_of, describe, draw_curves

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- Written by docs/generate.py (make docs); changes made here are lost. -->"

# The length whose grid a method's page shows: the longest of `sparseland frontier` by default.
GRID_LENGTH = 4096
NEEDS = {
    "none": "nothing: it works on any supported model at once",
    "calibration": "calibration: it reads some text once, before it is put on the model",
    "training": "training",
}

# What a column of the results is called on the page; a suffix that is a unit needs no entry.
COLUMNS = {
    "of_ideal": "of ideal",
    "speedup": "speed-up over dense",
    "naive_speedup": "speed-up, naive",
    "prefill_speedup": "prompt speed-up",
    "decode_speedup": "decoding speed-up",
    "TFLOPs": "TFLOP/s",
    "ms": "ms",
    "D": "head dim",
    "N": "tokens",
    "Nq": "queries",
    "Nk": "keys",
    "kv_heads": "key heads",
    "of_dense": "of dense",
    "bytes_of_dense": "bytes over dense",
    "kl": "KL, nats",
    "top1": "top-1 agreement",
    "loss": "loss, nats",
    "dense_loss": "dense loss, nats",
    "decode_loss": "decoding loss, nats",
    "dense_decode_loss": "dense decoding loss, nats",
    "ideal_of": "dense rival",
}
UNITS = {"_bytes_per_s": "bytes/s", "_ms": "ms", "_s": "s", "_gb": "GB", "_bytes": "bytes"}
HEAD = ("machine", "versions", "command", "date", "rows")
# How long the steps of a benchmark took says nothing about what it measured.
SKIPPED = ("seconds", "precompiled")


def pages() -> dict[Path, str]:
    """Every generated page: path -> text."""
    environment = Environment(
        loader=FileSystemLoader(DOCS / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(mark=MARK, table=table, claim_table=claim_table, number=number)
    environment.filters["cell"] = escape

    def render(template: str, **values: Any) -> str:
        # One blank line between paragraphs, whatever the template's branches leave out.
        text = environment.get_template(template).render(**values)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"

    slugs = method_slugs()
    made = {
        DOCS / "methods" / f"{slug}.md": render("method.md.jinja", **method_page(method_class(slug)))
        for slug in slugs
    }
    for slug in slugs:
        if claim := trained_claim(slug):
            page = DOCS / "methods" / f"{slug}.md"
            before, heading, after = made[page].partition("## Our measurements\n")
            made[page] = before + curves_section(slug, *claim) + heading + after
            made |= {curve_file(slug, task): text for task, text in pictures(slug, claim[1])}
    made[DOCS / "methods" / "index.md"] = render("methods.md.jinja", sites=by_site(slugs))
    made[DOCS / "which.md"] = render("which.md.jinja", **which_page())
    made[DOCS / "measurements.md"] = render("measurements.md.jinja", files=result_files())
    return made


# --------------------------------------------------------------------- which


def which_page() -> dict[str, Any]:
    """The comparison of the methods, from the recorded runs that are there."""
    return {"cpu": _which_cpu(), "frontier": _which_frontier(), "gpu": _which_gpu()}


def _which_cpu() -> dict[str, Any] | None:
    path = RESULTS / "cpu_prefill_all.json"
    if not path.exists():
        return None
    data = read(path)
    rows = sorted(data["rows"], key=lambda r: -r["speedup"])
    best, slower = rows[0], [f"`{r['recipe']}`" for r in rows if r["speedup"] < 1]
    verdict = f"The fastest, `{best['recipe']}`, takes {best['speedup']:.2f}× less time than dense."
    if slower:
        verdict += f" Slower than dense: {', '.join(slower)}."
    return {
        "length": rows[0]["length"], "dtype": rows[0]["dtype"], "threads": data["threads"],
        "machine": _machine(data["machine"]), "verdict": verdict,
        "rows": [
            {
                "setting": r["recipe"], "density": r["density"],
                "loss change": f"{100 * r['loss_change']:+.2f} %",
                "prompt_s": r["ours_s"], "dense_s": r["dense_s"], "speedup": r["speedup"],
                "needs": method_class(r["slug"]).card.training,
            }
            for r in rows
        ],
    }  # fmt: skip


def _which_frontier() -> dict[str, Any] | None:
    path = RESULTS / "frontier_default.json"
    if not path.exists():
        return None
    run = read(path)
    choice, tolerance = run["choice"], run.get("tolerance", 0.01)
    rows = [
        r
        for r in run["rows"]
        if r["length"] == choice["length"]
        and r["status"] == "ok"
        and r.get("stage", "full") == "full"
        and r["loss"] <= (1 + tolerance) * r["dense_loss"]
        and (r["decode_loss"] is None or r["decode_loss"] <= (1 + tolerance) * r["dense_decode_loss"])
    ]
    return {
        "length": choice["length"], "tolerance": f"{100 * tolerance:g} %", "reason": choice["reason"],
        "chosen": " + ".join(choice["recipe"]) or "dense",
        "rows": [
            {
                "configuration": r["label"], "density": r["density"], "prompt_s": r["prefill_s"],
                "speedup": r["dense_prefill_s"] / r["prefill_s"], "decode_ms": r["decode_ms"],
            }
            for r in sorted(rows, key=lambda r: r["prefill_s"])
        ],
    }  # fmt: skip


def _which_gpu() -> list[dict[str, Any]]:
    # The file with the authors' kernels has more lengths; those of the first file are of more layers.
    parts, seen = [], set()
    path = RESULTS / "gpu_prefill_neighbours.json"
    later = read(path)["rows"] if path.exists() else []
    for name in ("gpu_prefill.json", "gpu_prefill_peers.json"):
        if not (path := RESULTS / name).exists():
            continue
        data = read(path)
        # Settings that were measured later, on the same inputs, with dense of that run: marked in the table.
        known = {(r["shape"], r["length"], r["method"]) for r in data["rows"]}
        inputs = {place[:2] for place in known}
        data["rows"] += [
            {**r, "later": True}
            for r in later
            if (r["shape"], r["length"]) in inputs and (r["shape"], r["length"], r["method"]) not in known
        ]
        lengths = {r["length"] for r in data["rows"]} - seen
        parts += _gpu_parts(data, lengths)
        seen |= lengths
    return parts


def _gpu_parts(data: dict[str, Any], lengths: set[int]) -> list[dict[str, Any]]:
    parts = []
    for shape, length in dict.fromkeys((r["shape"], r["length"]) for r in data["rows"]):
        if length not in lengths:
            continue
        rows = [r for r in data["rows"] if (r["shape"], r["length"]) == (shape, length)]
        timed = sorted((r for r in rows if r.get("whole_ms")), key=lambda r: r["whole_ms"])
        best = next((r for r in timed if r.get("error", 1) <= 0.3 and "slug" in r), None)
        slower = [r["method"] for r in timed if r["whole_ms"] > r["dense_ms"]]
        layers = sorted({layer["layer"] for r in rows for layer in r.get("layers", ())})
        words = ""
        if layers:
            words = f"Layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of the model. "
        if best:
            words += (
                f"Of those with an error of at most 0.3, `{best['method']}` is the fastest: "
                f"{best['dense_ms'] / best['whole_ms']:.2f}× dense."
            )
        if slower:
            words += f" Slower than dense: {', '.join(slower)}."
        if any(r.get("later") for r in timed):
            words += " A ‡ marks a later run with its own dense time (`gpu_prefill_neighbours.json`)."
        parts.append(
            {
                "shape": shape, "length": length, "machine": _machine(data["machine"]), "verdict": words,
                "dense": rows[0]["dense"], "dense_ms": number(rows[0]["dense_ms"]),
                "rows": [
                    {
                        "method": r["method"] + _trained(r.get("slug")) + " ‡" * r.get("later", False),
                        "density": r.get("density"),
                        # Older runs have a sum above 1 for a method that adds scores of its own.
                        "recall": r["recall"] if (r.get("recall") or 2) <= 1 else None,
                        "error": r.get("error"), "select_ms": r.get("select_ms"),
                        "attend_ms": r.get("attend_ms"), "whole_ms": r["whole_ms"],
                        "speedup": r["dense_ms"] / r["whole_ms"],
                    }
                    for r in timed
                ],
            }
        )  # fmt: skip
    return parts


def _trained(slug: str | None) -> str:
    """A mark for methods that are nothing without training."""
    return " †" if slug and method_class(slug).card.training == "training" else ""


# ------------------------------------------------------------------- methods


def readme() -> str:
    """README.md with its table of the default run filled in."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    run = read(RESULTS / "frontier_default.json")
    begin, end = "<!-- frontier -->\n", "<!-- /frontier -->"
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return f"{head}{begin}{frontier_table(run)}\n{end}{tail}"


def frontier_table(run: dict[str, Any]) -> str:
    """The default run's rows of its longest prompt, and what was chosen."""
    choice, chosen = run["choice"], " + ".join(run["choice"]["recipe"])
    lines = [
        "| configuration | Δ loss | Δ decode | prompt | decoding | cache |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in run["rows"]:
        if r["length"] != choice["length"] or r["status"] != "ok" or r.get("stage") == "screen":
            continue
        name = f"**{r['label']}**" if r["label"] == chosen else r["label"]
        decodes = r["decode_ms"] is not None
        cells = [
            f"{100 * (r['loss'] / r['dense_loss'] - 1):+.2f} %",
            f"{100 * (r['decode_loss'] / r['dense_decode_loss'] - 1):+.2f} %" if decodes else "–",
            f"{r['prefill_s']:.2f} s, {r['dense_prefill_s'] / r['prefill_s']:.2f}×",
            f"{r['decode_ms']:.1f} ms, {r['dense_decode_ms'] / r['decode_ms']:.2f}×" if decodes else "–",
            f"{r['cache_bytes'] / 1e6:.0f} MB, {r['cache_bytes'] / r['dense_cache_bytes']:.2f}×",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    machine = _machine(run["machine"])
    lines += [
        "",
        f"Chosen (bold): {choice['reason']}. {choice['length']} tokens, {run['model']['dtype']}, "
        f"{run['threads']} threads; {machine}; {run['date'][:10]}."
        + "".join(f" Left out ({row['reason']}): {row['what']}." for row in run.get("left_out", ())),
    ]
    return "\n".join(lines)


def by_site(slugs: Sequence[str]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Site -> its methods, controls last."""
    entries = [{"card": method_class(slug).card, "roles": roles(method_class(slug))} for slug in slugs]
    sites = sorted({e["card"].site for e in entries}, key=lambda site: (_place(site), site))
    return [
        (site, sorted((e for e in entries if e["card"].site == site), key=lambda e: e["card"].control))
        for site in sites
    ]


def _place(site: str) -> int:
    """Sites in the order of the packages; the singular `mixer` lives in `mixers`."""
    names = [name for name in METHOD_PACKAGES if name.startswith(site)]
    return METHOD_PACKAGES.index(names[0]) if names else len(METHOD_PACKAGES)


def roles(cls: type[Method]) -> list[str]:
    """What the method does at run time with its default parameters, in words."""
    return [ROLES[role] for role in ROLES if role in cls().roles]


def method_page(cls: type[Method]) -> dict[str, Any]:
    """What the page of a method shows."""
    card = cls.card
    source = Path(inspect.getfile(cls)).resolve().relative_to(ROOT)
    return {
        "card": card,
        "paper": paper_link(card.paper),
        "needs": NEEDS[card.training],
        "roles": roles(cls),
        "about": docstring(cls.__doc__ or ""),
        "source": docstring(sys.modules[cls.__module__].__doc__ or ""),
        "file": f"../../{source.as_posix()}",
        "class_name": cls.__name__,
        "parameters": [{**p, "default": default(p["default"])} for p in describe_params(cls)],
        "grid": [] if card.control else [method.spec for method in cls.grid(GRID_LENGTH)],
        "grid_length": GRID_LENGTH,
        "recorded": measurements_of(card.slug),
    }


def paper_link(paper: str) -> str:
    """The paper as the card has it, its arXiv id or DOI made a link."""
    paper = re.sub(r"arXiv (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", paper)
    return re.sub(
        r"\bdoi[: ]\s*(10\.\S+?)(?=[,;]?(\s|$))", r"[doi \1](https://doi.org/\1)", paper, flags=re.I
    )


def default(value: Any) -> str:
    """A default as it is written in a spec."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value) or "empty"


def docstring(text: str) -> str:
    """A docstring as Markdown: ``::`` before an indented part makes it a code block."""
    text = inspect.cleandoc(text).replace("``", "`")
    text = re.sub(r":(?:meth|func|class|data):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    parts: list[str] = []
    for part in re.split(r"\n\n+", text):
        if not part.startswith(" "):
            parts.append(_escape_names(re.sub(r"::$", ":", part)))
        elif parts and parts[-1].endswith("\n```"):
            parts[-1] = f"{parts[-1][:-4]}\n\n{textwrap.dedent(part)}\n```"
        else:
            parts.append(f"```text\n{textwrap.dedent(part)}\n```")
    return "\n\n".join(parts)


def _escape_names(text: str) -> str:
    """``a_b`` outside of code must not turn into emphasis."""
    pieces = text.split("`")
    return "`".join(p if i % 2 else p.replace("_", "\\_") for i, p in enumerate(pieces))


def measurements_of(slug: str) -> list[dict[str, Any]]:
    """What was recorded about a method, one entry a file with its circumstances."""
    entries = recorded_results(slug)
    files = dict.fromkeys(str(entry["file"]) for entry in entries)
    found = []
    for file in files:
        own = [
            {k: v for k, v in e.items() if k not in ("file", "slug")} for e in entries if e["file"] == file
        ]
        claims = [e for e in own if "claim" in e and "ours" in e]
        found.append(
            {
                "file": file,
                "anchor": anchor(file),
                "head": circumstances(read(RESULTS / file)),
                "claims": claims,
                "rows": [e for e in own if e not in claims],
            }
        )
    return found


# ---------------------------------------------------------- learning curves


def trained_claim(slug: str) -> tuple[dict[str, Any], list[Task]] | None:
    """The recorded claim of a method that was trained for it, with its learning curves."""
    path = RESULTS / "claims" / f"{slug}.json"
    claim = read(path) if path.exists() else None
    tasks = curves_of(claim.get("rows") or []) if isinstance(claim, dict) else []
    return (claim, tasks) if isinstance(claim, dict) and tasks else None


def curve_file(slug: str, task: Task) -> Path:
    """Where the picture of a task's curves is."""
    return DOCS / "curves" / f"{slug}-{re.sub(r'[^a-z0-9]+', '-', task.name.lower())}.svg"


def pictures(slug: str, tasks: Sequence[Task]) -> list[tuple[Task, str]]:
    """The pictures, marked as generated."""
    order = list(dict.fromkeys(name for task in tasks for name in task.settings))
    return [(task, f"{MARK}\n{draw_curves(slug, task, order)}") for task in tasks]


def curves_section(slug: str, claim: dict[str, Any], tasks: Sequence[Task]) -> str:
    """The pictures with what was trained and how to read them."""
    name = f"claims/{slug}.json"
    words = ["The legend has each line's last values."]
    if any(measure in task.curves for task in tasks for measure in ("loss", "accuracy")):
        words.append("Loss and accuracy are of held-out sequences.")
    if any("kl" in task.curves for task in tasks):
        words.append("A point is the mean of the training steps since the one before.")
    if (seeds := max(task.seeds for task in tasks)) > 1:
        words.append(
            f"Where {seeds} seeds ran, lines are medians and bars go from the lowest to the highest."
        )
    if any(task.joint for task in tasks):
        words.append("Right of a dotted line, training goes on from the end of the first setting.")
    lines = [
        "## Learning curves",
        f"What was trained: {_escape_names(str(claim.get('differs') or claim['claim']))}.",
    ]
    lines.append(f"All points: [{name}](../../benchmarks/results/{name}). {' '.join(words)}")
    lines += [f"![{describe(slug, t)}](../curves/{curve_file(slug, t).name})" for t in tasks]
    return "\n\n".join(lines) + "\n\n"


# -------------------------------------------------------------- measurements


def result_files() -> list[dict[str, Any]]:
    """Every JSON file under benchmarks/results, as circumstances and tables."""
    files = []
    for path in sorted(RESULTS.rglob("*.json")):
        name = path.relative_to(RESULTS).as_posix()
        data = read(path)
        objects = data if isinstance(data, list) else [data]
        claims = [o for o in objects if isinstance(o, dict) and "claim" in o and "ours" in o]
        files.append(
            {
                "name": name,
                "anchor": anchor(name),
                "link": f"../benchmarks/results/{name}",
                "head": circumstances(data),
                "notes": [] if claims or not isinstance(data, dict) else notes(data),
                "claims": claims,
                "sections": [s for c in claims for s in sections({"rows": c.get("rows") or []})]
                if claims
                else sections(data),
            }
        )
    return files


def read(path: Path) -> Any:
    """A results file."""
    return json.loads(path.read_text(encoding="utf-8"))


def anchor(name: str) -> str:
    """The fragment that a heading with this file's name has on GitHub."""
    return re.sub(r"[^\w-]", "", name.lower())


def circumstances(data: Any) -> list[tuple[str, str]]:
    """Machine, versions, date and command of a results file."""
    head = next((d for d in (data if isinstance(data, list) else [data]) if isinstance(d, dict)), {})
    machine, versions = head.get("machine"), head.get("versions")
    facts = [
        ("machine", _machine(machine) if isinstance(machine, dict) else machine),
        (
            "versions",
            ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else versions,
        ),
        ("date", head.get("date")),
        ("command", f"`{without_folders(str(head['command']))}`" if head.get("command") else None),
    ]
    return [(name, str(value)) for name, value in facts if value]


def _machine(machine: dict[str, Any]) -> str:
    known = {"cores": "cores", "memory_gb": "GB memory"}
    words = [f"{v} {known[k]}" if k in known else str(v) for k, v in machine.items() if v]
    return ", ".join(words)


def without_folders(command: str) -> str:
    """A command whose absolute paths keep their last part only: the folder is the measuring machine's."""
    return re.sub(r"(?<![\w.:])/(?:[^\s'\"/]+/)+([^\s'\"/]+)", r"\1", command)


def notes(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The plain values beside the tables: inputs, shapes, threads."""
    plain = [(k, v) for k, v in data.items() if k not in HEAD + SKIPPED and not isinstance(v, dict | list)]
    return [(label(name), number(value)) for name, value in plain if value is not None]


def sections(data: Any) -> list[dict[str, Any]]:
    """The tables of a results file: every list of objects, and every object of plain values."""
    if isinstance(data, list):
        data = {"rows": data}
    found = []
    for name, value in data.items():
        if name in SKIPPED:
            continue
        heading = "" if name == "rows" else name.replace("_", " ")
        if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
            found.append({"heading": heading, "rows": value})
        elif isinstance(value, dict) and value and name not in HEAD:
            found.append({"heading": heading, "rows": [{"what": k, "value": v} for k, v in value.items()]})
    return found


# -------------------------------------------------------------------- tables


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of plain values as a Markdown table; columns in the order of their first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row if name != "slug"))
    # A list of lists (a head's densities, say) is for programs.
    names = [n for n in names if any(row.get(n) is not None and not _is_deep(row.get(n)) for row in rows)]
    right = [all(_is_number(row.get(n)) or row.get(n) is None for row in rows) for n in names]
    lines = [
        [escape(label(n)) for n in names],
        ["---:" if r else "---" for r in right],
        *([escape(number(row.get(n))) for n in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def claim_table(claim: dict[str, Any]) -> str:
    """The paper's numbers beside ours."""
    paper, ours = (v if isinstance(v := claim.get(k), dict) else {"": v} for k in ("paper", "ours"))
    names: Iterable[str] = dict.fromkeys([*paper, *ours])
    return table([{"number": label(n), "paper": paper.get(n), "ours": ours.get(n)} for n in names])


def label(name: str) -> str:
    """``dense_ms`` -> ``dense, ms``."""
    if name in COLUMNS:
        return COLUMNS[name]
    for suffix, unit in UNITS.items():
        if name.endswith(suffix) and name != suffix:
            return f"{name.removesuffix(suffix).replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


def number(value: Any) -> str:
    """A value as it is read: four significant digits, thousands apart from 10,000 on, words as they are."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{label(str(k))} {number(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(number(v) for v in value) or "–"
    return str(value)


def escape(text: str) -> str:
    """Text that stays in its cell."""
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_deep(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(isinstance(v, dict | list) for v in inner)


# ---------------------------------------------------------------------- main


def leftovers(made: dict[Path, str]) -> list[Path]:
    """Generated pages whose method is gone, pictures whose curves are."""
    there = sorted([*(DOCS / "methods").glob("*.md"), *(DOCS / "curves").glob("*.svg")])
    return [p for p in there if p not in made and MARK in p.read_text(encoding="utf-8")]


def stale(made: dict[Path, str]) -> list[Path]:
    """Pages that are missing, differ from what would be written, or should not be there."""
    old = [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    return old + leftovers(made)


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    options = parser.parse_args(argv)
    made = {**pages(), ROOT / "README.md": readme()}
    if options.check:
        if old := stale(made):
            names = ", ".join(p.relative_to(ROOT).as_posix() for p in old)
            print(f"stale: {names}; run `make docs`", file=sys.stderr)
        return 1 if old else 0
    for path in leftovers(made):
        path.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(made)} pages written to {DOCS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
