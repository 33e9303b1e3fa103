"""The study: cells and their pairing, resuming, refusals, the analyses on planted rows, page and command."""

import json
import math
import random
import re
from itertools import pairwise

import pytest

from sparseland.attention.sparse_frontier import UNITS, SparseFrontier
from sparseland.cli import main
from sparseland.errors import SparselandError
from sparseland.laws.sparse_frontier import compare
from sparseland.models import load_model
from sparseland.rowfile import read_rows
from sparseland.study import ask, job
from sparseland.study.analysis import _can_tell, can_do, sample_scores, summary
from sparseland.study.job import StudyOptions, measure
from sparseland.study.journal import Journal
from sparseland.study.page import TOO_FEW, safe_table, write_page
from sparseland.tasks import TASKS
from sparseland.tasks.text import default_text

LENGTH = 256


def options(folders, out, **changes):
    given = {
        "models": [str(f) for f in folders], "units": ["block", "snapkv", "quest"], "compressions": [1, 4],
        "lengths": [LENGTH], "tasks": ["needle"], "samples": 3, "out": out, "dtype": "float32",
        "device": "cpu", "uncounted": True,
    }  # fmt: skip
    return StudyOptions(**{**given, **changes})


@pytest.fixture(scope="module")
def measured(folders, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "out"
    said = []
    rows = measure(options(folders, out), lambda message, done: said.append((message, done)))
    return out, rows, said


# ------------------------------------------------------------------------ cells


def test_every_cell_of_two_sizes_is_measured_and_paired(measured, folders):
    _, rows, said = measured
    cells = [r for r in rows if r["kind"] == "cell"]
    assert [(c["model"], c["unit"]) for c in cells] == [
        (str(f), unit) for f in folders for unit in ("dense", "block", "snapkv", "quest")
    ]
    for c in cells:
        assert c["status"] == "ok"
        assert len(c["nats"]) == len(c["chosen"]) == len(c["generated"]) == 3
        assert c["offered"] == 5
        assert (c["density"] == 1) == (c["unit"] == "dense")
    # What is reported is measured: SnapKV keeps a quarter and then all that is decoded.
    snap = next(c for c in cells if c["unit"] == "snapkv")
    assert 0.25 < snap["density"] < 0.3
    sizes = [r["params"] for r in rows if r["kind"] == "model"]
    assert sizes[0] < sizes[1]
    assert all(a[1] <= b[1] for a, b in pairwise(said))
    assert said[-1][1] <= 1


def test_full_budgets_score_as_dense(folders):
    """Every unit through its own way of being measured: the prompt, or shown and decoded."""
    loaded = load_model(str(folders[0]), "float32", "cpu")
    samples = TASKS["needle"](loaded.tokenizer, default_text(), LENGTH, 2, 0)
    ids = ask.equal_prompts(samples, loaded.tokenizer)
    study = job._Model(options(folders, None), loaded, default_text(), None, lambda m, d: None)
    dense, _ = study._cell("", ids, ids.shape[1] - 9, samples, 2, {})
    for unit in UNITS:
        spec = SparseFrontier.full_budget(1024, unit).spec
        scores, density = study._cell(spec, ids, ids.shape[1] - 9, samples, 2, {})
        assert density == 1
        assert scores.nats == pytest.approx(dense.nats, abs=1e-3)
        assert scores.generated == dense.generated
    # In batches of one the same, too.
    one, _ = study._cell(SparseFrontier.at_sparsity("quest", 4, LENGTH).spec, ids, 240, samples, 1, {})
    both, _ = study._cell(SparseFrontier.at_sparsity("quest", 4, LENGTH).spec, ids, 240, samples, 2, {})
    assert one.nats == pytest.approx(both.nats, abs=1e-3)


def test_models_with_local_layers_take_the_long_way(folders, monkeypatch):
    loaded = load_model(str(folders[0]), "float32", "cpu")
    samples = TASKS["needle"](loaded.tokenizer, default_text(), LENGTH, 2, 0)
    ids = ask.equal_prompts(samples, loaded.tokenizer)
    study = job._Model(options(folders, None), loaded, default_text(), None, lambda m, d: None)
    spec = SparseFrontier.at_sparsity("snapkv", 4, LENGTH).spec
    shown, density = study._cell(spec, ids, 240, samples, 2, {})
    monkeypatch.setattr(ask, "windowed", lambda model: True)
    read, same = study._cell(spec, ids, 240, samples, 2, {})
    assert density == same
    assert shown.nats == pytest.approx(read.nats, abs=1e-3)


def test_the_same_study_goes_on_and_measures_nothing_twice(measured, folders, tmp_path, monkeypatch):
    out, rows, _ = measured
    copy = tmp_path / "copy"
    copy.mkdir()
    lines = (out / "results.jsonl").read_text().splitlines()
    # Interrupted in the middle of the last line.
    (copy / "results.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:40]]))
    ran = []
    cell = job._Model._cell
    monkeypatch.setattr(job._Model, "_cell", lambda self, *a: ran.append(a[0]) or cell(self, *a))
    again = measure(options(folders, copy))
    assert ran == [rows[-1]["spec"]]
    last = [r for r in again if r["kind"] == "cell"][-1]
    assert last["nats"] == rows[-1]["nats"]
    assert len(list(read_rows(copy / "results.jsonl"))) == len(again)


def test_what_dense_can_not_do_is_not_measured_further_unless_asked(folders, tmp_path):
    rows = measure(options(folders[:1], tmp_path / "o", uncounted=False))
    assert [r["unit"] for r in rows if r["kind"] == "cell"] == ["dense"]
    assert [r["counts"] for r in summary(rows)["dense"]] == [False]


def test_sparse_settings_may_be_asked_for_the_right_answer_only(folders, tmp_path):
    rows = measure(options(folders[:1], tmp_path / "o", units=["quest"], choose=False, generate=False))
    dense, quest = (r for r in rows if r["kind"] == "cell")
    assert (len(dense["chosen"]), len(quest["chosen"]), len(quest["nats"])) == (3, 0, 3)
    found = summary(rows)
    assert [c["chosen"] is None for c in found["cells"]] == [False, True]


def test_a_unit_that_can_not_be_sparser_is_measured_once(folders, tmp_path):
    rows = measure(options(folders[:1], tmp_path / "o", units=["block", "quest"], compressions=[2, 8, 16]))
    made = [(r["unit"], r["compression"], r["spec"]) for r in rows if r["kind"] == "setting"]
    assert len({s for u, _, s in made if u == "block"}) == 2  # three blocks of 16 are the least
    cells = [(r["unit"], r["compression"]) for r in rows if r["kind"] == "cell"]
    assert [c for u, c in cells if u == "block"] == [2, 8]
    assert len({s for u, _, s in made if u == "quest"}) == len([u for u, _ in cells if u == "quest"])


def test_right_answers_by_chance_do_not_count():
    def dense(right, samples, generated=0):
        return {
            "chosen": [i < right for i in range(samples)], "offered": 5,
            "generated": [i < generated for i in range(samples)],
        }  # fmt: skip

    assert not can_do(dense(3, 6))  # a fifth of 6 is chance; 3 come by it once in ten
    assert can_do(dense(6, 12))
    assert not can_do(dense(5, 12))
    assert can_do(dense(0, 6, generated=3))
    assert not can_do({**dense(6, 6), "offered": 1})


def test_time_that_is_up_leaves_cells_out(folders, tmp_path):
    rows = measure(options(folders[:1], tmp_path / "o", seconds=0.0))
    assert not [r for r in rows if r["kind"] == "cell"]


def test_memory_that_runs_out_is_a_row(folders, tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError("no room\nreally")

    monkeypatch.setattr(job._Model, "_decode", full)
    rows = measure(options(folders[:1], tmp_path / "o", units=["quest"]))
    assert rows[-1]["status"] == "failed"
    assert rows[-1]["reason"] == "out of memory: no room"
    found = summary(rows)
    assert [r["unit"] for r in found["failed"]] == ["quest"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"units": ["page"]}, "--units: no 'page'; it must be one of vertical-slash"),
        ({"units": []}, "--units is empty"),
        ({"tasks": ["chess"]}, "--tasks: no 'chess'"),
        ({"lengths": [64]}, "64 is not allowed"),
        ({"lengths": []}, "0 is not allowed"),
        ({"compressions": [0.5]}, "0.5 is not allowed"),
        ({"samples": 0}, "--samples 0"),
        ({"tasks": ["story-filtering"], "lengths": [200]}, "too short for task story-filtering"),
        ({"lengths": [4096]}, "4096"),
    ],
)
def test_what_can_not_be_run_is_refused_and_leaves_no_folder(folders, tmp_path, changes, words):
    with pytest.raises(SparselandError, match=words):
        measure(options(folders[:1], tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_another_study_in_the_folder_is_refused(measured, folders):
    out, _, _ = measured
    with pytest.raises(SparselandError, match="holds another study"):
        measure(options(folders[:1], out, seed=1))
    with pytest.raises(SparselandError, match="can't use"):
        Journal(out / "results.jsonl", "x")


# --------------------------------------------------------------------- analyses


def spec(unit, compression, length):
    return "" if unit == "dense" else SparseFrontier.at_sparsity(unit, compression, length).spec


def planted(samples=16, sizes=(1e8, 1e9), lengths=(1024, 4096)):
    """Rows of a study whose truth is known: block loses much, quest little, one task is beyond the models."""
    rng = random.Random(0)
    rows = []
    for params in sizes:
        model = f"{params:g}"
        shape = {"params": params, "head": 1e7, "layers": 10, "heads": 8, "kv_heads": 2, "head_dim": 64}
        rows.append({"kind": "model", "model": model, "dtype": "float32", "device": "cpu", **shape})
        for length in lengths:
            for task, base in (("easy", 3.0), ("hard", 2.0), ("beyond", -3.0)):
                noise = [rng.gauss(0, 0.2) for _ in range(samples)]
                for unit, slope in (("dense", 0), ("block", 0.8), ("quest", 0.004)):
                    for compression in (1,) if unit == "dense" else (2, 4, 8, 16):
                        z = base + 0.2 * math.log(params / 1e8) - 0.1 * math.log(length / 1024)
                        z -= slope * math.log(compression)
                        own = [z + n + rng.gauss(0, 0.02) for n in noise]
                        good = [1 / (1 + math.exp(-v)) for v in own]
                        rows.append({
                            "kind": "cell", "status": "ok", "model": model, "task": task, "length": length,
                            "unit": unit, "phase": job.phase_of(unit), "compression": compression,
                            "density": 1 / compression, "offered": 5, "tokens": length, "seconds": 1.0,
                            "spec": spec(unit, compression, length),
                            "nats": [-math.log(g) for g in good], "gold": good,
                            "chosen": [g > 0.5 for g in good], "generated": [g > 0.6 for g in good],
                        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def found():
    return summary(planted())


def test_what_dense_can_not_do_is_shown_and_never_counted(found):
    assert {r["task"]: r["counts"] for r in found["dense"]} == {"easy": True, "hard": True, "beyond": False}
    assert all(r["chance"] == 0.2 for r in found["dense"])
    assert {c["task"] for c in found["cells"]} == {"easy", "hard", "beyond"}
    assert not [r for r in found["ranking"] if r["task"] == "beyond"]
    assert "task beyond" not in found["law"]["coefficients"]


def test_the_safe_compression_is_that_of_the_unit_that_loses_nothing(found):
    for r in found["safe"]:
        assert r["mean_can_tell"]
        assert r["worst_can_tell"]
        assert r["tried"] == 16
        if r["unit"] == "block":
            assert r["mean"] == r["worst"] == 1
            assert r["ruled_out"] <= 2
            assert r["losses"][0]["verdict"] == "lost"
        else:
            assert r["ruled_out"] == 1
            assert not r["ruled_out_can_tell"]  # 32 samples
    few = summary(planted(samples=3))
    assert not any(r["worst_can_tell"] for r in few["safe"])


def test_a_loss_is_ruled_out_by_enough_samples():
    found = summary(planted(samples=48, sizes=(1e8,), lengths=(1024,)))
    assert all(r["ruled_out_can_tell"] for r in found["safe"])
    assert {r["unit"]: r["ruled_out"] for r in found["safe"]} == {"block": 1, "quest": 16}
    assert {row["loss ruled out"] for row in safe_table(found)} == {"1x", "16x"}
    few = summary(planted(samples=4, sizes=(1e8,), lengths=(1024,)))
    assert {row["loss ruled out"] for row in safe_table(few)} == {TOO_FEW}


@pytest.mark.parametrize(
    ("samples", "comparisons"), [(4, 1), (5, 1), (7, 12), (8, 12), (9, 48), (10, 48), (13, 500), (14, 500)]
)
def test_what_can_be_told_is_what_losing_every_sample_would_be(samples, comparisons):
    found = compare([([0.0] * samples, [1.0] * samples)] * comparisons)
    assert {c.verdict == "lost" for c in found} == {_can_tell(samples, comparisons)}


def test_only_what_counts_is_tested_and_corrected_for():
    rows = planted(sizes=(1e8,), lengths=(1024,))
    found = summary(rows)
    assert [("comparison" in c) for c in found["cells"]] == [
        c["unit"] != "dense" and c["counts"] for c in found["cells"]
    ]
    alone = summary([r for r in rows if r.get("task") != "beyond"])
    assert [c for c in found["cells"] if c["counts"]] == alone["cells"]


def test_the_same_setting_under_two_compressions_is_one():
    rows = planted(sizes=(1e8,), lengths=(1024,))
    twice = [
        {**r, "compression": c} for r in rows for c in ([16, 32] if r.get("compression") == 16
        else [r.get("compression")])
    ]  # fmt: skip
    assert len(twice) > len(rows)
    assert summary(twice) == summary([{**r, "compression": r.get("compression")} for r in rows])


def test_units_are_ranked_only_against_units_of_their_phase_and_measured_alike(found):
    assert {(r["phase"], len(r["units"])) for r in found["ranking"]} == {("prefill", 1), ("decode", 1)}
    rows = planted()
    more = [
        {**r, "unit": "flexprefill", "nats": [n + 1 for n in r["nats"]]}
        for r in rows
        if r.get("unit") == "block"
    ]
    ranked = summary(rows + more)["ranking"]
    assert len(ranked) == 2 * 2 * 2 * 4
    for r in ranked:
        assert r["models"] == ["1e+08", "1e+09"]
        if r["phase"] == "prefill":
            assert [u["unit"] for u in r["units"]] == ["block", "flexprefill"]
    # A model without a unit is not compared at that length.
    last = (more[-1]["model"], more[-1]["length"])
    fewer = summary(rows + [r for r in more if (r["model"], r["length"]) != last])["ranking"]
    assert [r["models"] for r in fewer if r["length"] == 4096 and r["phase"] == "prefill"] == [["1e+08"]] * 8
    assert [r for r in fewer if r["length"] != 4096] == [r for r in ranked if r["length"] != 4096]
    # A unit beside one that was not measured anywhere alike has nobody to be compared with.
    apart = [r for r in rows if r.get("unit") != "block" or r["model"] == "1e+08"]
    apart += [r for r in more if r["model"] == "1e+09"]
    assert {r["phase"] for r in summary(apart)["ranking"]} == {"decode"}


def lines(**units):
    """Rows of one model and task: every unit's intercept, and what its 2x, 4x, 8x and 16x really are.

    A score falls by a tenth with every halving of what is computed.
    """
    rows = planted(samples=16, sizes=(1e8,), lengths=(1024,))
    shape = [r for r in rows if r["kind"] == "model"]
    cell = next(r for r in rows if r.get("unit") == "dense")
    made = [{**cell, "nats": [-math.log(0.9)] * 16}]
    for unit, (top, measured) in units.items():
        name = unit.replace("_", "-")
        made += [
            {
                **cell, "unit": name, "phase": job.phase_of(name), "compression": asked, "density": 1 / real,
                "spec": spec(name, asked, 8192), "nats": [-math.log(top - 0.1 * math.log2(real))] * 16,
            }
            for asked, real in zip((2, 4, 8, 16), measured, strict=True)
        ]  # fmt: skip
    return shape + made


def test_units_are_ranked_at_equal_measured_compression():
    """Asked for 16x one computes a fifth; at equal nominal compression it would look the better."""
    rows = lines(block=(0.9, (2, 4, 8, 16)), vertical_slash=(0.85, (1.5, 2.5, 4, 5)))
    assert rows[-1]["nats"][0] < rows[-5]["nats"][0]
    ranked = summary(rows)["ranking"]
    assert [r["compression"] for r in ranked] == [2, 4, 5]
    for r in ranked:
        assert [u["unit"] for u in r["units"]] == ["block", "vertical-slash"]
        assert r["units"][0]["score"] == pytest.approx(0.9 - 0.1 * math.log2(r["compression"]))
        assert r["units"][1]["score"] == pytest.approx(0.85 - 0.1 * math.log2(r["compression"]))
        assert {u["density"] for u in r["units"]} == {1 / r["compression"]}
    # Who stays dense allows no comparison.
    assert summary(lines(block=(0.9, (2, 4, 8, 16)), vertical_slash=(0.9, (1, 1, 1, 1))))["ranking"] == []


def test_equal_cost_points_have_a_front_of_their_own_phase(found):
    for phase in ("prefill", "decode"):
        own = [p for p in found["isoflops"] if p["phase"] == phase and p["length"] == 4096]
        assert {p["unit"] for p in own} == {"dense", "block" if phase == "prefill" else "quest"}
        best = [p for p in own if p["front"]]
        for p in best:
            assert not [o for o in own if o["flops"] <= p["flops"] and o["score"] > p["score"]]
        assert ("bytes" in own[0]) == (phase == "decode")
    # Sparser is cheaper at one size.
    one = sorted(
        (
            p
            for p in found["isoflops"]
            if p["model"] == "1e+08" and p["unit"] == "block" and p["length"] == 4096
        ),
        key=lambda p: p["compression"],
    )
    assert all(a["flops"] > b["flops"] for a, b in pairwise(one))


def test_the_law_has_the_planted_slopes(found):
    law = found["law"]["coefficients"]
    assert law["log params"] == pytest.approx(0.2, abs=0.03)
    assert law["log length"] == pytest.approx(-0.1, abs=0.05)
    assert law["log compression, prefill"] == pytest.approx(-0.8, abs=0.05)
    assert law["log compression, decode"] == pytest.approx(-0.004, abs=0.01)
    assert found["law"]["r_squared"] > 0.95
    assert {h["axis"] for h in found["law"]["hold_out"]} == {"compression"}
    three = summary(planted(sizes=(1e8, 1e9, 1e10), lengths=(1024, 4096, 16384)))
    assert {h["axis"] for h in three["law"]["hold_out"]} == {"params", "length", "compression"}
    assert all(h["r_squared"] > 0.9 for h in three["law"]["hold_out"])


def test_accuracies_can_be_compared_instead():
    found = summary(planted(), "generated")
    assert next(c for c in found["cells"] if c["unit"] == "dense")["score"] in {i / 16 for i in range(17)}
    row = planted()[1]
    assert sample_scores(row, "likelihood") == pytest.approx(row["gold"])
    with pytest.raises(SparselandError, match="score=bleu"):
        summary([], "bleu")


def test_no_rows_are_an_empty_summary(tmp_path):
    empty = summary([])
    assert empty["safe"] == empty["ranking"] == empty["isoflops"] == []
    assert "needs as many points" in empty["law"]["reason"] or empty["law"]["coefficients"] == {}
    write_page(empty, tmp_path / "p.html")


def test_the_page_stands_alone(found, tmp_path):
    path = tmp_path / "report.html"
    write_page(found, path)
    text = path.read_text()
    assert text.count("<svg") == 2 * 2 * 3 + 4 + 1
    assert "not counted" in text
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text)
    assert "<script" not in text
    assert "R² 0.9" in text


# ---------------------------------------------------------------------- command


def command(*arguments):
    return main(["study", "sparse-frontier", *map(str, arguments)])


def test_the_command_measures_prints_and_writes(folders, tmp_path, capsys):
    out = tmp_path / "out"
    given = (
        folders[0], "--units", "block", "--compression", "1,4", "--lengths", LENGTH, "--tasks", "needle",
        "--samples", "2", "--out", out, "--dtype", "float32", "--device", "cpu", "--uncounted",
    )  # fmt: skip
    assert command(*given) == 0
    text = capsys.readouterr().out
    assert "What the dense model can do" in text
    assert str(out / "report.html") in text
    assert command(*given, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {**json.loads((out / "summary.json").read_text()), "out": str(out)}
    assert [c["unit"] for c in told["cells"]] == ["dense", "block"]
    first = next(read_rows(out / "results.jsonl"))
    assert first["command"].startswith(f"sparseland study sparse-frontier {folders[0]} --units block")


def test_ctrl_c_says_where_the_results_are(folders, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job._Model, "_decode", stop)
    code = command(
        folders[0], "--units", "quest", "--compression", "4", "--lengths", LENGTH, "--tasks", "needle",
        "--samples", "2", "--out", tmp_path / "o", "--dtype", "float32", "--device", "cpu", "--uncounted",
    )  # fmt: skip
    assert code == 130
    assert "what was measured is kept in" in capsys.readouterr().err.splitlines()[-1]
    assert [r["unit"] for r in read_rows(tmp_path / "o" / "results.jsonl") if r["kind"] == "cell"] == [
        "dense"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["study", "sparse-forest"], "no study 'sparse-forest'"),
        (["study", "sparse-frontier", "--units", "page"], "no 'page'"),
        (["study", "sparse-frontier", "--compression", "2,x"], "'x' is not allowed"),
        (["study", "sparse-frontier", "--compression", "0.5"], "'0.5' is not allowed"),
        (["study", "sparse-frontier", "--lengths", "big"], "'big' is not allowed"),
        (["study", "sparse-frontier", "--samples", "0"], "--samples '0'"),
        (["study", "sparse-frontier", "--score", "bleu"], "--score 'bleu'"),
        (["study", "sparse-frontier", "--score", "generated", "--no-generate"], "needs generation"),
        (["study", "sparse-frontier", "/nowhere/model"], "/nowhere/model"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "study").exists()


# ------------------------------------------------------------------------ claim


def test_the_claim_is_judged_by_its_numbers(monkeypatch):
    from sparseland.claims import sparse_frontier as claim

    monkeypatch.setattr(claim, "measure", lambda request: planted(sizes=(1e8,), lengths=(1024, 4096, 8192)))
    told = claim.reproduce("full")
    assert told["holds"] is True
    assert told["ours"]["tasks_that_dense_can_not_do"] == ["beyond"]
    assert told["ours"]["safe_compression_decoding"] > told["ours"]["safe_compression_prompts"] == 1
    assert told["ours"]["more_in_decoding"] is True
    assert told["ours"]["least_compression_that_hurts_a_task"] == 2
    assert told["ours"]["best_unit_per_task"]["easy, decode"] == "quest"
    json.dumps(told, allow_nan=False)

    def swapped(request):
        names = {"block": "quest", "quest": "block"}
        rows = planted(sizes=(1e8,), lengths=(1024, 4096, 8192))
        return [
            {**r, "unit": names[r["unit"]], "phase": job.phase_of(names[r["unit"]]),
             "spec": spec(names[r["unit"]], r["compression"], r["length"])}
            if r.get("unit") in names else r for r in rows
        ]  # fmt: skip

    monkeypatch.setattr(claim, "measure", swapped)
    assert claim.reproduce("full")["holds"] is False
    assert claim.reproduce("smoke")["holds"] is False
    monkeypatch.setattr(claim, "measure", lambda request: [])
    with pytest.raises(SparselandError, match="nothing was measured within 400 seconds"):
        claim.reproduce("full")


def safe_row(mean, tried=16.0, tells=True):
    return {"phase": "prefill", "mean": mean, "tried": tried, "mean_can_tell": tells}


@pytest.mark.parametrize(
    ("decode", "prefill", "more"),
    [
        (safe_row(8), safe_row(4), True),
        (safe_row(16), safe_row(4), True),
        (safe_row(8), safe_row(5, tried=5), True),
        (safe_row(4), safe_row(4), False),
        (safe_row(4), safe_row(8), False),
        (safe_row(4), safe_row(16), False),
        (safe_row(16), safe_row(16), None),
        (safe_row(16), safe_row(5, tried=5), None),
        (safe_row(15.5, tried=15.5), safe_row(15.7), None),
        (safe_row(16, tells=False), safe_row(4), None),
        (safe_row(16), safe_row(4, tells=False), None),
        (None, safe_row(4), None),
    ],
)
def test_more_in_decoding_is_told_only_where_the_trials_go_far_enough(decode, prefill, more):
    from sparseland.claims import sparse_frontier as claim

    safe = [{**row, "phase": phase} for row, phase in ((decode, "decode"), (prefill, "prefill")) if row]
    best = {phase: claim._best(safe, phase) for phase in claim.PHASES}
    assert claim._more(best["decode"], best["prefill"]) is more


def test_a_claim_that_is_not_told_does_not_hold(monkeypatch):
    from sparseland.claims import sparse_frontier as claim

    rows = planted(sizes=(1e8,), lengths=(1024, 4096, 8192))
    told = {}
    for samples in (16, 3):  # of three samples no loss is significant
        cut = ("nats", "gold", "chosen", "generated")
        few = [{**r, **{k: r[k][:samples] for k in cut}} if r["kind"] == "cell" else r for r in rows]
        monkeypatch.setattr(claim, "measure", lambda request, few=few: few)
        told[samples] = claim.reproduce("full")
    assert told[16]["holds"] is True
    assert told[3]["holds"] is False
    assert told[3]["ours"]["more_in_decoding"] is None
    assert told[3]["ours"]["safe_compression_decoding"] is None


def test_phases_are_compared_at_a_compression_that_all_units_reach(monkeypatch):
    from sparseland.claims import sparse_frontier as claim

    rows = lines(vertical_slash=(0.9, (1.5, 2.5, 4, 5)), quest=(0.9, (2, 4, 8, 16)))
    monkeypatch.setattr(claim, "measure", lambda request: rows)
    ours = claim.reproduce("full")["ours"]
    assert ours["score_kept_at"] == {"easy, 1024 tokens": 5}
    kept = (0.9 - 0.1 * math.log2(5)) / 0.9
    assert ours["score_kept_prompts"] == pytest.approx(kept)
    assert ours["score_kept_decoding"] == pytest.approx(kept)


def test_what_the_claim_records_can_be_analysed_again(monkeypatch):
    from sparseland.claims import sparse_frontier as claim

    rows = planted(sizes=(1e8,), lengths=(1024, 4096, 8192))
    monkeypatch.setattr(claim, "measure", lambda request: rows)
    told = json.loads(json.dumps(claim.reproduce("full"), indent=1))
    again, first = summary(told["measured"]), summary(rows)
    assert again["law"]["coefficients"] == pytest.approx(first["law"]["coefficients"], abs=1e-3)
    for a, b in zip(again["cells"], first["cells"], strict=True):
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)
    assert [r["mean"] for r in again["safe"]] == [r["mean"] for r in first["safe"]]


def test_the_claim_runs_small():
    from sparseland.claims import sparse_frontier as claim

    told = claim.reproduce("smoke")
    assert told["holds"] is True
    assert told["ours"]["score_kept_at"]
    json.dumps(told, allow_nan=False)
