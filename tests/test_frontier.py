"""The main job end to end on a tiny random model: screening, full measurements, files, resuming."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparseland import frontier
from sparseland.errors import SparselandError
from sparseland.frontier import job, measuring
from sparseland.frontier.options import candidates, time_limit
from sparseland.method import parse_spec
from sparseland.models.tiny import tiny_model
from sparseland.report.results import read_results
from sparseland.report.words import verdict

METHODS = [
    *(f"flexprefill:gamma={g},min_budget=32,block_size=16" for g in (0.5, 0.7, 0.9)),
    *(f"minference:vertical={v},slash=100" for v in (16, 64)),
    *(f"double-sparsity:budget=1/{b},bits=16" for b in (2, 8)),
    *(f"mustafar:sparsity={s}" for s in (0.3, 0.9)),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("frontier")
    tiny_model("llama").save_pretrained(root / "model")
    letters = {chr(97 + i): 3 + i for i in range(26)}
    words = Tokenizer(models.WordLevel({"<unk>": 0, **letters}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(root / "model")
    generator = torch.Generator().manual_seed(0)
    text = " ".join(chr(97 + int(i)) for i in torch.randint(26, (4000,), generator=generator))
    (root / "text.txt").write_text(text)
    return frontier.FrontierOptions(
        model=str(root / "model"), text=root / "text.txt", methods=METHODS, lengths=[256, 512],
        tolerance=0.05, out=root / "out", dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(options):
    root = options.out.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "TASK_SAMPLES", {})  # needles need a model that can read
        # Times of tiny models tell nothing.
        patch.setattr(job, "SLOWEST", float("inf"))
        patch.setattr(job, "SLOWEST_PROMPT", float("inf"))
        result = frontier.run(options)
        rows = [json.loads(line) for line in (root / "out" / "results.jsonl").read_text().splitlines()]
        steps = []
        frontier.run(options, lambda message, done: steps.append(message))
        patch.setattr(job, "SLOWEST", 0.0)
        hasty = []
        frontier.run(options, lambda message, done: hasty.append(message))
    again = [json.loads(line) for line in (root / "out" / "results.jsonl").read_text().splitlines()]
    return result, rows, again, (steps, hasty), root / "out"


def test_every_candidate_is_screened_once_at_the_shortest_length(run):
    screened = [r for r in run[1] if r.get("stage") == "screen"]
    assert sorted(r["recipe"][0] for r in screened) == sorted(parse_spec(m).spec for m in METHODS)
    assert {r["length"] for r in screened} == {256}
    assert all((r["decode_ms"] is None) == ("prefill" in slug_roles(r)) for r in screened)


def test_a_cache_is_compared_with_dense_after_as_many_tokens(run):
    # A prompt's selection stores what dense stores, however few tokens were decoded after it.
    prompts = [r for r in run[1] if r["kind"] == "measurement" and r["role"] == "method"]
    prompts = [r for r in prompts if slug_roles(r) == {"prefill"}]
    assert {r["stage"] for r in prompts} == {"screen", "full"}
    assert all(r["cache_bytes"] == r["dense_cache_bytes"] for r in prompts)


def slug_roles(row):
    return parse_spec(row["recipe"][0]).roles


def test_per_role_the_best_of_different_methods_go_on(run):
    full = {r["recipe"][0] for r in run[1] if r.get("stage") == "full" and len(r.get("recipe", ())) == 1}
    slugs = {spec.partition(":")[0] for spec in full}
    assert {"flexprefill", "minference", "double-sparsity", "mustafar"} <= slugs
    select = [s for s in full if s.startswith("double-sparsity")]
    assert len(select) <= job.SURVIVORS["select"]


def test_a_store_far_slower_than_dense_goes_no_further(run):
    steps, hasty = run[3]
    measured = lambda messages: {m.partition(":")[0] for m in messages if m.endswith(" tokens")}  # noqa: E731
    assert "mustafar" in measured(steps)
    assert "mustafar" not in measured(hasty)
    assert {"flexprefill", "double-sparsity"} <= measured(hasty)


def test_survivors_are_measured_at_every_length_and_inspected(run):
    rows = run[1]
    full = [r for r in rows if r.get("stage") == "full" and r["role"] == "method"]
    assert {r["length"] for r in full} == {256, 512}
    looked_at = [r for r in rows if r["kind"] == "inspection"]
    assert {r["recipe"][0] for r in looked_at} == {r["recipe"][0] for r in full if "prefill" in slug_roles(r)}
    assert all(0 < r["recall"] <= 1.001 and r["attend_s"] > 0 and r["select_s"] > 0 for r in looked_at)
    sparse = [r for r in looked_at if r["density"] < 0.9]
    assert sparse
    assert all(r["recall"] > r["density"] for r in sparse)


def test_files_are_written_and_a_second_run_measures_nothing_anew(run):
    result, rows, again, (steps, _), out = run
    assert (out / "recipe.json").exists()
    page = (out / "report.html").read_text()
    assert "What the selections keep" in page
    assert "Attention time of a prompt" in page
    assert {r["kind"] for r in rows} >= {"run", "measurement", "inspection", "map", "drift", "choice"}
    count = lambda found: sum(r["kind"] in ("measurement", "inspection", "map") for r in found)  # noqa: E731
    assert count(again) == count(rows)
    assert steps
    assert result.choice["kind"] == "choice"


@pytest.mark.parametrize("what", ["dense", "tasks", "recall"])
def test_memory_that_does_not_suffice_is_noted_and_the_run_goes_on(options, tmp_path, monkeypatch, what):
    """The longest length, or a look at what was chosen, is left out; recipe and report are there."""

    def greedy(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has")

    measure = measuring.run_window
    monkeypatch.setattr(job, "TASK_SAMPLES", {"needle": 1} if what == "tasks" else {})
    if what == "dense":
        monkeypatch.setattr(
            measuring, "run_window",
            lambda m, ids, n, *a, **k: greedy() if n == 512 else measure(m, ids, n, *a, **k),
        )  # fmt: skip
    else:
        monkeypatch.setattr(job, {"tasks": "score_task", "recall": "inspect"}[what], greedy)
    result = frontier.run(replace(options, methods=METHODS[:1], out=tmp_path / "out"))
    assert (tmp_path / "out" / "recipe.json").exists()
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    (left,) = [r for r in rows if r["kind"] == "left_out"]
    assert left["reason"] == "out of memory: 3.00 GiB more were asked for"
    assert {r["length"] for r in result.rows} == ({256} if what == "dense" else {256, 512})
    assert "out of memory" in (tmp_path / "out" / "report.html").read_text()


def test_when_its_minutes_are_over_a_run_chooses_and_says_what_it_left_out(options, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "TASK_SAMPLES", {"needle": 1})
    monkeypatch.setattr(job, "SCREENED_BY", 1.0)
    for limit in ("SLOWEST", "SLOWEST_PROMPT"):  # times of tiny models tell nothing
        monkeypatch.setattr(job, limit, float("inf"))
    # All are screened (the first without a look at the clock), then the 11th minute has come.
    clock = iter([0.0, *[30.0] * (len(METHODS) - 1)])
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: next(clock, 60 * 11.0)))
    options = replace(options, out=tmp_path / "out", minutes=1.0)
    result = frontier.run(options)
    full = {tuple(r["recipe"]) for r in result.rows if r["stage"] == "full"} - {(), ("dense",)}
    assert len(full) == 1
    assert result.choice is not None
    results = read_results(tmp_path / "out" / "results.jsonl")
    said = verdict(results)[-1]
    assert said.startswith("Left out because the run's 1 minutes were over: ")
    assert all(what in said for what in ("in full", "needle at 256 tokens", "recall", "--minutes"))

    monkeypatch.undo()
    monkeypatch.setattr(job, "TASK_SAMPLES", {})
    for limit in ("SLOWEST", "SLOWEST_PROMPT"):
        monkeypatch.setattr(job, limit, float("inf"))
    more = frontier.run(replace(options, minutes=0))
    assert {tuple(r["recipe"]) for r in more.rows if r["stage"] == "full"} > full
    assert not any("Left out" in s for s in verdict(read_results(tmp_path / "out" / "results.jsonl")))

    late = iter([0.0])  # what is known takes no time, and is not left out
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: next(late, 60 * 11.0)))
    again = frontier.run(options)
    assert again.choice == more.choice
    assert not any("Left out" in s for s in verdict(read_results(tmp_path / "out" / "results.jsonl")))


def test_settings_that_were_not_tried_follow_those_that_lose_too_much(options, tmp_path, monkeypatch):
    """The first is screened, its method's others come too late: they are measured after it in full."""
    monkeypatch.setattr(job, "TASK_SAMPLES", {})
    monkeypatch.setattr(job, "SLOWEST_PROMPT", float("inf"))
    monkeypatch.setattr(job, "SCREENED_BY", 0.0)
    options = replace(options, out=tmp_path / "out", minutes=60.0, tolerance=0.0)
    monkeypatch.setattr(job.Judge, "within", lambda self, specs: "0.9" in specs[0])
    rows = frontier.run(options).rows
    tried = [
        r["recipe"][0] for r in rows if r["stage"] == "full" and r["role"] == "method" and r["length"] == 256
    ]
    assert tried == [parse_spec(m).spec for m in METHODS[:3]]


def test_what_was_left_out_is_said_until_another_run_has_chosen(tmp_path):
    run, left = {"kind": "run", "schema": job.SCHEMA}, {"kind": "left_out", "what": "a", "late": True}
    choice = {"kind": "choice", "recipe": [], "length": 512, "reason": "x"}
    path = tmp_path / "results.jsonl"
    for rows, expected in (
        ([run, choice, left], ["a"]),
        ([run, choice, left, run], ["a"]),  # interrupted before it chose
        ([run, choice, left, run, choice], []),
        ([run, choice, left, run, choice, {**left, "what": "b"}], ["b"]),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert [row["what"] for row in read_results(path).left_out] == expected


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({}, 14),
        ({"minutes": 5.0}, 5),
        ({"minutes": 0.0}, math.inf),
        ({"lengths": [512]}, math.inf),
        ({"lengths": [8192, 32768]}, 14),
    ],
)
def test_only_the_default_run_has_a_limit_of_its_own(given, limit):
    assert time_limit(frontier.FrontierOptions(**given)) == limit


def test_without_memory_for_any_length_there_is_one_line(options, tmp_path, monkeypatch):
    def greedy(*_args, **_kwargs):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(measuring, "run_window", greedy)
    with pytest.raises(SparselandError, match=r"can't read 512 tokens here: out of memory"):
        frontier.run(replace(options, methods=METHODS[:1], out=tmp_path / "out"))


def test_a_default_run_leaves_out_what_has_to_be_trained_and_what_is_for_video():
    left_out = set(frontier.left_out())
    default = {m.card.slug for m in candidates(frontier.FrontierOptions())}
    assert {"seer-attention", "mminference", "sparse-frontier"} <= left_out
    assert not left_out & default
    named = candidates(frontier.FrontierOptions(methods=sorted(left_out) or ["flexprefill"]))
    assert named


def screened(slug, density, excess, time):
    return job.Screened(slug, density, excess, time)


def test_settings_for_prompts_are_measured_from_the_sparsest_on():
    dense, sparse = screened("dense", 1.0, 0.0, 1.0), screened("sparse", 0.6, 0.0, 1.2)
    lossy, lossier = screened("lossy", 0.5, 0.01, 0.7), screened("lossier", 0.2, 0.2, 0.4)
    assert job._in_order([dense, lossy, sparse], "prefill") == ["sparse", "dense"]
    assert job._in_order([lossier, lossy], "prefill") == ["lossy"]
    assert job._in_order([dense, sparse, lossy], "select") == ["dense"]


def test_a_setting_that_loses_too_much_is_followed_by_the_next():
    measured = []

    class Stub:
        _measured = staticmethod(lambda methods: False)
        _in_time = staticmethod(lambda share, what, known: True)
        measure_all = staticmethod(lambda methods, role: measured.append(methods[0].spec))
        within = staticmethod(lambda specs: specs == [settings[1].spec])

    Stub.measuring = Stub.judge = Stub
    settings = [parse_spec(f"streaming:window={w}") for w in (16, 32, 64)]
    assert job.Job._measure_survivors(Stub, [settings]) == settings[:2]
    assert measured == [m.spec for m in settings[:2]]
