"""The command line: exit codes, one-line errors, JSON, lean imports. Models are faked or not reached."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseland
from sparseland.cli import catalog, main
from sparseland.cli.catalog import recorded_results
from sparseland.cli.generate import check_context, encode, read_prompt
from sparseland.cli.measured import run_bench
from sparseland.cli.output import finite
from sparseland.errors import SparselandError


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


def refuse(capsys, *arguments: str, code: int = 2) -> str:
    """The one line on stderr of a command that must fail; nothing on stdout."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


# ------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("frobnicate", ["No such command", "frobnicate"]),
        ("list --colour", ["No such option", "--colour"]),
        ("list --site sky", ["unknown site 'sky'", "attention", "cache"]),
        ("show", ["Missing argument"]),
        ("show mustafa", ["unknown method 'mustafa'", "mustafar"]),
        ("frontier --methods nosuch", ["unknown method 'nosuch'"]),
        ("frontier --methods mustafar:color=1", ["no parameter 'color'", "sparsity"]),
        ("frontier --methods mustafar:sparsity=2", ["sparsity=2", "must be a number", "< 1"]),
        ("frontier --methods mustafar:sparsity", ["write key=value"]),
        ("frontier --methods ,", ["a name is empty"]),
        ("frontier --methods mustafar,", ["a name is empty"]),
        ("frontier --methods mustafar:", ["a parameter is empty", "mustafar:key=value"]),
        ("study sparse-frontier --units ,", ["--units ','", "a name is empty"]),
        ("study sparse-frontier --tasks needle,,words", ["--tasks 'needle,,words'", "a name is empty"]),
        ("frontier --lengths abc", ["'abc' is not allowed", "2048,8192"]),
        ("frontier --lengths 2048,,4096", ["'' is not allowed"]),
        ("frontier --lengths 2048,-1", ["'-1' is not allowed"]),
        ("frontier --lengths 0", ["'0' is not allowed"]),
        ("frontier --lengths 2e3", ["'2e3' is not allowed"]),
        ("frontier --tolerance much", ["--tolerance 'much'", "a number"]),
        ("frontier --tolerance nan", ["--tolerance 'nan'", "a number"]),
        ("frontier --rope-scale big", ["--rope-scale 'big'", "a number"]),
        ("frontier --gpu --device cpu", ["--gpu", "--device cpu", "exclude each other"]),
        ("frontier --gpu --lengths=", ["'' is not allowed"]),
        ("frontier --gpu --rope-scale=", ["--rope-scale ''", "a number"]),
        ("generate --rope-scale fit", ["--rope-scale 'fit'", "a number"]),
        ("frontier --seed 1.5", ["--seed '1.5'", "a whole number >= 0"]),
        ("frontier --seed", ["--seed", "requires an argument"]),
        ("frontier a b", ["unexpected extra argument"]),
        ("generate", ["the prompt is empty", "--prompt-file"]),
        ("generate --prompt-file /nowhere/prompt.txt", ["can't read", "/nowhere/prompt.txt"]),
        ("generate --prompt x --max-new-tokens 0", ["--max-new-tokens '0'", ">= 1"]),
        (
            "generate --prompt x --recipe /nowhere/recipe.json",
            ["can't read the recipe", "/nowhere/recipe.json"],
        ),
        ("reproduce mustafar --scale huge", ["scale=huge", "smoke, full"]),
        ("reproduce nosuch", ["unknown method 'nosuch'"]),
        ("bench warp_drive", ["warp_drive", "block_sparse_attention"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, words):
    err = refuse(capsys, *arguments.split())
    assert err.startswith("sparseland: error: ")
    for word in words:
        assert word.lower() in err.lower()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--lengths 64", ["64"]),
        ("--tolerance -1", ["tolerance=-1"]),
        ("--text /nowhere/text.txt", ["/nowhere/text.txt"]),
        ("--dtype float8", ["float8", "bfloat16"]),
        ("--device meta", ["device='meta'", "no values"]),
        ("--rope-scale 0.5", ["0.5"]),
        ("/nowhere/model", ["/nowhere/model"]),
    ],
)
def test_frontier_refuses_what_it_can_not_run_and_writes_nothing(capsys, tmp_path, arguments, words):
    out = tmp_path / "out"
    err = refuse(capsys, "frontier", *arguments.split(), "--methods", "mustafar", "--out", str(out))
    for word in words:
        assert word in err
    assert not out.exists()


def test_frontier_refuses_an_out_that_is_a_file_or_lies_in_one(capsys, tmp_path):
    file = tmp_path / "taken"
    file.write_text("precious")
    for out in (file, file / "deeper"):
        assert "is a file, not a folder" in refuse(capsys, "frontier", "--out", str(out))
    assert file.read_text() == "precious"


def test_frontier_refuses_an_out_without_permission(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    err = refuse(capsys, "frontier", "--out", str(tmp_path / "a" / "b"))
    assert f"no permission to write in {tmp_path}" in err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no valid JSON"),
        ("[]", "JSON object"),
        ('{"schema": 99, "methods": []}', "schema 99"),
        ('{"schema": 1, "methods": [{"slug": "nosuch"}]}', "unknown method 'nosuch'"),
        ('{"schema": 1, "methods": [{"slug": "mustafar", "params": {"sparsity": 7}}]}', "sparsity=7"),
    ],
)
def test_generate_refuses_a_recipe_before_it_loads_a_model(capsys, tmp_path, monkeypatch, content, words):
    monkeypatch.setitem(sys.modules, "sparseland.models", None)  # an import would be an error
    path = tmp_path / "recipe.json"
    path.write_text(content)
    assert words in refuse(capsys, "generate", "--prompt", "x", "--recipe", str(path))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b" \n\t", "empty"), (b"\xff\xfe\x00", "not UTF-8"), (b"a\0b", "zero bytes")],
)
def test_generate_refuses_a_prompt_that_is_no_text(capsys, tmp_path, content, words):
    path = tmp_path / "prompt"
    path.write_bytes(content)
    assert words in refuse(capsys, "generate", "--prompt-file", str(path))


def test_a_folder_as_prompt_file_is_refused(capsys, tmp_path):
    assert "can't read" in refuse(capsys, "generate", "--prompt-file", str(tmp_path))


def test_file_and_question_are_joined(tmp_path):
    (tmp_path / "p").write_text("\ufeffA long text.", encoding="utf-8")
    assert read_prompt(tmp_path / "p", "What is it?") == "A long text.\n\nWhat is it?"


def test_an_answer_must_fit_into_the_context():
    text = types.SimpleNamespace(max_position_embeddings=100)
    model = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text))
    check_context(model, 100)
    with pytest.raises(SparselandError, match=r"take 101 tokens, the model's context is 100.*--rope-scale 2"):
        check_context(model, 101)


class Letters:
    """A tokenizer of single characters, as far as generate needs one."""

    chat_template = None

    def __call__(self, text: str, return_tensors: str) -> dict[str, Any]:
        return {"input_ids": torch.tensor([[ord(c) for c in text]])}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(chr(32 + int(i) % 90) for i in torch.as_tensor(ids).flatten())


@pytest.fixture
def tiny(monkeypatch):
    """A tiny random model in the place of what load_model gives; its own greedy answer to ``prompt``."""
    from sparseland import models

    model = models.tiny_model("llama")
    model.generation_config.eos_token_id = None
    loaded = models.LoadedModel(model, Letters(), "tiny")
    monkeypatch.setattr(models, "load_model", lambda *_: loaded, raising=False)
    ids = Letters()("hello there", "pt")["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    return types.SimpleNamespace(model=model, answer=Letters().decode(answer[0, ids.shape[1] :]))


def test_generate_streams_the_dense_answer_and_tells_its_speed(capsys, tiny):
    assert main(["generate", "--prompt", "hello there", "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out == tiny.answer + "\n"
    assert re.fullmatch(
        r"dense: prompt 11 tokens, first token after [\d.]+ s, then [\d.]+ tokens/s over 11 tokens\n", err
    )


def test_generate_with_a_recipe_is_sparse_and_leaves_the_model_dense(capsys, tiny, tmp_path):
    recipe = tmp_path / "recipe.json"
    content = {"schema": 1, "methods": [{"slug": "streaming", "params": {"sinks": 0, "window": 2}}]}
    recipe.write_text(json.dumps(content))
    assert (
        main(["generate", "--prompt", "hello there", "--max-new-tokens", "12", "--recipe", str(recipe)]) == 0
    )
    out, err = capsys.readouterr()
    assert out != tiny.answer + "\n"
    assert err.startswith("streaming:")
    assert main(["generate", "--prompt", "hello there", "--max-new-tokens", "12"]) == 0
    assert capsys.readouterr().out == tiny.answer + "\n"


def test_generate_says_what_it_calibrates_and_what_keeps_it(capsys, tiny, tmp_path, monkeypatch):
    ids = torch.randint(3, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("sparseland.handle._default_calibration_ids", lambda *_: ids)
    path = tmp_path / "recipe.json"
    arguments = ["generate", "--prompt", "hello there", "--max-new-tokens", "2", "--recipe", str(path)]
    methods = [{"slug": "double-sparsity"}, {"slug": "mustafar"}, {"slug": "r-sparse"}]
    path.write_text(json.dumps({"schema": 1, "methods": methods}))
    assert main(arguments) == 0
    first, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("sparseland: calibrating double-sparsity, r-sparse on the default text")
    assert "handle.recipe().save() keep it" in first
    with sparseland.apply(tiny.model, ["double-sparsity", "r-sparse"], calibration_ids=ids) as handle:
        handle.recipe().save(path)
    assert main(arguments) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_ctrl_c_in_generate_ends_the_line_first(capsys, tiny, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny.model, "generate", interrupted)
    assert main(["generate", "--prompt", "hello"]) == 130
    assert capsys.readouterr() == ("\n", "sparseland: interrupted\n")


def test_the_chat_form_is_used_where_there_is_one():
    seen = []

    class Chat(Letters):
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages: Any, **options: Any) -> dict[str, Any]:
            seen.append((messages, options["add_generation_prompt"]))
            return {"input_ids": torch.zeros(1, 3)}

    assert encode(Chat(), "hi").shape == (1, 3)
    assert seen == [([{"role": "user", "content": "hi"}], True)]
    assert encode(Letters(), "hi").tolist() == [[104, 105]]


# ------------------------------------------------- unexpected and Ctrl-C


def test_an_unexpected_error_is_one_line_and_exit_code_1(capsys, monkeypatch):
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("sparseland.cli.catalog.show_list", broken)
    err = refuse(capsys, "list", code=1)
    assert err == (
        "sparseland: error: ZeroDivisionError: first line (run with SPARSELAND_DEBUG=1 for the traceback)\n"
    )
    monkeypatch.setenv("SPARSELAND_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_ctrl_c_is_one_line_and_exit_code_130(capsys, monkeypatch):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparseland.cli.catalog.show_list", interrupted)
    assert refuse(capsys, "list", code=130) == "sparseland: interrupted\n"


def test_a_closed_pipe_is_silent():
    code = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from sparseland.cli import main; "
    done = python("-c", code + "sys.exit(main(['show', 'mustafar', '--json']))")
    assert (done.returncode, done.stderr) == (1, "")


# ---------------------------------------------------------- list, show


def test_list_json_has_every_method(capsys):
    assert main(["list", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert {"mustafar", "double-sparsity", "r-sparse"} <= {card["slug"] for card in cards}
    for card in cards:
        assert {"slug", "site", "training", "paper"} <= card.keys()
        assert card["paper"] or card["control"]
        assert card["summary"]


def test_list_prints_one_line_a_method_and_filters(capsys):
    assert main(["list", "--json", "--site", "cache"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert main(["list", "--site", "cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {card["site"] for card in cards} == {"cache"}
    assert [line.split()[:3] for line in lines[2:]] == [[c["slug"], c["site"], c["training"]] for c in cards]


def test_show_prints_the_card_with_parameters_and_claims(capsys):
    assert main(["show", "mustafar", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert main(["show", "mustafar"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert card["title"] in text
    assert card["paper"] in text
    parameter = next(p for p in card["parameters"] if p["name"] == "sparsity")
    assert parameter["allowed"] in text
    assert card["claims"]
    assert all(" ".join(claim.split()[:5]) in text for claim in card["claims"])


@pytest.mark.parametrize("slug", ["minference", "double-sparsity", "sparse-frontier", "moa", "flexprefill"])
def test_measurements_in_show_are_whole_words_in_100_columns(capsys, slug):
    """A name or heading that is recorded stands in one piece at the beginning of a line."""
    recorded = [e for e in recorded_results(slug) if "ours" not in e]
    names = {k for e in recorded for k, v in e.items() if not isinstance(v, dict | list)} - {"file", "slug"}
    assert main(["show", slug]) == 0
    lines = capsys.readouterr().out.partition("Our measurements")[2].splitlines()
    assert names <= {line.split()[0] for line in lines if line.strip()}
    assert max(map(len, lines)) <= 100
    for entry in recorded:
        if "recipe" in entry:
            words = {word for line in lines for word in re.split(r"[\s:,]+", line)}
            assert set(re.split("[:,]", entry["recipe"])) <= words


def test_measurements_in_show_stand_beside_each_other(capsys, monkeypatch):
    entries = [{"file": "f.json", "slug": "moa", "length": n, "layers": [1]} for n in (512, 1024, 2048, 4096)]
    entries[1]["note"] = "moa:density=0.25,new_tokens=64"
    monkeypatch.setattr(catalog, "recorded_results", lambda slug: entries)
    assert main(["show", "moa"]) == 0
    lines = capsys.readouterr().out.partition("f.json\n")[2].splitlines()
    assert [line.split() for line in lines if line] == [
        ["length", "512", "1024", "2048"],
        ["note", "–", "moa:", "–"],
        ["density=0.25,"],
        ["new_tokens=64"],
        ["length", "4096"],
    ]


def test_show_finds_recorded_results_at_any_depth(tmp_path, monkeypatch, capsys):
    package = tmp_path / "src" / "sparseland"
    claims = tmp_path / "benchmarks" / "results" / "claims"
    claims.mkdir(parents=True)
    (claims.parent / "prefill.json").write_text(
        json.dumps(
            {"machine": "m", "runs": [{"slug": "mustafar", "speedup": 1.5}, {"slug": "other", "speedup": 9}]}
        )
    )
    (claims.parent / "broken.json").write_text("{")
    (claims / "mustafar.json").write_text(
        json.dumps({"claim": "70 %", "holds": False, "ours": {"loss": float("nan")}})
    )
    monkeypatch.setattr(sparseland, "__file__", str(package / "__init__.py"))
    assert recorded_results("mustafar")[0] == {"file": "prefill.json", "slug": "mustafar", "speedup": 1.5}
    assert main(["show", "mustafar"]) == 0
    out = capsys.readouterr().out
    assert "prefill.json" in out
    assert "1.5" in out
    assert "claims/mustafar.json" in out
    assert "does not hold: 70 %" in out
    assert main(["show", "mustafar", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][1]["ours"] == {"loss": None}
    assert main(["show", "r-sparse"]) == 0
    assert "none recorded" in capsys.readouterr().out


# ------------------------------------------------- frontier, bench, reproduce


@dataclasses.dataclass
class Options:
    """The fields of ``FrontierOptions`` that the command line fills."""

    model: Any
    text: Any
    methods: list[str]
    lengths: list[int]
    tolerance: float
    out: Path
    dtype: str
    device: Any
    rope_scale: Any
    minutes: float | None
    seed: int
    command: str


ROW = {
    "kind": "measurement", "recipe": ["mustafar"], "label": "mustafar", "role": "method", "length": 512,
    "stage": "full", "status": "ok", "density": 1.0, "decode_density": 1.0, "loss": 2.01, "dense_loss": 2.0,
    "decode_loss": 2.0, "dense_decode_loss": 2.0, "kl": float("nan"), "top1": 0.99, "prefill_s": 1.0,
    "dense_prefill_s": 2.0, "decode_ms": 9.0, "dense_decode_ms": 10.0, "cache_bytes": 5,
    "dense_cache_bytes": 10,
}  # fmt: skip
CHOICE = {"kind": "choice", "recipe": ["mustafar"], "length": 512, "reason": "fastest"}


@pytest.fixture
def frontier(monkeypatch):
    """A frontier that measures nothing; ``seen`` keeps its options."""
    module = types.ModuleType("sparseland.frontier")
    module.FrontierOptions = Options
    module.seen = []

    def run(options: Options, progress: Any) -> Any:
        module.seen.append(options)
        print("a library's chatter")
        for share in (0.0, 0.5, 1.0):
            progress(f"mustafar, {share}", share)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (ROW, CHOICE)))
        if options.seed == 13:
            raise KeyboardInterrupt
        return types.SimpleNamespace(rows=[ROW], choice=CHOICE, out=options.out)

    module.run = run
    monkeypatch.setitem(sys.modules, "sparseland.frontier", module)
    monkeypatch.setattr(sparseland, "frontier", module, raising=False)
    return module


def test_frontier_passes_its_options_and_prints_table_verdict_and_paths(capsys, frontier, tmp_path):
    out = tmp_path / "my out"
    arguments = [
        "--methods",
        "mustafar:sparsity=0.5,r-sparse",
        "--lengths",
        "4096,512,512",
        "--out",
        str(out),
    ]
    assert main(["frontier", *arguments]) == 0
    (options,) = frontier.seen
    assert options.methods == ["mustafar:sparsity=0.5", "r-sparse"]
    assert options.lengths == [512, 4096]
    assert (options.tolerance, options.dtype, options.seed, options.model) == (0.01, "auto", 0, None)
    assert options.command == f"sparseland frontier {' '.join(arguments[:-1])} '{out}'"
    stdout, stderr = capsys.readouterr()
    assert "mustafar reads a prompt of 512 tokens 2.00× as fast as the dense model" in " ".join(
        stdout.split()
    )
    assert str(out / "results.jsonl") in stdout
    assert "recipe.json" not in stdout  # not written, so not named
    assert stderr.splitlines() == [
        "a library's chatter", "  0 %  mustafar, 0.0", " 50 %  mustafar, 0.5", "100 %  mustafar, 1.0",
    ]  # fmt: skip


def test_frontier_json_is_one_object_and_nothing_else(capsys, frontier, tmp_path):
    assert main(["frontier", "--json", "--out", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == {"choice": CHOICE, "rows": [ROW | {"kl": None}], "out": str(tmp_path)}
    assert frontier.seen[0].lengths == [2048, 4096]
    assert frontier.seen[0].methods == []


@pytest.mark.parametrize(
    ("arguments", "lengths", "device", "rope_scale"),
    [
        ("--gpu", [8192, 32768], "cuda", "fit"),
        ("--gpu --lengths 4096 --device cuda:1 --rope-scale 2", [4096], "cuda:1", 2.0),
        ("--rope-scale fit --lengths 16384", [16384], None, "fit"),
        ("", [2048, 4096], None, None),
    ],
)
def test_gpu_scale_is_longer_prompts_on_cuda(frontier, tmp_path, arguments, lengths, device, rope_scale):
    assert main(["frontier", *arguments.split(), "--out", str(tmp_path)]) == 0
    (options,) = frontier.seen
    assert (options.lengths, options.device, options.rope_scale) == (lengths, device, rope_scale)


def test_ctrl_c_in_frontier_says_where_the_results_are(capsys, frontier, tmp_path):
    assert main(["frontier", "--seed", "13", "--out", str(tmp_path)]) == 130
    err = capsys.readouterr().err.splitlines()[-1]
    assert str(tmp_path / "results.jsonl") in err
    assert "goes on from there" in err


@pytest.fixture
def bench(monkeypatch):
    """A benchmark that measures nothing; ``seen`` keeps what it was asked."""
    row = {"op": "x", "length": 512, "dtype": "[red]", "speedup": 1.23456, "of_ideal": None}
    module = types.ModuleType("sparseland.bench")
    module.seen = []

    def run(op: str, **options: Any) -> list[dict[str, Any]]:
        progress = options.pop("progress")
        module.seen.append((op, options))
        print("a library's chatter")
        progress("preparing inputs", 0.0)
        progress("x, 1 of 2", 0.0)
        fa4 = {"fa4": "it needs a CUDA device"}
        return [
            {**row, "rivals_ms": {"sdpa": 1.0}, "not_run": fa4},
            {**row, "dtype": "bfloat16", "speedup": 2.0, "not_run": {**fa4, "flex": "it failed"}},
        ]

    module.run = run
    monkeypatch.setitem(sys.modules, "sparseland.bench", module)
    monkeypatch.setattr(sparseland, "bench", module, raising=False)
    return module


def test_bench_prints_a_table_and_progress_on_stderr(capsys, bench):
    assert main(["bench", "x"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "op x, length 512"
    assert lines[2].split() == ["dtype", "speedup", "of_ideal"]
    assert lines[4].split() == ["[red]", "1.235", "–"]
    assert lines[5].split() == ["bfloat16", "2", "–"]
    assert "not run: fa4: it needs a CUDA device" in lines
    assert "not run: flex in 1 of 2 rows: it failed" in lines
    assert "0 %  preparing inputs" in err
    assert "0 %  x, 1 of 2" in err
    assert "chatter" in err


def test_bench_json_says_what_it_was_measured_on(capsys, bench):
    assert main(["bench", "x", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["command"] == "sparseland bench x --json"
    assert said["versions"]["torch"] == torch.__version__
    assert said["machine"]["cores"] >= 1
    assert said["threads"] == torch.get_num_threads()
    assert said["date"].endswith("+00:00")
    assert [row["speedup"] for row in said["rows"]] == [1.23456, 2.0]
    assert said["rows"][0]["rivals_ms"] == {"sdpa": 1.0}


def test_bench_passes_on_length_density_and_command(capsys, bench):
    run_bench("x", True, length=1024, density=0.25, command="sparseland bench x --length 1024")
    assert bench.seen == [("x", {"length": 1024, "density": 0.25})]
    assert json.loads(capsys.readouterr().out)["command"] == "sparseland bench x --length 1024"


CLAIM = """
def reproduce(scale):
    ours = {"speedup": 1.98701, "loss": 0.01}
    rows = [{"setting": scale}]
    return {"slug": "my-paper", "claim": "twice as fast", "paper": {"speedup": 2}, "ours": ours,
            "differs": "a smaller model", "holds": True, "rows": rows}
"""


def test_reproduce_runs_the_claim_of_a_method(capsys, monkeypatch, tmp_path):
    from sparseland import claims

    (tmp_path / "my_paper.py").write_text(CLAIM)
    monkeypatch.setattr(claims, "__path__", [*claims.__path__, str(tmp_path)])
    assert main(["reproduce", "my-paper", "--scale", "full", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == [{"setting": "full"}]
    assert main(["reproduce", "my-paper"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["holds:", "twice", "as", "fast"] in lines
    assert ["speedup", "2", "1.987"] in lines
    assert ["loss", "–", "0.01"] in lines
    assert ["What", "differs:", "a", "smaller", "model"] in lines
    assert ["smoke"] in lines
    sys.modules.pop("sparseland.claims.my_paper")


def test_a_method_without_a_claim_is_told_so(capsys, monkeypatch):
    from sparseland import claims

    monkeypatch.setattr(claims, "__path__", [])
    assert "no claim program for 'mustafar'; there is none yet" in refuse(capsys, "reproduce", "mustafar")


def test_numbers_that_json_lacks_become_null():
    assert finite({"a": [float("inf"), 1.0, (float("nan"),)], 2: None}) == {
        "a": [None, 1.0, [None]],
        "2": None,
    }


# ------------------------------------------------------------- lean start

HEAVY = ("torch", "transformers", "triton", "matplotlib")
LOADED = f"import json, sys; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))"


@pytest.mark.parametrize(
    ("code", "loaded"),
    [
        ("import sparseland; ", []),
        ("from sparseland.cli import main; main(['--help']); ", []),
        ("from sparseland.cli import main; main(['frontier', '--help']); ", []),
        ("from sparseland.cli import main; main(['--version']); ", []),
        ("from sparseland.cli import main; main(['list']); ", ["torch", "triton"]),
    ],
)
def test_what_is_not_needed_is_not_imported(code, loaded):
    done = python("-c", code + LOADED)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= set(loaded)


def test_import_takes_less_than_a_second_and_a_half():
    code = "import time; t = time.perf_counter(); import sparseland; print(time.perf_counter() - t)"
    assert float(python("-c", code).stdout) < 1.5


def test_version_help_and_no_arguments(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sparseland {sparseland.__version__}\n"
    assert main([]) == 0
    assert "frontier" in capsys.readouterr().out
    for command in ("list", "show", "frontier", "generate", "reproduce", "bench"):
        assert main([command, "--help"]) == 0
        assert "Usage: sparseland" in capsys.readouterr().out


def test_the_module_runs_as_a_program():
    done = python("-m", "sparseland.cli", "frobnicate")
    assert done.returncode == 2
    assert done.stderr.startswith("sparseland: error: No such command 'frobnicate'")
