"""MInference: the online index against a literal transcription, planted structure, known failures, files."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sparseland as sl
from sparseland import patterns
from sparseland.attention import _shape_search
from sparseland.attention._shape_index import LayerIndex, Sizes
from sparseland.attention._shape_search import Candidate, choose, search_layer, target_for
from sparseland.attention.minference import HeadShape, MInference, load_patterns, save_patterns
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, method_class, parse_spec
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import BlockColumnPattern, PiecedPattern, WindowPattern

# Whole prompt, odd length, chunks that do and do not start at a block's edge, one query.
SHAPES = [(384, 384), (301, 301), (128, 320), (77, 333), (1, 270)]
MIXED = (
    HeadShape("vertical-slash", 40, 110),
    HeadShape("a-shape", 7, 150),
    HeadShape("block-sparse", blocks=2),
    HeadShape("vertical-slash", 90, 60),
)


def causal(n_queries: int, n_keys: int) -> torch.Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


# ------------------------------------------ the paper's equations, with loops


def probe(x: AttentionInputs, head: int) -> torch.Tensor:
    """Attention of the last 64 queries, float64."""
    n = min(64, x.q.shape[2])
    q, k = x.q[0, head, -n:].double(), x.k[0, head // x.group].double()
    logits = q @ k.T * x.scale
    return logits.masked_fill(~causal(n, k.shape[0]), -torch.inf).softmax(-1)


def vertical_slash_sets(
    x: AttentionInputs, head: int, vertical: int, slash: int
) -> tuple[set[int], set[int]]:
    p = probe(x, head)
    n_probe, n = p.shape
    c = [math.inf if j < 30 else p[:, j].sum().item() for j in range(n)]
    g = [0.0] * n
    for i in range(n_probe):
        for j in range(n - n_probe + i + 1):
            g[n - n_probe + i - j] += p[i, j].item()
    g[:100] = [math.inf] * min(100, n)
    vertical, slash = min(n, max(vertical, 30)), min(n, max(slash, 50))
    columns = sorted(range(n), key=lambda j: (-c[j], j))[:vertical]
    offsets = sorted(range(n), key=lambda o: (-g[o], o))[:slash]
    return set(columns), set(offsets)


def a_shape_sets(n: int, sinks: int, window: int) -> tuple[set[int], set[int]]:
    return set(range(min(sinks, n))), set(range(min(window, n)))


def token_mask(columns: set[int], offsets: set[int], n_queries: int, n_keys: int) -> torch.Tensor:
    """Step 5 of the algorithm: j is a column or i - j is a slash."""
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for row in range(n_queries):
        i = n_keys - n_queries + row
        for j in range(i + 1):
            mask[row, j] = j in columns or i - j in offsets
    return mask


def kernel_mask(columns: set[int], offsets: set[int], n_queries: int, n_keys: int) -> torch.Tensor:
    """The columns, and for each query block the aligned key blocks that a slash touches."""
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    mask[:, sorted(columns)] = True
    for start in range(0, n_queries, 64):
        first = n_keys - n_queries + start
        touched = {(i - o) // 64 for o in offsets for i in range(first, first + 64) if i >= o}
        for c in touched:
            mask[start : start + 64, 64 * c : 64 * c + 64] = True
    return mask & causal(n_queries, n_keys)


def block_sparse_mask(x: AttentionInputs, head: int, blocks: int) -> torch.Tensor:
    n_queries, n_keys = x.q.shape[2], x.k.shape[2]
    q, k = x.q[0, head].double(), x.k[0, head // x.group].double()
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    for start in range(0, n_queries, 64):
        stop = min(start + 64, n_queries)
        first, last = n_keys - n_queries + start, n_keys - n_queries + stop - 1
        score = {c: q[start:stop].mean(0) @ k[64 * c : 64 * c + 64].mean(0) for c in range(last // 64 + 1)}
        best = sorted(score, key=lambda c: -score[c].item())[:blocks]
        for c in {*best, *range(first // 64, last // 64 + 1)}:
            mask[start:stop, 64 * c : 64 * c + 64] = True
    return mask & causal(n_queries, n_keys)


def as_calibration(*heads: HeadShape, budget: int = 150) -> Calibration:
    """One layer whose heads have these sizes when the method's ``vertical + slash`` is ``budget``."""
    factor = (1000 + 6096) / budget
    return Calibration({"length": 30_000, "heads": [[head.scaled(factor).as_dict() for head in heads]]})


def small(**values: int) -> MInference:
    """A budget below the test prompts' length, so that nothing is dense."""
    return MInference(**{"vertical": 40, "slash": 110, **values})


# --------------------------------------------------------------- online index


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_vertical_slash_is_the_literal_algorithm(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, sharpness=2.0)
    pattern = small().pattern(x)
    assert isinstance(pattern, BlockColumnPattern)
    got = pattern.mask()
    for head in range(4):
        columns, offsets = vertical_slash_sets(x, head, 40, 110)
        assert torch.equal(got[0, head], kernel_mask(columns, offsets, n_queries, n_keys))
        assert not (token_mask(columns, offsets, n_queries, n_keys) & ~got[0, head]).any()


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_shapes_can_differ_between_heads(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, sharpness=2.0)
    got = small().pattern(x, as_calibration(*MIXED)).mask()[0]
    expected = [
        kernel_mask(*vertical_slash_sets(x, 0, 40, 110), n_queries, n_keys),
        kernel_mask(*a_shape_sets(n_keys, 7, 150), n_queries, n_keys),
        block_sparse_mask(x, 2, 2),
        kernel_mask(*vertical_slash_sets(x, 3, 90, 60), n_queries, n_keys),
    ]
    for head in range(4):
        assert torch.equal(got[head], expected[head]), f"head {head}"


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_lists_are_clean_and_counts_are_right(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, batch=2, sharpness=2.0)
    index, sizes = LayerIndex(x), Sizes.of(MIXED, n_keys, x.q.device)
    pattern = index.pattern(sizes)
    for lists in (pattern.blocks, pattern.columns):
        for row, count in zip(
            lists.indices.flatten(0, 2).tolist(), lists.counts.flatten().tolist(), strict=True
        ):
            assert row[:count] == sorted(set(row[:count]))
    assert not (pattern.blocks.mask() & pattern.columns.mask()).any()
    assert torch.equal(pattern.pairs(), pattern.mask().sum((-1, -2)))
    assert torch.equal(index.pairs(sizes), pattern.pairs())


def test_heads_of_one_layer_without_columns_or_without_slashes(inputs):
    x = inputs(300)
    blocks = small().pattern(x, as_calibration(*[HeadShape("block-sparse", blocks=2)] * 4))
    assert torch.equal(blocks.mask()[0, 1], block_sparse_mask(x, 1, 2))
    window = small().pattern(x, as_calibration(*[HeadShape("a-shape", 0, 0)] * 4))
    assert window.mask().diagonal(dim1=-2, dim2=-1).all()


@pytest.mark.parametrize("slash", [1, 60, 99])
def test_few_diagonals_are_the_nearest_ones(inputs, slash):
    # 100 diagonals are forced; a smaller budget must not drop offset 0 among equals.
    x = inputs(512)
    _, offsets = vertical_slash_sets(x, 0, 40, slash)
    assert offsets == set(range(max(50, slash)))
    mask = small(slash=slash).pattern(x).mask()
    assert torch.equal(mask[0, 0], kernel_mask(*vertical_slash_sets(x, 0, 40, slash), 512, 512))


@pytest.mark.parametrize("budget", [{"vertical": 300}, {"slash": 300}])
@pytest.mark.parametrize("calibrated", [False, True])
def test_full_budget_is_dense(inputs, budget, calibrated):
    x = inputs(300)
    calibration = as_calibration(*MIXED) if calibrated else None
    mask = small(**budget).pattern(x, calibration).mask()
    assert torch.equal(mask, causal(300, 300).expand_as(mask))


FULL = [
    HeadShape("vertical-slash", 300, 1),
    HeadShape("vertical-slash", 1, 300),
    HeadShape("a-shape", 0, 300),
    HeadShape("block-sparse", blocks=5),
]


@pytest.mark.parametrize("head", FULL)
def test_each_shape_at_full_size_is_dense(inputs, tmp_path, head):
    path = save_patterns(tmp_path / "p.json", [[head] * 4])
    mask = MInference(patterns=str(path)).pattern(inputs(300)).mask()
    assert torch.equal(mask, causal(300, 300).expand_as(mask))


def test_a_batch_selects_row_by_row(inputs):
    x = inputs(300, batch=2, sharpness=2.0)
    both = small().pattern(x).mask()
    for row in range(2):
        alone = AttentionInputs(x.q[[row]], x.k[[row]], x.v[[row]], x.scale, 0)
        assert torch.equal(both[row], small().pattern(alone).mask()[0])


# ---------------------------------------------------------- planted structure


def positions(n: int, dim: int, shift: int = 0) -> torch.Tensor:
    """Vectors whose products peak sharply where positions agree (all frequencies of a rotary code)."""
    frequency = 2.0 ** -torch.arange(0, dim // 2, dtype=torch.float64) * math.pi
    angle = (torch.arange(n, dtype=torch.float64) - shift)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def head_inputs(q: torch.Tensor, k: torch.Tensor) -> AttentionInputs:
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(5))
    return AttentionInputs(q[None, None], k[None, None], v[None, None], 1.0, 0)


def test_a_planted_diagonal_is_found():
    n, o = 640, 293
    x = head_inputs(positions(n, 32, shift=o) * 4, positions(n, 32))
    rows = torch.arange(o, n)
    found = MInference(vertical=30, slash=105).pattern(x).mask()[0, 0, rows, rows - o]
    assert found.all()
    assert not MInference(vertical=30, slash=100).pattern(x).mask()[0, 0, rows, rows - o].all()


def test_a_planted_column_is_found():
    n, j = 640, 401
    x = head_inputs(torch.ones(n, 8), torch.zeros(n, 8))
    x.k[0, 0, j] = 3
    mask = MInference(vertical=31, slash=50).pattern(x).mask()[0, 0]
    assert mask[j:, j].all()
    assert not MInference(vertical=30, slash=50).pattern(x).mask()[0, 0, j + 200 :, j].any()


def needle(first_query: int) -> AttentionInputs:
    """16 queries from ``first_query`` on look for key 200; all else is noise."""
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(1024, 16, generator=g), torch.randn(1024, 16, generator=g)
    q[:, 0] = 0
    k[:, 0] = 0
    q[first_query : first_query + 16, 0] = 20
    k[200, 0] = 20
    return head_inputs(q, k)


def test_a_needle_that_the_last_queries_look_for_is_found():
    assert MInference(vertical=32, slash=50).pattern(needle(1008)).mask()[0, 0, 1008:, 200].all()


def test_a_needle_that_only_middle_queries_look_for_is_missed():
    assert not MInference(vertical=32, slash=50).pattern(needle(600)).mask()[0, 0, 600:616, 200].any()


# ---------------------------------------------------------------------- faults


def outputs(method, x):
    """The method's attention and dense attention, by the op's definition."""
    dense = WindowPattern.dense(x.q.shape[2], x.k.shape[2])
    made = (method.pattern(x), dense)
    return [attend(x.q, x.k, x.v, pattern, scale=x.scale, backend="reference") for pattern in made]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_is_no_number_makes_its_heads_dense(inputs, bad):
    x = inputs(384, sharpness=2.0)
    x.k[0, 1, 70, 3] = bad
    pattern = small(slash=50).pattern(x)
    got, dense = outputs(small(slash=50), x)
    assert torch.equal(got.isnan(), dense.isnan())
    assert (pattern.density()[0, 2:] == 1).all()
    assert torch.equal(
        pattern.mask()[0, :2], small(slash=50).pattern(inputs(384, sharpness=2.0)).mask()[0, :2]
    )


def test_a_query_that_is_no_number_spoils_its_own_row_only(inputs):
    x = inputs(384, sharpness=2.0)
    x.q[0, 1, 100] = math.nan
    got, dense = outputs(small(), x)
    assert torch.equal(got.isnan(), dense.isnan())
    assert got.isnan().any(-1).sum() == 1


def test_inputs_may_be_views(inputs):
    x = inputs(333, n_queries=77, sharpness=2.0)
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v))
    view = AttentionInputs(*turned, x.scale, 0)
    assert not view.q.is_contiguous()
    for calibration in (None, as_calibration(*MIXED)):
        assert torch.equal(small().pattern(view, calibration).mask(), small().pattern(x, calibration).mask())


@pytest.mark.parametrize(("n_queries", "n_keys"), [(301, 301), (77, 333)])
def test_lists_made_in_pieces_are_the_same(inputs, monkeypatch, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, batch=2, sharpness=2.0)
    whole = small().pattern(x, as_calibration(*MIXED))
    monkeypatch.setattr(patterns.parts, "_LIST_BYTES", 1)
    pieces = small().pattern(x, as_calibration(*MIXED))
    assert isinstance(pieces, PiecedPattern)
    assert torch.equal(pieces.mask(), whole.mask())
    assert torch.equal(pieces.pairs(), whole.pairs())


@pytest.mark.parametrize(("n_queries", "n_keys"), [(192, 192), (77, 200)])
def test_kernels_select_the_same(inputs, monkeypatch, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, batch=2, sharpness=2.0)
    calibration = as_calibration(*MIXED)
    expected = small().pattern(x, calibration)
    mask, pairs = expected.mask(), expected.pairs()
    monkeypatch.setenv("SPARSELAND_BACKEND", "triton")
    if torch.cuda.is_available():  # compiled there, interpreted elsewhere
        x = replace(x, q=x.q.cuda(), k=x.k.cuda(), v=x.v.cuda())
    got = small().pattern(x, calibration)
    # Lengths that need no look at the data: all key blocks, and all columns of the head with most.
    assert got.blocks.indices.shape[-1] == -(-n_keys // 64)
    assert got.columns.indices.shape[-1] == 90
    assert torch.equal(got.mask().cpu(), mask)
    assert torch.equal(got.pairs().cpu(), pairs)


# --------------------------------------------------------------- offline search


def structured_heads() -> AttentionInputs:
    """Four heads of 1024 tokens: local, columns, diagonals, blocks."""
    n, dim, g = 1024, 64, torch.Generator().manual_seed(0)
    q, k = torch.zeros(4, n, dim), torch.zeros(4, n, dim)
    position = torch.arange(n, dtype=torch.float64)

    # Sinks, and smoothly the last 250 tokens. The probe's own queries want keys strewn over the prompt,
    # whose values are those of the sinks: following the probe costs pairs and gains nothing.
    wave = 2 * math.pi / (20 * n) * torch.arange(1, 31, dtype=torch.float64)
    angle = position[:, None] * wave
    k[0, :, :60] = torch.cat([angle.cos(), angle.sin()], -1).float()
    q[0, :-64, :60] = 0.3 * k[0, :-64, :60]
    strewn = 30 + torch.randperm(n - 100, generator=g)[:150]
    k[0, :30, 60] = 1
    k[0, strewn, 61] = 1
    q[0, :-64, 60] = 3
    q[0, -64:, 60] = 20
    q[0, -64:, 61] = 30

    # Columns: 120 keys that all queries want.
    keys = torch.randperm(n, generator=g)[:120]
    q[1, :, 0] = 3
    k[1, keys, 0] = 3

    # Diagonals: two distances; keys have random codes, which block means can't tell apart.
    code = F.normalize(torch.randn(n, dim, generator=g), dim=-1)
    q[2] = 20 * (code.roll(333, 0) + code.roll(600, 0))
    k[2] = code

    # Blocks: each query block wants two key blocks of its own.
    codes = torch.linalg.qr(torch.randn(dim, dim, generator=g)).Q
    for r in range(n // 64):
        q[3, 64 * r : 64 * r + 64] = 6 * codes[r]
        for c in torch.randperm(r + 1, generator=g)[:2].tolist():
            k[3, 64 * c : 64 * c + 64] += 2 * codes[r]
    v = torch.randn(4, n, dim, generator=g)
    v[0, :30] = v[0, strewn] = v[0, 0].clone()
    return AttentionInputs(q[None], k[None], v[None], 1.0, 0)


@pytest.fixture(scope="module")
def candidates() -> list[Candidate]:
    return search_layer(structured_heads(), 64, 300)


def test_the_search_tells_the_shapes_apart(candidates):
    found = choose([candidates])
    assert [head.shape for head in found] == ["a-shape", "vertical-slash", "vertical-slash", "block-sparse"]
    assert found[1].vertical > found[1].slash
    assert found[2].slash > found[2].vertical


def test_candidates_cost_no_more_than_the_a_shape(candidates):
    x = structured_heads()
    index = LayerIndex(x)
    target = Sizes.of([HeadShape("a-shape", 64, 300)] * 4, 1024, x.q.device)
    cost = index.pairs(target)[0]
    for candidate in candidates:
        vertical, slash, blocks = candidate.sizes.long()
        names = [candidate.shape] * 4
        heads = [
            HeadShape(*h) for h in zip(names, vertical.tolist(), slash.tolist(), blocks.tolist(), strict=True)
        ]
        pairs = index.pairs(Sizes.of(heads, 1024, x.q.device))[0]
        at_floor = (vertical == 30) & (slash == 50) if candidate.shape == "vertical-slash" else blocks == 1
        assert ((pairs <= cost) | at_floor).all()
        # One more block diagonal or column would not fit: the budget is used.
        assert (pairs.double() / cost > 0.7).all(), (candidate.shape, pairs / cost)


def test_candidates_can_cost_the_same_time(monkeypatch):
    # A machine on which a column's pair takes as long as four of a block.
    def seconds(x, pattern):
        if isinstance(pattern, BlockColumnPattern):
            return (pattern.blocks.pairs() + 4 * pattern.columns.pairs()).sum().item()
        return pattern.pairs().sum().item()

    monkeypatch.setattr(_shape_search, "_seconds", seconds)
    x = structured_heads()
    index = LayerIndex(x, ranked=True)
    found = search_layer(x, 64, 300, "time")
    by_pairs = search_layer(x, 64, 300)

    def cost(candidate):
        names, sizes = [candidate.shape] * 4, candidate.sizes.long().T.tolist()
        heads = [HeadShape(name, *three) for name, three in zip(names, sizes, strict=True)]
        return seconds(x, index.pattern(Sizes.of(heads, 1024, x.q.device)))

    target = cost(found[0])
    assert torch.equal(found[0].sizes, by_pairs[0].sizes)
    for candidate, other in zip(found[1:], by_pairs[1:], strict=True):
        assert cost(candidate) == pytest.approx(target, rel=0.15), candidate.shape
        assert abs(cost(candidate) - target) <= abs(cost(other) - target) * 1.01


def test_time_is_measured_on_this_device(inputs):
    x = inputs(512)
    few, many = (WindowPattern(512, 512, 0, window) for window in (32, 512))
    assert 0 < _shape_search._seconds(x, few) < 1
    assert 0 < _shape_search._seconds(x, many) < 1
    found = search_layer(x, 16, 100, "time")
    assert [c.shape for c in found] == ["a-shape", *["vertical-slash"] * 5, "block-sparse"]
    assert MInference(cost="time").calibration_key != MInference().calibration_key
    with pytest.raises(SparselandError, match="cost=joules"):
        MInference(cost="joules")


def test_errors_are_summed_and_sizes_averaged_over_texts():
    def text(error: list[float], sizes: list[int]) -> list[Candidate]:
        none = torch.zeros(1).double()
        columns = torch.tensor([[float(s)] for s in sizes], dtype=torch.float64)
        return [
            Candidate("a-shape", torch.stack([columns[0], columns[0], none]), torch.tensor([error[0]])),
            Candidate("block-sparse", torch.stack([none, none, columns[1]]), torch.tensor([error[1]])),
        ]

    assert choose([text([1, 2], [10, 3]), text([4, 2], [20, 7])]) == [HeadShape("block-sparse", blocks=5)]
    assert choose([text([1, 3], [10, 3]), text([1, 2], [20, 7])]) == [HeadShape("a-shape", 15, 15)]


def test_a_short_text_is_searched_with_a_smaller_budget():
    assert target_for(30_000) == target_for(100_000) == (1024, 4096)
    assert target_for(3_000) == (102, 410)


def test_calibration_round_trips_through_json_and_a_patterns_file(inputs, tmp_path):
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = torch.randint(3, 128, (2, 160), generator=torch.Generator().manual_seed(0))
    method = MInference()
    calibration = method.calibrate(model, ids)
    meta = json.loads(json.dumps(calibration.meta))
    assert meta == calibration.meta
    config = model.config
    assert [len(row) for row in meta["heads"]] == [config.num_attention_heads] * config.num_hidden_layers
    path = save_patterns(tmp_path / "heads.json", meta["heads"])
    assert [[h.as_dict() for h in row] for row in load_patterns(path)] == meta["heads"]

    from_file = parse_spec(f"minference:patterns={path}")
    assert from_file.calibrate(model, ids) == Calibration()
    assert method.calibration_key == MInference(vertical=50).calibration_key != from_file.calibration_key
    x = inputs(8192, heads=config.num_attention_heads, kv_heads=1, layer=1, dim=8)
    assert torch.equal(method.pattern(x, calibration).pairs(), from_file.pattern(x).pairs())


def test_one_calibration_serves_every_budget(inputs):
    x = inputs(2048, heads=2, kv_heads=1)
    calibration = as_calibration(
        HeadShape("a-shape", 10, 200), HeadShape("block-sparse", blocks=4), budget=200
    )
    density = [
        MInference(vertical=50 * f, slash=150 * f).pattern(x, calibration).density()[0] for f in (1, 2, 4)
    ]
    assert (density[0] < density[1]).all()
    assert (density[1] < density[2]).all()
    exact = MInference(vertical=100, slash=300).pattern(x, calibration).mask()[0, 0]
    assert torch.equal(exact, kernel_mask(*a_shape_sets(2048, 20, 400), 2048, 2048))


# ------------------------------------------------------------ parameters, files


def test_card_spec_and_defaults():
    assert method_class("minference") is MInference
    assert MInference().spec == "minference"
    assert (MInference().vertical, MInference().slash) == (1000, 6096)
    for setting in MInference.grid(4096):
        assert parse_spec(setting.spec) == setting
        assert max(setting.vertical, setting.slash) < 4096
    x_short = AttentionInputs(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), 1.0, 0)
    assert MInference().pattern(x_short) == WindowPattern.dense(8, 8)


@pytest.mark.parametrize("spec", ["minference:vertical=0", "minference:slash=1.5", "minference:top_k=3"])
def test_wrong_parameters_are_refused(spec):
    with pytest.raises(SparselandError, match="minference"):
        parse_spec(spec)


def patterns_json(head: str, version: int = 1) -> str:
    return f'{{"format": "minference-patterns", "version": {version}, "heads": {head}}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a patterns file"),
        ("[]", "a JSON object was expected"),
        ("{}", 'does not say "format"'),
        (patterns_json("[]", version=2), "version 2"),
        (patterns_json("[]"), "non-empty list over layers"),
        (patterns_json('[[{"shape": "x"}]]'), "one of a-shape"),
        (patterns_json('[[{"shape": "a-shape", "vertical": -1}]]'), "layer 0, head 0: vertical=-1"),
        (
            patterns_json('[[{"shape": "block-sparse", "blocks": 1, "slash": 2}]]'),
            "block-sparse has no slash",
        ),
    ],
)
def test_a_malformed_patterns_file_is_one_clear_line(tmp_path, content, words):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(SparselandError, match=words) as caught:
        MInference(patterns=str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_foreign_model_are_refused(inputs, tmp_path):
    with pytest.raises(SparselandError, match="can't read the patterns"):
        parse_spec(f"minference:patterns={tmp_path / 'none.json'}")
    path = save_patterns(tmp_path / "p.json", [[MIXED[0]] * 3])
    with pytest.raises(SparselandError, match="layer 0 has 3 heads in the patterns and 4 in the model"):
        MInference(patterns=str(path)).pattern(inputs(64))
    with pytest.raises(SparselandError, match="layer 5 has 0 heads"):
        MInference(patterns=str(path)).pattern(inputs(64, layer=5))
    with pytest.raises(SparselandError, match="has no layer 5"):
        small().pattern(inputs(400, layer=5), as_calibration(*MIXED))
    with pytest.raises(SparselandError, match="can't write the patterns"):
        save_patterns(tmp_path / "no" / "folder.json", [[MIXED[0]]])


@pytest.mark.parametrize("slug", ["minference", "mminference"])
def test_apply_refuses_a_foreign_calibration_before_anything_is_changed(slug):
    heads = [[{"shape": "a-shape", "vertical": 4, "slash": 10}] * 3] * 2
    if slug == "mminference":
        heads = [[{"boundary": "none", "all": head} for head in row] for row in heads]
    model = tiny_model("llama")
    known = {slug: Calibration({"heads": heads})}
    with pytest.raises(SparselandError, match="layer 0 has 3 heads in the p"):
        sl.apply(model, f"{slug}:vertical=10,slash=20", calibrations=known)
    sl.apply(model, "flexprefill").remove()  # it can still be changed


def test_an_edited_file_is_read_again(inputs, tmp_path):
    path = save_patterns(tmp_path / "p.json", [[HeadShape("a-shape", 4, 10)] * 4])
    method = MInference(patterns=str(path))
    before = method.pattern(inputs(400)).density()
    save_patterns(path, [[HeadShape("a-shape", 4, 3000)] * 4])
    assert (method.pattern(inputs(400)).density() > before).all()
