"""MMInference: strides, partitions, the search on heads made for each type, plans as files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparseland.attention._mminference_grid import best_stride, find_strides
from sparseland.attention._mminference_heads import PATTERNS
from sparseland.attention._mminference_index import MixedIndex
from sparseland.attention._mminference_layout import layout_of
from sparseland.attention._mminference_search import search_layer
from sparseland.attention.minference import MInference
from sparseland.attention.mminference import (
    HeadPlan,
    MMInference,
    Shape,
    load_patterns,
    plan_pattern,
    save_patterns,
)
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, method_class, parse_spec
from sparseland.ops.attend import attend
from sparseland.patterns import PartsPattern, WindowPattern


def codes(count, dim, g):
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=g), dim=-1)


def video(before=37, frames=20, size=49, after=50, kind="lines", phase=5, noise=0.3, heads=2, dim=32, seed=0):
    """Text, a video, text; each head's vision queries look for one place of all frames, or for their own."""
    g = torch.Generator().manual_seed(seed)
    n, span = before + frames * size + after, slice(before, before + frames * size)
    q, k, v = (torch.randn(1, h, n, dim, generator=g) * noise for h in (heads, heads, heads))
    if kind == "lines":
        q[:, :, span, 0] += 6
        k[:, :, before + phase : span.stop : size, 0] += 6
    elif kind == "places":
        place = torch.arange(frames * size) % size
        code = 6 * codes(size, dim, g)
        q[:, :, span] += code[place]
        k[:, :, span] += code[place]
    vision = torch.zeros(n, dtype=torch.bool)
    vision[span] = True
    return AttentionInputs(q, k, v, 2 * dim**-0.5, 0, vision=vision)


def strides_of(x, segment=0):
    return find_strides(MixedIndex(x, layout_of(x.vision)), segment, range(x.q.shape[1]))


# --------------------------------------------------------------------- layout


def test_runs_and_videos():
    vision = torch.zeros(2000, dtype=torch.bool)
    vision[10:310] = True  # a video
    vision[400:450] = True  # too short for a grid
    for frame in range(6):  # frames with time stamps between them
        vision[600 + 105 * frame : 700 + 105 * frame] = True
    layout = layout_of(vision)
    assert layout.mixed
    assert layout.segments[0] == ((10, 310),)
    assert len(layout.segments) == 2
    assert len(layout.segments[1]) == 6
    assert layout.frames(0) is None
    assert layout.frames(1) == 100
    assert layout.of_kind("text", 305)[0] == (310, 400)
    assert sum(e - s for s, e in layout.of_kind("vision")) == int(vision.sum())
    text = layout_of(torch.zeros(5, dtype=torch.bool))
    assert (text.mixed, text.has_vision, text.segments) == (False, False, ())


# -------------------------------------------------------------------- strides


@pytest.mark.parametrize("size", [49, 64, 196])
@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_a_planted_stride_and_phase_are_found_under_noise(size, noise):
    stride, mass, score = strides_of(video(size=size, frames=12, noise=noise))
    assert stride.tolist() == [[size, size]]
    assert mass.argmax(-1).tolist() == [[5, 5]]
    assert score.min() > 0.9


@pytest.mark.parametrize("size", [49, 64, 196])
def test_a_stride_of_diagonals_is_found(size):
    stride, _, score = strides_of(video(size=size, frames=12, kind="places"))
    assert stride.tolist() == [[size, size]]
    assert score.min() > 0.9


def test_without_a_grid_there_is_no_score():
    stride, _, score = strides_of(video(kind="nothing", noise=1.0))
    assert score.max() < 0.1
    assert stride.min() >= 2


def test_neither_divisors_nor_multiples_win():
    columns, slash = torch.zeros(1, 1, 960), torch.zeros(1, 1, 960)
    columns[..., 7::48] = 1 / 20
    assert best_stride(columns, slash)[0].item() == 48
    columns.zero_()
    slash[..., 48::48] = 1 / 19
    assert best_stride(columns, slash)[0].item() == 48


def test_each_video_has_a_stride_of_its_own():
    # Two resolutions, and a separator at the end of every row (stride 57 = 56 + 1).
    a, b = video(size=49, frames=10, after=30), video(before=0, size=57, frames=12, seed=3)
    x = AttentionInputs(
        *(torch.cat([s, t], 2) for s, t in zip((a.q, a.k, a.v), (b.q, b.k, b.v), strict=True)),
        a.scale, 0, vision=torch.cat([a.vision, b.vision]),
    )  # fmt: skip
    assert [strides_of(x, s)[0].tolist() for s in (0, 1)] == [[[49, 49]], [[57, 57]]]
    # In a later chunk the first video is seen by the second's queries only: its columns tell.
    later = replace(x, q=x.q[:, :, a.k.shape[2] + 20 :])
    assert [strides_of(later, s)[0].tolist() for s in (0, 1)] == [[[49, 49]], [[57, 57]]]
    # No vision query at all.
    assert strides_of(replace(x, q=x.q[:, :, -20:]), 0) is None


def test_frames_between_time_stamps_are_one_video():
    frames, size, gap = 12, 40, 5
    x = video(before=0, frames=frames, size=size + gap, after=20, phase=9)
    vision = x.vision.clone()
    for frame in range(frames):
        vision[frame * (size + gap) + size : (frame + 1) * (size + gap)] = False
    x = replace(x, vision=vision)
    assert layout_of(vision).frames(0) == size
    stride, mass, _ = strides_of(x)
    assert stride.tolist() == [[size, size]]
    assert mass.argmax(-1).tolist() == [[9, 9]]


def test_a_known_frame_size_is_tried_with_its_neighbours():
    x = replace(video(size=64, frames=12), strides=(63,))
    assert strides_of(x)[0].tolist() == [[64, 64]]


# ------------------------------------------------------------------ partitions


def all_plans(n, lines):
    """Plans that leave nothing out."""
    columns, diagonals = Shape("vertical-slash", n, 0), Shape("vertical-slash", 0, n)
    near, places = Shape("a-shape", 0, n), Shape("grid", lines=lines)
    pairs = {"text-text": near, "text-vision": columns, "vision-text": diagonals, "vision-vision": places}
    return [
        HeadPlan.plain(Shape("vertical-slash", n, n)),
        HeadPlan.by_query(columns, diagonals),
        HeadPlan.by_query(near, places),
        HeadPlan.by_pair(pairs),
        HeadPlan.plain(places),
        HeadPlan.by_pair({**pairs, "vision-vision": columns}),
    ]


@pytest.mark.parametrize("offset", [0, 33, 100, 400, 1000])
@pytest.mark.parametrize("form", ["video", "two videos", "ragged", "vision first", "vision only"])
def test_a_full_budget_in_every_region_is_dense(offset, form):
    n = 1040
    x = video(heads=6)
    vision = torch.zeros(n, dtype=torch.bool)
    for start, end in {
        "video": [(37, 987)],
        "two videos": [(20, 400), (430, 1000)],
        "ragged": [(3, 4), (70, 71), (100, 400), (401, 700), (990, 1040)],
        "vision first": [(0, 700)],
        "vision only": [(0, n)],
    }[form]:
        vision[start:end] = True
    x = replace(x, q=x.q[:, :, offset:n], k=x.k[:, ::3, :n], v=torch.randn(1, 2, n, 32), vision=vision)
    pattern = plan_pattern(x, layout_of(vision), all_plans(n, n))
    causal = WindowPattern.dense(n - offset, n).mask()[0, 0]
    if n - offset < 200:
        assert (pattern.mask() == causal).all()
    assert pattern.density().min() == 1
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(n - offset, n), scale=x.scale)
    torch.testing.assert_close(attend(x.q, x.k, x.v, pattern, scale=x.scale), dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 90, 333])
def test_no_pair_is_in_two_parts_and_pairs_are_counted(offset):
    x = video(heads=6, frames=10)
    x = replace(x, q=x.q[:, :, offset:])
    small, shape = Shape("vertical-slash", 90, 150), Shape("a-shape", 40, 200)
    pairs = {
        "text-text": small,
        "text-vision": shape,
        "vision-text": small,
        "vision-vision": Shape("grid", lines=2),
    }
    plans = [
        HeadPlan.plain(small), HeadPlan.plain(Shape("grid", lines=1)), HeadPlan.by_query(shape, small),
        HeadPlan.by_query(small, Shape("grid", lines=3)), HeadPlan.by_pair(pairs), HeadPlan.plain(shape),
    ]  # fmt: skip
    pattern = plan_pattern(x, layout_of(x.vision), plans)
    assert isinstance(pattern, PartsPattern)
    total = torch.zeros(1, 6, x.q.shape[2], x.k.shape[2], dtype=torch.int)
    for part in pattern.parts:
        total[:, list(part.heads or range(6))] += part.pattern().mask().int()
    assert total.max() == 1
    assert torch.equal(total.bool(), pattern.mask())
    assert torch.equal(pattern.pairs(), total.sum((-1, -2)))
    assert pattern.density().max() < 0.999
    assert pattern.density().mean() < 0.85
    assert pattern.mask().diagonal(offset, -2, -1).all()  # every query sees itself


def test_a_grid_computes_lines_places_and_the_base():
    x = video(before=30, frames=12, size=50, after=40, phase=7)
    mask = plan_pattern(x, layout_of(x.vision), [HeadPlan.plain(Shape("grid", lines=1))] * 2).mask()[0, 0]
    n, span = x.k.shape[2], slice(30, 630)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    position = torch.arange(n)
    line = torch.ones(n, dtype=torch.bool)
    line[span] = (torch.arange(600) % 50) == 7  # text is on a line
    place = torch.where(line, -1, (position - 30) % 50)
    wanted = line[None, :] | line[:, None] | (place[:, None] == place[None, :])
    wanted |= (position[:, None] - position < 100) | (position < 30)
    assert (mask | ~(wanted & causal)).all()  # all that is listed in the paper, whatever else a block holds
    assert mask.float().sum() < 0.6 * causal.sum()


def test_queries_of_the_wrong_kind_do_not_decide():
    # The text's last 64 queries look for one key, the vision's for another: each group finds its own.
    x = video(before=200, frames=20, size=49, after=100, kind="nothing", heads=1, noise=0.05)
    text = ~x.vision
    x.q[0, 0, text, 0], x.k[0, 0, 300, 0] = 20, 20
    x.q[0, 0, x.vision, 1], x.k[0, 0, 150, 1] = 20, 20
    shape = Shape("vertical-slash", 31, 50)  # one column beyond the sinks
    split = plan_pattern(x, layout_of(x.vision), [HeadPlan.by_query(shape, shape)]).mask()[0, 0]
    assert split[1190:, 300].all()
    assert split[700:1100, 150].all()
    assert not split[700:1100, 300].any()
    # MInference probes the last queries of the prompt, which are text.
    plain = MInference(vertical=31, slash=50).pattern(x).mask()[0, 0]
    assert plain[700:1100, 300].all()
    assert not plain[700:1100, 150].any()


def test_the_selection_of_a_region_is_its_definition():
    x = video(before=120, frames=8, size=49, after=90, kind="places", heads=2)
    layout = layout_of(x.vision)
    v, s = 60, 130
    pairs = {
        r: Shape("vertical-slash", v, s) for r in ("text-text", "text-vision", "vision-text", "vision-vision")
    }
    mask = plan_pattern(x, layout, [HeadPlan.by_pair(pairs)] * 2).mask()
    n, position = x.k.shape[2], torch.arange(x.k.shape[2])
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    distance = position[:, None] - position
    for head in range(2):
        logits = (x.q[0, head] @ x.k[0, head].T * x.scale).masked_fill(~causal, -torch.inf)
        expected = causal & ((distance < 100) | (position < 30))
        exact = expected.clone()
        for a in (x.vision, ~x.vision):
            for b in (x.vision, ~x.vision):
                first = int(b.nonzero()[0])
                rows = a.nonzero().flatten()[-64:]
                rows = rows[rows >= first]
                p = logits[rows].masked_fill(~b, -torch.inf).softmax(-1)
                columns, slash = p.sum(0), torch.zeros(n)
                for i, row in enumerate(rows.tolist()):
                    slash[: row + 1] += p[i, : row + 1].flip(0)
                columns[:30], slash[:100] = -torch.inf, -torch.inf
                columns[~b] = -torch.inf
                chosen = columns.argsort(descending=True, stable=True)[: v - 30]
                far = slash.argsort(descending=True, stable=True)[: s - 100]
                region = a[:, None] & b & causal
                exact |= region & (torch.isin(position, chosen) | torch.isin(distance, far))
        assert (mask[0, head] | ~exact).all()
        # Whole blocks hold more than the diagonals, but only where one passes.
        extra = mask[0, head] & ~exact
        assert extra.sum() < 0.5 * causal.sum()


def test_one_modality_is_plain_minference(inputs):
    x = inputs(900, heads=4, sharpness=3.0)
    shape = Shape("vertical-slash", 200, 120)
    expected = MInference(vertical=200, slash=120).pattern(x).mask()
    assert torch.equal(MMInference(vertical=200, slash=120).pattern(x).mask(), expected)
    nothing, everything = torch.zeros(900, dtype=torch.bool), torch.ones(900, dtype=torch.bool)
    pairs = dict.fromkeys(("text-text", "text-vision", "vision-text", "vision-vision"), shape)
    plans = [
        HeadPlan.plain(shape),
        HeadPlan.by_query(shape, shape),
        HeadPlan.by_pair(pairs),
        HeadPlan.plain(shape),
    ]
    for vision in (nothing, everything):
        got = plan_pattern(x, layout_of(vision), plans)
        assert torch.equal(got.mask(), expected)


def images(n=4096, size=196, between=40, heads=2, dim=32):
    """Images, each too small for a video, with too much text between them for one."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, n, dim, generator=g) for _ in range(3))
    return AttentionInputs(q, k, v, dim**-0.5, 0, vision=torch.arange(n) % (size + between) < size)


def test_without_a_video_a_grid_is_vertical_slash_at_the_budget():
    method = MMInference.grid(4096)[0]
    shape = Shape("vertical-slash", method.vertical, method.slash)
    grids = [HeadPlan.plain(Shape("grid", lines=5)), HeadPlan.by_query(shape, Shape("grid", lines=5))]
    known = Calibration({"heads": [[plan.as_dict() for plan in grids]]})
    mixed = images()
    plans = [HeadPlan.plain(shape), HeadPlan.by_query(shape, shape)]
    for x, layout in ((replace(mixed, vision=None), None), (mixed, layout_of(mixed.vision))):
        got = plan_pattern(x, layout, grids, without_grid=shape)
        assert torch.equal(got.mask(), plan_pattern(x, layout, plans).mask())
        assert method.pattern(x, known).density().max() < 0.6


def test_a_grid_is_dense_where_most_is_not_video():
    x = images()
    plan = [HeadPlan.plain(Shape("grid", lines=1))] * 2
    at = torch.arange(4096)
    densities = [
        float(plan_pattern(x, layout_of((at >= start) & (at < 4000)), plan).density().mean())
        for start in (50, 3000)
    ]
    assert densities[0] < 0.45
    assert densities[1] > 0.9  # the card's limit


@pytest.mark.parametrize("length", [4096, 30_000])
def test_a_plan_at_its_own_length_and_budget_is_what_was_found(length):
    plan = HeadPlan.by_query(Shape("vertical-slash", 100, 200), Shape("grid", lines=20))
    found = plan.scaled(30_000 / length)
    assert found.scaled(length / 30_000) == plan
    assert found["vision"].lines == 20


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["grid", "vertical-slash"])
def test_broken_numbers_stay_where_they_are(broken, kind):
    x = video(frames=10)
    x.q[0, 1, 400] = broken
    vision = Shape("grid", lines=1) if kind == "grid" else Shape("vertical-slash", 60, 150)
    pattern = plan_pattern(x, layout_of(x.vision), [HeadPlan.by_query(Shape("a-shape", 10, 10), vision)] * 2)
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    assert out[0, 1, 400].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[0, 1, 401:].isfinite().all()
    # In the probe itself: still an answer, and the other head is unharmed.
    x.q[0, 1, 500] = broken
    pattern = plan_pattern(x, layout_of(x.vision), [HeadPlan.by_query(Shape("a-shape", 10, 10), vision)] * 2)
    assert attend(x.q, x.k, x.v, pattern, scale=x.scale)[0, 0].isfinite().all()


def test_many_heads_and_long_lists_are_cut(monkeypatch):
    x = video(frames=10)
    plans = [HeadPlan.by_query(Shape("vertical-slash", 60, 250), Shape("grid", lines=1))] * 2
    whole = plan_pattern(x, layout_of(x.vision), plans)
    monkeypatch.setattr("sparseland.attention._mminference_index._LIST_BYTES", 2000)
    cut = plan_pattern(x, layout_of(x.vision), plans)
    assert len(cut.parts) > len(whole.parts)
    assert torch.equal(cut.mask(), whole.mask())
    torch.testing.assert_close(
        attend(x.q, x.k, x.v, cut, scale=x.scale), attend(x.q, x.k, x.v, whole, scale=x.scale)
    )


def test_rows_of_a_batch_do_not_meet():
    x, y = video(frames=10), video(frames=10, seed=5, kind="places")
    both = AttentionInputs(
        *(torch.cat(t) for t in zip((x.q, x.k, x.v), (y.q, y.k, y.v), strict=True)),
        x.scale,
        0,
        vision=x.vision,
    )
    plans = [HeadPlan.by_query(Shape("vertical-slash", 60, 150), Shape("grid", lines=1))] * 2
    together = plan_pattern(both, layout_of(x.vision), plans).mask()
    for row, alone in enumerate((x, y)):
        assert torch.equal(together[row], plan_pattern(alone, layout_of(x.vision), plans).mask()[0])


# --------------------------------------------------------------------- search


def search_heads(before, seed=0, size=64, frames=12, after=160, dim=64):
    """Three heads over text, video, text, made for one boundary type each."""
    g = torch.Generator().manual_seed(seed)
    n, span = before + size * frames + after, slice(before, before + size * frames)
    vision = torch.zeros(n, dtype=torch.bool)
    vision[span] = True
    q, k = (0.3 * torch.randn(1, 3, n, dim, generator=g) for _ in range(2))
    v = torch.randn(1, 3, n, dim, generator=g)
    place = torch.arange(size * frames) % size
    for head in (0, 1):  # vision queries look for their own place in all frames
        code = 5 * codes(size, dim, g)
        q[0, head, span] += code[place]
        k[0, head, span] += code[place]
    angle = torch.arange(n) / 300  # head 0: text queries look for the text just before them
    turn = torch.zeros(n, dim)
    turn[:, 0], turn[:, 1] = 16 * angle.cos(), 16 * angle.sin()
    q[0, 0, ~vision] += turn[~vision]
    k[0, 0, ~vision] += turn[~vision]
    wanted, there = 5 * codes(2, dim, g), torch.randint(span.start, span.stop, (12,), generator=g)
    q[0, 1, ~vision] += wanted[0]  # head 1: text queries look for a few vision keys
    k[0, 1, there] += wanted[0]
    columns = torch.randint(0, n, (25,), generator=g)  # head 2: all queries look for the same keys
    q[0, 2] += wanted[1]
    k[0, 2, columns] += wanted[1]
    return AttentionInputs(q, k, v, 4 * dim**-0.5, 0, vision=vision)


def test_the_search_tells_boundary_types_apart():
    plans = search_layer(search_heads(before=24), 60, 240)
    assert plans[0].boundary == "q"
    assert plans[0]["vision"].shape == "grid"
    assert plans[0]["text"].shape != "grid"
    assert plans[2].boundary == "none"
    assert plans[2]["all"].shape == "vertical-slash"
    # Much text before the video: seeing it from the video as well would use up the cost of a grid.
    plans = search_layer(search_heads(before=300), 60, 240)
    assert plans[1].boundary == "2d"
    assert plans[1]["vision-vision"].shape == "grid"
    assert plans[1]["text-vision"].shape == "vertical-slash"


def test_text_is_searched_as_by_minference(inputs):
    x = inputs(300, sharpness=4.0)
    plans = search_layer(x)
    assert {plan.boundary for plan in plans} == {"none"}
    assert {plan["all"].shape for plan in plans} <= {"a-shape", "vertical-slash"}


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults():
    assert method_class("mminference") is MMInference
    method = parse_spec("mminference:vertical=512,slash=100")
    assert method == MMInference(vertical=512, slash=100)
    assert parse_spec(method.spec) == method
    assert (MMInference().vertical, MMInference().slash) == (1000, 6096)
    assert MMInference(vertical=5).calibration_key == MMInference(vertical=6).calibration_key


PLANS = [
    HeadPlan.plain(Shape("grid", lines=2)),
    HeadPlan.by_query(Shape("a-shape", 4, 60), Shape("vertical-slash", 90, 150)),
    HeadPlan.by_pair(
        {
            "text-text": Shape("a-shape", 4, 60),
            "text-vision": Shape("vertical-slash", 80, 0),
            "vision-text": Shape("a-shape", 4, 0),
            "vision-vision": Shape("grid", lines=1),
        }
    ),
    HeadPlan.plain(Shape("vertical-slash", 90, 120)),
]


def test_plans_round_trip_and_are_used(tmp_path):
    path = save_patterns(tmp_path / "heads.json", [PLANS])
    assert load_patterns(path) == (tuple(PLANS),)
    method = MMInference(patterns=str(path))
    assert parse_spec(method.spec) == method
    assert not method.learns_from_text
    x = video(heads=4)
    expected = plan_pattern(x, layout_of(x.vision), PLANS).mask()
    assert torch.equal(method.pattern(x).mask(), expected)
    with pytest.raises(SparselandError, match="layer 1 has 0 heads in the plans and 4 in the model"):
        method.pattern(replace(x, layer=1))
    # As a calibration, sizes are scaled by the budget; a frame's lines are not.
    known = Calibration({"heads": [[plan.as_dict() for plan in PLANS]]})
    half = MMInference(vertical=500, slash=3048).pattern(video(heads=4, frames=80), known)
    assert (
        half.density().mean()
        < MMInference().pattern(video(heads=4, frames=80), Calibration()).density().mean()
    )
    assert PATTERNS.table(known.meta["heads"], "here")[0][0].scaled(0.1)["all"] == Shape("grid", lines=2)


GOOD = '{"shape": "grid", "lines": 1}'


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("{}", "a head needs a boundary, one of none, q, 2d"),
        ('{"boundary": "none"}', "has the regions all; got none"),
        ('{"boundary": "q", "text": ' + GOOD + ', "vision": ' + GOOD + "}", "text has no video frames"),
        ('{"boundary": "none", "all": {"shape": "star"}}', "a shape must be one of"),
        ('{"boundary": "none", "all": {"shape": "grid", "lines": -1}}', "lines=-1 is not allowed"),
        ('{"boundary": "none", "all": {"shape": "grid", "lines": 1, "slash": 3}}', "a grid has no slash"),
        ('{"boundary": "none", "all": {"shape": "a-shape", "vertical": 1.5}}', "vertical=1.5"),
    ],
)
def test_bad_plans_are_one_clear_line(tmp_path, head, words):
    path = tmp_path / "heads.json"
    path.write_text('{"format": "mminference-patterns", "version": 1, "heads": [[' + head + "]]}")
    with pytest.raises(SparselandError, match=words) as caught:
        MMInference(patterns=str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not a patterns file"),
        ('{"format": "minference-patterns"}', 'does not say "format": "mminference-patterns"'),
        ('{"format": "mminference-patterns", "version": 9}', "has version 9; this sparseland reads 1"),
        ('{"format": "mminference-patterns", "version": 1, "heads": []}', "must be a non-empty list"),
        ("[" * 100_000, "is not a patterns file"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, content, words):
    path = tmp_path / "heads.json"
    path.write_text(content)
    with pytest.raises(SparselandError, match=words):
        MMInference(patterns=str(path))


def test_marks_of_another_length_are_refused():
    x = video()
    with pytest.raises(SparselandError, match="5 tokens are marked, but there are 1067"):
        MMInference(vertical=30, slash=100).pattern(replace(x, vision=torch.ones(5, dtype=torch.bool)))
