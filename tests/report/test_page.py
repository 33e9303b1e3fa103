"""The page: everything on it, nothing executed or fetched, for finished and unfinished runs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from sample import write_sample

from sparseland.errors import SparselandError
from sparseland.report import write_report
from sparseland.report.page import _densities, render
from sparseland.report.results import Results

DENSE = {"kind": "measurement", "recipe": [], "role": "dense", "length": 128, "loss": 2.0, "dense_loss": 2.0}
VOID = {"meta", "link", "br", "wbr"}


class Outline(HTMLParser):
    """Checks nesting; collects ids, headings and links."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.ids, self.headings, self.links = [], [], [], []
        self.tags = {}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if "id" in attrs:
            self.ids.append(attrs["id"])
        self.links += [attrs[a] for a in ("href", "src") if a in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if self.stack and self.stack[-1] in ("h2", "h3"):
            self.headings.append(data.strip())


@pytest.fixture(scope="module")
def outline(page):
    parser = Outline()
    parser.feed(page)
    assert parser.stack == []
    return parser


def test_sections_stand_in_order(outline):
    order = ["Verdict", "All measured configurations", "Trade-offs", "Density of each layer and head",
             "Attention maps", "Tasks over depth and length", "Drift of the machine",
             "How it was measured"]  # fmt: skip
    assert [h for h in outline.headings if h in order] == order


def test_ids_are_unique_and_inner_links_lead_somewhere(outline):
    assert len(outline.ids) == len(set(outline.ids))
    inner = {link[1:] for link in outline.links if link.startswith("#")}
    assert inner <= set(outline.ids)


def test_nothing_is_fetched(page, outline):
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    assert "default-src 'none'" in page
    outside = re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert not re.search(r"https?://|url\((?!#)|@import", outside)


def test_users_strings_are_escaped(page):
    assert "<script>alert(1)" not in page
    assert "out of memory: &lt;script&gt;alert(1)&lt;/script&gt; &amp; 3 GB wanted" in page
    assert "my <b>notes</b>" not in page
    assert "text: my &lt;b&gt;notes&lt;/b&gt; &amp; drafts" in page
    assert page.count("<script>") == 1


def test_hostile_names_stay_text(sample):
    evil = '"><img src=x onerror=alert(1)>$x^2${{7*7}}'
    short = [r for r in sample.measurements if r["length"] == 2048]
    rows = [dict(r, label=evil, recipe=[evil]) if r["role"] == "method" else r for r in short]
    html = render(Results([dict(sample.run, model={"name": evil})], rows, choice=sample.choice))
    assert "<img" not in html
    assert "{{7*7}}" in html
    assert "&#34;&gt;&lt;img" in html


def test_every_plot_is_well_formed_and_follows_the_theme(page):
    plots = re.findall(r"<svg role=.*?</svg>", page, flags=re.DOTALL)
    # Five trade-offs a length, seven density maps, four attention maps, recall against density.
    assert len(plots) == 2 * 5 + 7 + 4 + 1
    for plot in plots:
        root = ET.fromstring(plot.replace(" href=", " data-href="))
        assert "viewBox" in root.attrib
        assert "width" not in root.attrib
        assert "var(--ink)" in plot
    assert not re.search("#0102[01]", page)


def test_selections_show_recall_and_the_split_of_time(page):
    section = page[page.index('<section id="selection">') :]
    section = section[: section.index("</section>")]
    assert section.count('class="bar"') == 4
    # The slowest fills the width: 0.4 s of 1.8 s are choosing.
    assert 'class="select" style="width: 22.2%"' in section
    assert "0.400 s choosing, 1.40 s computing" in section
    assert "recall 0.970" in section


def test_each_point_tells_its_numbers_without_scripts(page, sample):
    plot = re.search(
        r'<svg role="group" aria-label="Loss against prompt time at 4,096.*?</svg>', page, re.DOTALL
    )
    titles = re.findall(r"<title>(.*?)</title>", plot.group(), flags=re.DOTALL)
    row = sample.row(("flexprefill:gamma=0.8",), 4096)
    (title,) = [t for t in titles if t.startswith("flexprefill:gamma=0.8\n")]
    assert f"loss {row['loss']:.3f}" in title
    assert f"{row['dense_prefill_s'] / row['prefill_s']:.2f}× dense" in title
    assert plot.group().count('tabindex="0"') == 1
    # Methods that leave the prompt dense have no point here.
    assert not any("double-sparsity:budget" in t for t in titles)


def table_rows(page, length):
    table = page.split(f'aria-labelledby="table-{length}"')[1].split("</table>")[0]
    return {
        re.sub(r"<[^>]*>", "", r.split('class="name">')[1].split("</th>")[0]).strip(): r
        for r in table.split("<tbody>")[1].split("<tr ")[1:]
    }


def test_the_table_holds_every_configuration_with_its_numbers(page, sample):
    rows = table_rows(page, 4096)
    assert len(rows) == sum(r["length"] == 4096 for r in sample.measurements)
    row = sample.row(("mustafar:sparsity=0.5",), 4096)
    text = rows["mustafar:sparsity=0.5"]
    for number in (f">{row['loss']:.3f}<", ">+0.30<", ">0.91×<", ">117 MB<", ">0.62×<"):
        assert number in text


def test_failed_rows_give_the_reason_and_the_chosen_is_marked(page):
    rows = table_rows(page, 2048)
    assert "failed: out of memory" in rows["minference:budget=1/2"]
    (chosen,) = [name for name, text in rows.items() if "chosen" in text.split(">")[0]]
    assert chosen.startswith("★ flexprefill + double-sparsity + mustafar:sparsity=0.5")
    assert "11/15 (15/15)" in rows[chosen]


def test_controls_are_never_starred(page):
    rows = table_rows(page, 4096)
    controls = [name for name in rows if name.endswith("control")]
    assert len(controls) == 3
    assert not any("★" in name for name in controls)


def test_drift_is_shown_and_a_large_one_is_named(page):
    assert "+1.20 %" in page
    assert re.search(r"\+8\.00 % <span[^>]*>not quiet", page)


def test_unfinished_run_gives_a_page_that_says_so(tmp_path):
    out = tmp_path / "report.html"
    write_report(write_sample(tmp_path / "r.jsonl", (1024,), finished=False), out)
    text = out.read_text()
    assert "the run has not finished" in text
    assert "recipe.json" not in text


def test_only_dense_still_makes_a_page(tmp_path):
    dense = {
        "kind": "measurement",
        "recipe": [],
        "role": "dense",
        "length": 128,
        "loss": 2.0,
        "dense_loss": 2.0,
    }
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(dense) + "\n")
    write_report(path, tmp_path / "report.html")
    assert "Too few configurations to draw." in (tmp_path / "report.html").read_text()


def test_no_measurement_and_no_folder_are_errors(tmp_path):
    results = tmp_path / "results.jsonl"
    results.write_text("")
    with pytest.raises(SparselandError, match="no measurement"):
        write_report(results, tmp_path / "report.html")
    results.write_text(json.dumps(DENSE) + "\n")
    with pytest.raises(SparselandError, match="can't write"):
        write_report(results, tmp_path / "nowhere" / "report.html")
    assert list(tmp_path.iterdir()) == [results]


def test_density_maps_leave_out_what_keeps_the_prompt_dense(sample):
    flat = dict(sample.row(("mustafar:sparsity=0.5",), 4096), head_density=[[1.0] * 9] * 30)
    row = sample.row(("flexprefill",), 4096)
    results = Results([sample.run], [flat, row], choice=sample.choice)
    assert [item["recipe"] for item in _densities(results)] == [("flexprefill",)]
