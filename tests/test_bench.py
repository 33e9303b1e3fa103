"""Benchmarks of ops: every one runs, times what it says, and names the rivals that did not run."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from sparseland import bench
from sparseland.bench import attention, decode, rivals, selection, timing, weights
from sparseland.bench.timing import Case, measure
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.ops.attend import attend
from sparseland.patterns import BlockPattern, ColumnPattern, WindowPattern

LENGTH = 512
DENSE_AT_FULL_DENSITY = (
    "block_sparse_attention", "column_sparse_attention", "window_attention", "token_block_attention",
    "permuted_attention", "gather_decode", "bitmap_cache", "sparse_gemv",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Short random inputs in place of the model's, small weights, the fewest rounds."""

    def captured(length: int | None) -> list[AttentionInputs]:
        return [inputs(length or LENGTH)]

    for module in (attention, decode, selection):
        monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(weights, "_IN", 64)
    monkeypatch.setattr(weights, "_OUT", 96)
    monkeypatch.setattr(timing, "SECONDS", 0)
    monkeypatch.setattr(timing, "FEWEST_ROUNDS", 1)


def inputs(length: int = LENGTH, heads: int = 4) -> AttentionInputs:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, length, 32, generator=g) for h in (heads, 2, 2))
    return AttentionInputs(q, k, v, 32**-0.5, 8, 30)


@pytest.mark.parametrize("op", bench.BENCHMARKS)
def test_every_benchmark_gives_rows_with_a_rival(op):
    rows = bench.run(op)
    assert {row["dtype"] for row in rows} >= {"float32"}
    for row in rows:
        assert row["op"] == op
        assert row["rivals_ms"][row["rival"]] == row["dense_ms"] == min(row["rivals_ms"].values())
        assert row["speedup"] == pytest.approx(row["dense_ms"] / row["ours_ms"])
        if "density" in row:
            assert 0 < row["density"] <= 1
            assert row["of_ideal"] == pytest.approx(row["density"] * row["speedup"])


def test_every_op_that_a_prompt_or_a_step_waits_for_has_a_benchmark():
    assert set(bench.BENCHMARKS) >= {
        "block_sparse_attention", "block_column_attention", "column_sparse_attention", "window_attention",
        "token_block_attention", "interval_attention", "permuted_attention", "gather_decode", "bitmap_cache",
        "channel_labels", "block_scores", "tree_search", "sparse_gemv",
    }  # fmt: skip


@pytest.mark.parametrize("op", DENSE_AT_FULL_DENSITY)
@torch.no_grad()
def test_at_full_density_ours_computes_what_the_rivals_compute(op):
    # The first type is float32.
    case = bench.BENCHMARKS[op].cases(None, 1.0)[0]()
    assert case.density is not None
    works = [work for work in case.rivals.values() if not isinstance(work, str)]
    assert works
    if op == "sparse_gemv":  # each call takes the next matrix: all three of a round
        ours, theirs = (torch.stack([work() for _ in range(3)]) for work in (case.ours, works[0]))
        ours, theirs = (t[t[:, 0, 0].argsort()] for t in (ours, theirs))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        return
    for work in works:
        torch.testing.assert_close(case.ours(), work(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("op", [op for op in DENSE_AT_FULL_DENSITY if op.endswith("attention")])
def test_the_asked_density_comes_out(op):
    for asked in (0.1, 0.5):
        for row in bench.run(op, length=1024, density=asked):
            assert 0.4 * asked < row["density"] < 2.5 * asked


def test_the_density_of_a_step_is_the_share_of_what_is_read():
    assert {row["tokens"] for row in bench.run("gather_decode", density=0.25)} == {LENGTH // 4}
    (row, _) = bench.run("bitmap_cache", density=0.5)
    assert row["kept"] == 16
    # 16 of 32 float32 channels, and 8 bytes of bitmap.
    assert row["density"] == pytest.approx((16 * 4 + 8) / (32 * 4))


def test_labels_guess_the_products():
    case = bench.BENCHMARKS["channel_labels"].cases(None, 1.0)[0]()
    guessed, true = case.ours().flatten(), case.rivals["products"]().flatten()
    assert torch.corrcoef(torch.stack([guessed, true]))[0, 1] > 0.97


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"op": "warp_drive"}, ["warp_drive", "block_sparse_attention"]),
        ({"op": "sparse_gemv", "length": 1024}, ["sparse_gemv", "no length"]),
        ({"op": "block_scores", "density": 0.5}, ["block_scores", "no density"]),
        ({"op": "window_attention", "length": 8}, ["length=8", "512"]),
        ({"op": "window_attention", "density": 0.0}, ["density=0.0"]),
        ({"op": "window_attention", "density": 1.5}, ["density=1.5"]),
    ],
)
def test_what_a_benchmark_can_not_do_is_refused(arguments, words):
    with pytest.raises(SparselandError) as refused:
        bench.run(**arguments)
    for word in words:
        assert word in str(refused.value)


def test_progress_is_told_before_each_case():
    told: list[tuple[str, float]] = []
    bench.run("top_values", progress=lambda message, done: told.append((message, done)))
    assert told == [("preparing inputs", 0.0), ("top_values, 1 of 1", 0.0), ("top_values", 1.0)]


# ------------------------------------------------- rivals


def test_a_rival_that_is_missing_or_fails_is_named_with_its_reason():
    def fails() -> None:
        raise RuntimeError("no kernel\nfor this card")

    row = measure(
        Case(
            {},
            lambda: None,
            {"slow": _busy, "gone": "not installed", "bad": fails},
            None,
            {"peer": "no mask"},
        )
    )
    assert row["rival"] == "slow"
    assert row["rivals_ms"].keys() == {"slow"}
    assert row["not_run"] == {"gone": "not installed", "bad": "RuntimeError: no kernel", "peer": "no mask"}
    assert "of_ideal" not in row


def test_the_fastest_rival_counts_and_peers_do_not():
    row = measure(Case({}, lambda: None, {"slow": _busy, "fast": lambda: None}, 0.5, {"peer": lambda: None}))
    assert row["rival"] == "fast"
    assert row["rivals_ms"]["slow"] > row["dense_ms"]
    assert row["peer_ms"] >= 0


def test_without_any_rival_there_is_no_row():
    with pytest.raises(SparselandError, match="gone: not installed"):
        measure(Case({}, lambda: None, {"gone": "not installed"}))


def test_an_op_that_fails_is_an_error_and_no_row():
    with pytest.raises(ZeroDivisionError):
        measure(Case({}, lambda: 1 / 0, {"fast": lambda: None}))


def _busy() -> None:
    torch.randn(300, 300) @ torch.randn(300, 300)


def on(device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What the selection of rivals looks at."""
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_flash_attention_4_needs_cuda_its_package_and_half_precision(monkeypatch):
    monkeypatch.setattr(rivals, "versions", lambda: {"torch": "2"})
    assert rivals.why_no_fa4(on("cpu")) == "it needs a CUDA device"
    assert rivals.why_no_fa4(on("cuda")) == "flash-attn-4 is not installed"
    monkeypatch.setattr(rivals, "versions", lambda: {"flash-attn-4": "4"})
    assert rivals.why_no_fa4(on("cuda")) is None
    assert "bfloat16" in str(rivals.why_no_fa4(on("cuda", torch.float32)))


def test_all_rivals_are_always_listed(monkeypatch):
    x = inputs()
    for made in (rivals.dense_prefill(x), rivals.dense_step(x)):
        assert {name: work for name, work in made.items() if isinstance(work, str)} == {
            "fa4": rivals.why_no_fa4(x.q),
            "flex": rivals.why_no_flex(x.q),
        }


def test_flash_attention_4_is_called_causally_on_its_own_layout(monkeypatch):
    seen: dict[str, Any] = {}
    interface = types.SimpleNamespace(
        _flash_attn_fwd=lambda q, k, v, **options: seen.update(options, q=q.shape, k=k.shape)
    )
    package = types.ModuleType("flash_attn")
    package.cute = types.ModuleType("flash_attn.cute")  # type: ignore[attr-defined]
    package.cute.interface = interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", package.cute)
    monkeypatch.setattr(rivals, "why_no_fa4", lambda q: None)
    x = inputs()
    rivals.dense_prefill(x)["fa4"]()  # type: ignore[operator]
    assert seen == {
        "q": (1, LENGTH, 4, 32),
        "k": (1, LENGTH, 2, 32),
        "causal": True,
        "softmax_scale": x.scale,
    }


@pytest.fixture
def flex_anywhere(monkeypatch):
    """FlexAttention uncompiled, as it runs on a CPU too."""
    monkeypatch.setattr(rivals, "why_no_flex", lambda q: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_flex_attention_computes_the_same_pairs(flex_anywhere):
    x = inputs()
    blocks = torch.rand(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    blocks[..., 0] = True  # FlexAttention gives no 0 to queries that see nothing
    for pattern in (
        BlockPattern.from_block_mask(blocks, 64, LENGTH, LENGTH),
        WindowPattern(LENGTH, LENGTH, 4, 50),
    ):
        peer = rivals.sparse_peer(x, pattern)
        assert not isinstance(peer, str)
        expected = attend(x.q, x.k, x.v, pattern, scale=x.scale)
        torch.testing.assert_close(peer(), expected, atol=1e-5, rtol=1e-5)
    dense = rivals.dense_prefill(x)
    torch.testing.assert_close(dense["flex"](), dense["sdpa"](), atol=1e-5, rtol=1e-5)  # type: ignore[operator]


def test_a_pattern_that_flex_attention_lacks_is_said_to_be_one(flex_anywhere):
    mask = torch.ones(1, 1, 8, LENGTH, dtype=torch.bool)
    columns = ColumnPattern.from_column_mask(mask, 64, LENGTH, LENGTH)
    assert "ColumnPattern" in str(rivals.sparse_peer(inputs(), columns))
