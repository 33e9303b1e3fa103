"""The documentation is true: generated pages are fresh, links lead somewhere, samples and commands work."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.M | re.S)


def name(path: Path) -> str:
    return path.relative_to(DOCS).as_posix()


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """docs/generate.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------- generated pages


def test_generated_pages_are_fresh(generator, capsys):
    code = generator.main(["--check"])
    assert (code, capsys.readouterr().err) == (0, "")


def test_a_stale_page_is_told_in_one_line(generator, capsys, monkeypatch):
    changed = DOCS / "methods" / "flexprefill.md"
    monkeypatch.setattr(generator, "pages", lambda: {changed: changed.read_text() + "more"})
    monkeypatch.setattr(generator, "leftovers", lambda made: [])
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().err == "stale: docs/methods/flexprefill.md; run `make docs`\n"


def test_the_page_of_a_method_that_is_gone_is_stale(generator):
    made = generator.pages()
    gone = DOCS / "methods" / "mustafar.md"
    assert generator.leftovers({p: text for p, text in made.items() if p != gone}) == [gone]


def test_every_method_has_a_page_with_its_parameters_and_claims(generator):
    from sparseland.method import describe_params, method_class, method_slugs

    index = (DOCS / "methods" / "index.md").read_text()
    for slug in method_slugs():
        page = (DOCS / "methods" / f"{slug}.md").read_text()
        assert f"({slug}.md)" in index
        for parameter in describe_params(method_class(slug)):
            assert f"| `{parameter['name']}` |" in page
        for line in (
            c for kind in ("claims", "deviations", "limits") for c in getattr(slug_card(slug), kind)
        ):
            assert generator.escape(line) in page


def slug_card(slug: str) -> Any:
    from sparseland.method import method_class

    return method_class(slug).card


def test_all_shapes_of_results_become_tables(generator, monkeypatch, tmp_path):
    head = {
        "machine": {"cpu": "C", "cores": 2, "gpu": None},
        "date": "D",
        "command": "python b --out /x/y/f.json",
    }
    flat = {"recipe": ["a:x=1", "b"], "prefill_s": 1.23456, "loss": None, "heads": [[0.5]], "ok": True}
    claim = {
        "slug": "s",
        "claim": "twice",
        "paper": {"speedup": 2},
        "ours": {"speedup": 1.98701},
        "holds": False,
    }
    (tmp_path / "claims").mkdir()
    (tmp_path / "flat.json").write_text(json.dumps({**head, "threads": 2, "rows": [flat, {"note": "a|b"}]}))
    (tmp_path / "many.json").write_text(json.dumps({**head, "first": [{"ms": 20000.0}], "tiles": {"k": "v"}}))
    (tmp_path / "claims" / "s.json").write_text(json.dumps([{**head, **claim, "rows": [{"density": 0.25}]}]))
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    monkeypatch.setattr(generator, "recorded_results", lambda slug: [])  # of the real folder
    text = generator.pages()[DOCS / "measurements.md"]
    assert "| recipe | prefill, s | ok | note |" in text
    assert "| a:x=1, b | 1.235 | yes | – |" in text
    assert "a\\|b" in text
    assert "heads" not in text
    assert "- threads: 2" in text
    assert "- machine: C, 2 cores\n" in text
    assert "`python b --out f.json`" in text
    assert "### many.json: first\n\n| ms |\n| ---: |\n| 20,000 |" in text
    assert "| k | v |" in text
    assert "**Does not hold**: twice" in text
    assert "| speed-up over dense | 2 | 1.987 |" in text
    assert "| density |\n| ---: |\n| 0.25 |" in text


def test_a_method_page_shows_what_was_recorded(generator, monkeypatch, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({"machine": "M", "date": "D", "command": "C", "rows": []}))
    monkeypatch.setattr(generator, "RESULTS", tmp_path)
    entry = {"file": "p.json", "slug": "mustafar", "speedup": 1.5}
    monkeypatch.setattr(generator, "recorded_results", lambda slug: [entry] if slug == "mustafar" else [])
    text = generator.pages()[DOCS / "methods" / "mustafar.md"]
    for part in (
        "### p.json",
        "- machine: M",
        "- date: D",
        "- command: `C`",
        "| 1.5 |",
        "measurements.md#pjson",
    ):
        assert part in text


# ------------------------------------------------------------------- pages


def anchors(path: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, fragment = target.partition("#")
        goal = (page.parent / file).resolve() if file else page
        assert goal.exists(), target
        assert not fragment or fragment in anchors(goal), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_machine_path_appears(page):
    assert not re.findall(r"(?<![\w.~])/(?:root|home|work|tmp|Users|mnt|opt|var)/\S*", page.read_text())


def test_every_hand_written_page_is_on_the_map():
    written = {p.name for p in DOCS.glob("*.md")} - {"index.md"}
    assert written <= set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text()))


RUNNABLE = [p for p in PAGES if "\n```python run\n" in p.read_text()]


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_runnable_samples_run(page, tmp_path, monkeypatch, capsys):
    """All of a page's samples in one namespace, in an empty folder; line numbers are the page's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPARSELAND_BACKEND", raising=False)
    text, names = page.read_text(), {"__name__": "sample"}
    for block in FENCE.finditer(text):
        if (block[1], block[2].strip()) != ("python", "run"):
            continue
        above = text.count("\n", 0, block.start(3))
        exec(compile("\n" * above + block[3], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_other_python_samples_are_python(page):
    for block in FENCE.finditer(page.read_text()):
        if block[1] == "python":
            compile(block[3], str(page), "exec")


def commands() -> list[str]:
    """Every distinct ``sparseland …`` line in the pages' shell samples."""
    blocks = (b[3] for p in PAGES for b in FENCE.finditer(p.read_text()) if b[1] == "sh")
    lines = (line.split("#")[0].strip() for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if line.startswith("sparseland ")})


@pytest.mark.parametrize("command", commands())
def test_commands_have_the_options_that_are_shown(command):
    """Parsed as the command line would, and specs and slugs in it looked up; nothing is run."""
    from sparseland.cli import app
    from sparseland.method import method_class, parse_spec, split_specs

    words = shlex.split(command)[1:]
    sub = typer.main.get_command(app).commands[words[0]]
    found = sub.make_context(words[0], words[1:]).params
    for spec in split_specs(found.get("methods") or ""):
        parse_spec(spec)
    if "slug" in found:
        method_class(found["slug"])
    if "op" in found:
        from sparseland.bench import BENCHMARKS

        assert found["op"] in BENCHMARKS


def test_make_targets_exist():
    blocks = (b[3] for p in PAGES for b in FENCE.finditer(p.read_text()) if b[1] == "sh")
    targets = {t for block in blocks for t in re.findall(r"^make (\S+)", block, re.M)}
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(re.search(rf"^{re.escape(t)}:", makefile, re.M) for t in targets)


def test_every_field_of_the_results_is_explained():
    """The keys of the rows that the frontier writes all stand in docs/reports.md."""
    import sparseland.frontier

    trees = [ast.parse(f.read_text()) for f in Path(sparseland.frontier.__file__).parent.glob("*.py")]
    rows = [d for t in trees for d in ast.walk(t) if isinstance(d, ast.Dict) and "kind" in keys(d)]
    fields = {key for row in rows for key in keys(row)}
    assert {"kind", "loss", "prefill_s", "before_s", "correct"} <= fields
    text = (DOCS / "reports.md").read_text()
    assert {f for f in fields if f"`{f}`" not in text} == set()


def keys(node: ast.Dict) -> set[str]:
    return {str(k.value) for k in node.keys if isinstance(k, ast.Constant)}
