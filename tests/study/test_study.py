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
from sparseland.models import load_model
from sparseland.rowfile import read_rows
from sparseland.study import ask, job
from sparseland.study.analysis import can_do, sample_scores, summary
from sparseland.study.job import StudyOptions, measure
from sparseland.study.journal import Journal
from sparseland.study.page import write_page
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
                for unit, slope in (("dense", 0), ("block", 0.8), ("quest", 0.02)):
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
            assert r["ruled_out"] == 16
    few = summary(planted(samples=3))
    assert not any(r["worst_can_tell"] for r in few["safe"])


def test_units_are_ranked_only_against_units_of_their_phase_and_measured_alike(found):
    assert {(r["phase"], len(r["units"])) for r in found["ranking"]} == {("prefill", 1), ("decode", 1)}
    rows = planted()
    more = [
        {**r, "unit": "flexprefill", "nats": [n + 1 for n in r["nats"]]}
        for r in rows
        if r.get("unit") == "block"
    ]
    ranked = summary(rows + more)["ranking"]
    for r in ranked:
        if r["phase"] == "prefill":
            assert [u["unit"] for u in r["units"]] == ["block", "flexprefill"]
    # Where a cell is missing, its setting's units can't be compared.
    assert more[-4]["task"] == "beyond"
    fewer = summary(rows + [r for r in more if r is not more[-8]])["ranking"]
    assert len(fewer) == len(ranked) - 1


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
    assert law["log compression, decode"] == pytest.approx(-0.02, abs=0.03)
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
    assert told["ours"]["safe_compression_decoding"] >= told["ours"]["safe_compression_prompts"] == 1
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
