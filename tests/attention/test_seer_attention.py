"""SeerAttention: selections against loops over the equations, training that learns, decoding in step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import sparseland as sl
from sparseland.attention import _seer_training
from sparseland.attention._seer_gate import Gates
from sparseland.attention._seer_training import Lesson, divergence, make_lessons
from sparseland.attention.seer_attention import SeerAttention, blocks_per_row, train_gates
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, LayerShape, parse_spec
from sparseland.models.capture import capture_qkv
from sparseland.models.rope import find_ropes
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.ops.block_max_probability import block_max_probability

B, D = 16, 16
IDS = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def rope(model):
    return find_ropes(model)[0]


def gates_for(x, method, seed=0):
    """Random gates: the way they start would hide a wrong order of channels."""
    shape = LayerShape(x.layer, 3, x.q.shape[1], x.k.shape[1], x.q.shape[3])
    gates = method.new_learner(shape)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in gates.parameters():
            p += torch.randn(p.shape, generator=g) * 0.3
    return gates


def case(rope, n_queries=120, n_keys=120, batch=1, seed=0, kv_heads=2):
    """q and k before RoPE, and the inputs that a method sees."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, n_queries, 4, D, generator=g).transpose(1, 2) * 1.5
    k = torch.randn(batch, n_keys, kv_heads, D, generator=g).transpose(1, 2)
    v = torch.randn(batch, n_keys, kv_heads, D, generator=g).transpose(1, 2)
    positions = torch.arange(n_keys)
    q_after, k_after = rope.rotate(q, positions[n_keys - n_queries :]), rope.rotate(k, positions)
    return q, k, AttentionInputs(q_after, k_after, v, D**-0.5, 1, 3, rope=rope)


def turned(vector, position, speed):
    """RoPE of one vector, channel by channel; channels past the head's size do not turn."""
    out = vector.clone()
    for r, w in enumerate(speed):
        c, s = math.cos(position * w), math.sin(position * w)
        a, b = vector[r], vector[r + len(speed)]
        out[r], out[r + len(speed)] = a * c - b * s, b * c + a * s
    return out


def literal_scores(q, k, gates, offset, speed):
    """g[b, h, i, j] from the paper's equations, one pair of blocks at a time."""
    gate, (batch, heads, n_queries, _) = gates.prefill, q.shape
    n_keys, group = k.shape[2], heads // k.shape[1]
    rows, columns = -(-n_queries // B), -(-n_keys // B)
    scores = torch.zeros(batch, heads, rows, columns)
    for b in range(batch):
        for h in range(heads):
            keys = []
            for j in range(columns):
                block = k[b, h // group, j * B : (j + 1) * B]
                pooled = torch.cat((block.max(0).values, block.min(0).values, block.mean(0)))
                w = gate.key[h if gate.query is None else h // group]
                keys.append(turned(pooled @ w, j * B, speed))
            for i in range(rows):
                query = q[b, h, i * B : (i + 1) * B].mean(0)
                query = query if gate.query is None else query @ gate.query[h]
                query = turned(query, offset + i * B, speed)
                scores[b, h, i] = torch.stack([query @ key for key in keys]) / len(query) ** 0.5
    return scores


def literal_mask(scores, method, n_queries, n_keys):
    """Blocks kept per row: threshold or the best few, the row's own, and the last rows whole."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rows, columns = scores.shape[2:]
    for b, h, i in torch.cartesian_prod(*(torch.arange(s) for s in scores.shape[:3])).tolist():
        start = n_keys - n_queries + i * B
        last = min(start + B, n_keys) - 1
        seen = last // B + 1
        own = list(range(start // B, seen))
        if method.nz_ratio is None:
            p = scores[b, h, i, :seen].softmax(-1)
            keep = [j for j in range(seen) if p[j] > method.threshold]
        else:
            top = max(1, int((1 - math.sqrt(1 - method.nz_ratio)) * columns))
            others = sorted(range(own[0]), key=lambda j: -float(scores[b, h, i, j]))
            keep = others[: max(0, top - len(own))]
        if i >= rows - method.last_dense:
            keep = range(seen)
        mask[b, h, i, [*keep, *own]] = True
    return mask


SETTINGS = [
    SeerAttention(threshold=0.15, block_size=B),
    SeerAttention(nz_ratio=0.5, block_size=B),
    SeerAttention(nz_ratio=0.6, block_size=B, last_dense=0, gate_dim=24),
]


@pytest.mark.parametrize(("n_queries", "n_keys", "batch"), [(120, 120, 1), (40, 130, 2), (64, 128, 1)])
@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: m.spec)
@torch.no_grad()
def test_selection_is_the_equations(method, n_queries, n_keys, batch, rope):
    q, k, x = case(rope, n_queries, n_keys, batch)
    gates = gates_for(x, method)
    speed = rope.module.inv_freq.tolist()
    scores = literal_scores(q, k, gates, n_keys - n_queries, speed)
    pattern = method.pattern(replace(x, learner=gates))
    want = literal_mask(scores, method, n_queries, n_keys)
    assert torch.equal(pattern.block_mask(), want)
    assert 0.3 < want.float().mean() * 2 < 1.9
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    assert out.isfinite().all()


def test_gates_read_what_was_before_rope(rope):
    """Roped inputs taken as they are give another selection: the phase matters."""
    _, _, x = case(rope)
    method = SETTINGS[1]
    gates = gates_for(x, method)
    told = method.pattern(replace(x, learner=gates)).block_mask()
    untold = method.pattern(replace(x, learner=gates, rope=None)).block_mask()
    assert (told != untold).float().mean() > 0.02


def test_every_query_sees_itself_though_the_threshold_would_drop_it(rope):
    _, _, x = case(rope, 250, 250)
    method = SeerAttention(threshold=0.99, block_size=B, last_dense=0)
    mask = method.pattern(replace(x, learner=gates_for(x, method))).mask()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    assert mask.float().mean() < 0.2


def test_the_number_of_blocks_fills_the_triangle():
    for ratio in (0.1, 0.5, 0.9, 1.0):
        k, n = blocks_per_row(ratio, 2000), 2000
        assert sum(min(i, k) for i in range(1, n + 1)) / (n * (n + 1) / 2) == pytest.approx(ratio, abs=2e-3)
    assert blocks_per_row(0.001, 10) == 1


def test_a_threshold_leaves_early_rows_nearly_dense(rope):
    """The limit that the card admits: the fewer blocks, the larger their parts."""
    _, _, x = case(rope, 640, 640)
    method = SeerAttention(threshold=0.04, block_size=B, last_dense=0)
    mask = method.pattern(replace(x, learner=gates_for(x, method))).block_mask()[0].float()
    share = mask.sum(-1).mean(0) / torch.arange(1, 41)
    assert share[:6].mean() > 0.8
    assert share[-6:].mean() < 0.4


def test_the_last_rows_are_dense_and_the_rest_is_not(rope):
    _, _, x = case(rope)
    for dense in (0, 1, 2, 3):
        method = SeerAttention(nz_ratio=0.2, block_size=B, last_dense=dense)
        mask = method.pattern(replace(x, learner=gates_for(x, method))).block_mask()[0, 0]
        assert mask.sum(-1).tolist() == [1] * (8 - dense) + [8 - i for i in range(dense)][::-1]


def test_in_chunks_a_ratio_counts_the_keys_so_far_and_dense_rows_come_again(rope):
    def pairs(**options):
        method = SeerAttention(block_size=B, **options)
        _, _, x = case(rope, 640, 640)
        x = replace(x, learner=gates_for(x, method))
        chunks = (
            replace(x, q=x.q[:, :, s : s + 160], k=x.k[:, :, : s + 160], v=x.v[:, :, : s + 160])
            for s in range(0, 640, 160)
        )
        return [sum(int(method.pattern(y).pairs().sum()) for y in part) for part in (chunks, [x])]

    chunks, whole = pairs(nz_ratio=0.25, last_dense=0)
    assert chunks < 0.8 * whole
    chunks, whole = pairs(threshold=0.04, last_dense=0)
    assert chunks == whole
    chunks, whole = pairs(threshold=0.04, last_dense=2)
    assert chunks > whole


def test_full_settings_are_dense_whatever_the_gates_say(rope):
    _, _, x = case(rope)
    for method in (SeerAttention(threshold=0.0), SeerAttention(nz_ratio=1.0, block_size=B)):
        assert method.pattern(replace(x, learner=gates_for(x, method))).density().min() == 1


@pytest.mark.parametrize("where", ["q", "k"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_what_it_spoils_in_dense(where, bad, rope):
    _, _, x = case(rope)
    spoilt = getattr(x, where).clone()
    spoilt[0, 0, 40] = bad
    x = replace(x, **{where: spoilt})
    method = SeerAttention(nz_ratio=0.5, block_size=B)
    pattern = method.pattern(replace(x, learner=gates_for(x, method)))
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    clean = out.isfinite().all(-1)[0]
    if where == "q":
        assert not clean[0, 40]
        assert clean[1:].all()
        assert clean.sum() == 4 * 120 - 1
    else:
        assert not clean[:2, 48:].any()  # the block that can't be judged is read by its whole group
        assert clean[:2, :32].all()
        assert clean[2:].all()


# ------------------------------------------------------------------ training


def test_the_target_is_the_pooled_attention_of_the_last_three_quarters(rope):
    q, _, x = case(rope, 128, 128)
    lesson = make_lessons(x, SeerAttention(block_size=B))["prefill"]
    keys = x.k.repeat_interleave(2, 1)
    seen = torch.ones(128, 128, dtype=torch.bool).tril()
    p = (x.q @ keys.mT * x.scale).masked_fill(~seen, -torch.inf).softmax(-1)
    tiles = torch.stack([torch.stack([c.amax((2, 3)) for c in r.split(B, 3)], -1) for r in p.split(B, 2)], 2)
    want = (tiles / tiles.sum(-1, keepdim=True))[:, :, 2:]
    torch.testing.assert_close(lesson.target, want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lesson.target.sum(-1), torch.ones(1, 4, 6))
    assert (lesson.target.masked_select(~lesson.seen) == 0).all()
    torch.testing.assert_close(lesson.q[0, 1, 0], q[0, 1, 32:48].mean(0), rtol=1e-4, atol=1e-5)


def test_the_decode_target_is_the_group_maximum_over_earlier_blocks(rope):
    _, _, x = case(rope, 100, 100)
    lesson = make_lessons(x, SeerAttention(block_size=B, phase="decode"))["decode"]
    seen = torch.ones(100, 100, dtype=torch.bool).tril()
    p = (x.q @ x.k.repeat_interleave(2, 1).mT * x.scale).masked_fill(~seen, -torch.inf).softmax(-1)
    for row, token in ((0, 50), (49, 99), (13, 63)):
        best = torch.stack([c.amax(-1) for c in p[0, :, token].split(B, -1)], -1).unflatten(0, (2, 2)).amax(1)
        own = token // B
        torch.testing.assert_close(
            lesson.target[0, :, row, :own], best[:, :own] / best[:, :own].sum(-1, keepdim=True),
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
        assert not lesson.target[0, :, row, own:].any()
        assert lesson.seen[row].sum() == own


def test_the_loss_is_the_divergence_summed_over_blocks(rope):
    _, _, x = case(rope, 128, 128)
    method = SeerAttention(block_size=B)
    gates, lesson = gates_for(x, method), make_lessons(x, method)["prefill"]
    scores = _seer_training.gate_scores(gates, "prefill", lesson)
    total = 0.0
    for h in range(4):
        for i in range(6):
            n = i + 3  # rows from the third block on see three blocks and more
            p, t = scores[0, h, i, :n].detach().softmax(-1), lesson.target[0, h, i, :n]
            total += float((t * (t / p).log()).sum())
    assert divergence(gates, "prefill", lesson).item() == pytest.approx(total / 24, rel=1e-4)


def test_one_text_is_learnt_and_nothing_but_gates_moves(model):
    before = {n: p.clone() for n, p in model.named_parameters()}
    method = SeerAttention(block_size=B, phase="both")
    steps = []
    learnt = train_gates(model, [IDS], method, steps=120, lr=1e-2, on_step=lambda *a: steps.append(a))
    curve = learnt.meta["curve"]
    assert curve["prefill"][-1] < 0.1 * curve["prefill"][0]
    assert curve["decode"][-1] < 0.4 * curve["decode"][0]
    assert [n for n, _ in steps] == list(range(1, 121))
    assert steps[3][1] == pytest.approx((curve["prefill"][3] + curve["decode"][3]) / 2)
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert learnt.meta["tokens"] == 120 * IDS.numel()
    start = method.new_learner(LayerShape(0, 3, 4, 2, 16)).state_dict()
    assert all(not torch.equal(t, start[n.partition(".")[2]]) for n, t in learnt.tensors.items())
    assert set(learnt.tensors) == {f"{i}.{n}" for i in range(3) for n in start}


def test_trained_gates_choose_more_of_what_they_were_taught(model):
    """On the same text: random weights and tokens have nothing that carries over to another."""
    method = SeerAttention(nz_ratio=0.3, block_size=B, last_dense=0)
    layers = list(capture_qkv(model, IDS))
    kept = []
    for steps in (0, 100):
        learnt = train_gates(model, [IDS], method, steps=steps, lr=3e-3)
        found = [method.pattern(x, learnt) for x in layers]
        wanted = [block_max_probability(x.q, x.k, B, x.scale) for x in layers]
        both = [(p.block_mask() * w).sum() / w.sum() for p, w in zip(found, wanted, strict=True)]
        kept.append(float(sum(both)) / 3)
        assert found[0].counts.max() == 2
    assert kept[1] > kept[0] + 0.02


def test_a_spike_that_means_hide_is_found_after_training():
    """Each block holds a key and its opposite but for one, whose key is twice as large: equal means of 0."""
    g = torch.Generator().manual_seed(0)
    gates = Gates(1, 1, D, D, "prefill")

    def lesson():
        k = torch.randn(8, 1, 8, B, D, generator=g) * 0.1
        where = torch.randint(8, (8,), generator=g)
        size = torch.ones(8, 8)
        size[torch.arange(8), where] = 2.0
        k[:, 0, :, 3, 5], k[:, 0, :, 9, 5] = size, -size
        pooled = torch.cat((k.amax(3), k.amin(3), k.mean(3)), -1)
        q = torch.randn(8, 1, 8, D, generator=g) * 0.1
        q[..., 5] = 4.0
        target = F.one_hot(where, 8).float()[:, None, None].expand(-1, 1, 8, -1) * 0.93 + 0.01
        return Lesson(q, pooled, None, None, target, torch.ones(8, 8, dtype=torch.bool)), where

    def found():
        test, where = lesson()
        scores = _seer_training.gate_scores(gates, "prefill", test)
        return float((scores.argmax(-1)[:, 0] == where[:, None]).float().mean())

    assert found() < 0.5
    optimiser = torch.optim.AdamW(gates.parameters(), lr=0.03, weight_decay=0.0)
    for _ in range(80):
        loss = divergence(gates, "prefill", lesson()[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert found() > 0.95


def test_batches_that_come_again_are_computed_once_or_anew_alike(model, monkeypatch):
    method = SeerAttention(block_size=B)
    batches = [IDS[:1], IDS[1:, :150]]
    kept = train_gates(model, batches, method, steps=5)
    monkeypatch.setattr(_seer_training, "_CACHE_BYTES", 0)
    anew = train_gates(model, batches, method, steps=5)
    assert kept.meta["curve"] == anew.meta["curve"]
    assert all(torch.equal(t, anew.tensors[n]) for n, t in kept.tensors.items())


def test_calibration_tells_and_a_recipe_carries_the_gates(model, tmp_path, capsys):
    method = SeerAttention(nz_ratio=0.3, block_size=B, steps=20, phase="both", budget=48)
    with torch.no_grad(), sl.apply(model, method, calibration_ids=IDS[:, :100]) as handle:
        told = capsys.readouterr()
        expected = model(input_ids=IDS).logits
        handle.recipe().save(tmp_path / "recipe.json")
    assert "seer-attention: step 20/20, KL" in told.err
    assert told.out == ""
    loaded = sl.Recipe.load(tmp_path / "recipe.json")
    assert len(loaded.calibrations["seer-attention"].meta["curve"]["decode"]) == 20
    with torch.no_grad(), loaded.apply(model):
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert capsys.readouterr().err == ""  # not trained again


def test_captured_layers_take_their_gates_from_a_calibration(model):
    method = SeerAttention(nz_ratio=0.3, block_size=B, steps=3)
    learnt = train_gates(model, [IDS], method)
    x = next(iter(capture_qkv(model, IDS[:1], [1])))
    gates = method.new_learner(LayerShape(1, 3, 4, 2, 16))
    gates.load_state_dict({n[2:]: t for n, t in learnt.tensors.items() if n[0] == "1"})
    want = method.pattern(replace(x, learner=gates)).block_mask()
    assert torch.equal(method.pattern(x, learnt).block_mask(), want)
    with pytest.raises(SparselandError, match="no gates for layer 1"):
        method.pattern(x)


# ------------------------------------------------------------------ decoding

R = SeerAttention(budget=3 * B, block_size=B, phase="decode")


def fed(method, gates, x, steps, first_key=None):
    """A state after a prompt and ``steps`` single tokens, with the selection of each step."""
    state, n = method.new_state(1), x.k.shape[2]
    at = replace(x, learner=gates)
    prompt = n - steps
    method.append(state, x.k[:, :, :prompt])
    method.observe(state, replace(at, q=x.q[:, :, :prompt], k=x.k[:, :, :prompt]), first_key)
    chosen = []
    for t in range(prompt, n):
        method.append(state, x.k[:, :, t : t + 1])
        step = replace(at, q=x.q[:, :, t : t + 1], k=x.k[:, :, : t + 1])
        chosen.append(method.select(state, step, first_key))
    return state, chosen


def literal_tokens(q, k, gates, token, method, speed):
    """The tokens that a step reads per key head, from the equations."""
    gate, own, kv_heads = gates.decode, token // B, k.shape[1]
    found = []
    for h in range(kv_heads):
        group = q.shape[1] // kv_heads
        query = torch.cat([q[0, h * group + i, token] for i in range(group)]) @ gate.query[h]
        query = turned(query, token, speed)
        scores = []
        for j in range(own):
            block = k[0, h, j * B : (j + 1) * B]
            pooled = torch.cat((block.max(0).values, block.min(0).values, block.mean(0)))
            scores.append(float(query @ turned(pooled @ gate.key[h], j * B, speed)) / len(query) ** 0.5)
        if method.budget is not None:
            best = sorted(range(own), key=lambda j: -scores[j])[: method.budget // B - 1]
        else:
            best = [j for j, p in enumerate(torch.tensor(scores).softmax(-1)) if p > method.threshold]
        found.append({t for j in [*best, own] for t in range(j * B, (j + 1) * B) if t <= token})
    return found


def tokens_of(index, row=0):
    return [{t for t in head.tolist() if t >= 0} for head in index[row]]


@pytest.mark.parametrize("method", [R, replace(R, budget=None, threshold=0.15)], ids=lambda m: m.spec)
@torch.no_grad()
def test_decoding_reads_what_the_equations_say(method, rope):
    q, k, x = case(rope, 150, 150)
    gates = gates_for(x, method)
    _, chosen = fed(method, gates, x, 40)
    for token, index in zip(range(110, 150), chosen, strict=True):
        want = literal_tokens(q, k, gates, token, method, rope.module.inv_freq.tolist())
        assert tokens_of(index) == want
        assert token in want[0]
    if method.budget is not None:
        assert max(len(s) for s in want) <= method.budget


@torch.no_grad()
def test_rows_of_a_padded_batch_choose_as_alone(rope):
    """Each row's blocks begin at its own first token, also those that fill up while decoding."""
    gone = [0, 21, 37]
    rows = [case(rope, 150 - g, 150 - g, seed=g)[2] for g in gone]
    gates = gates_for(rows[0], R)
    padded = {
        n: torch.cat([F.pad(getattr(row, n), (0, 0, g, 0)) for row, g in zip(rows, gone, strict=True)])
        for n in ("q", "k", "v")
    }
    together = replace(rows[0], **padded)
    _, padded = fed(R, gates, together, 40, torch.tensor(gone))
    for row, (x, g) in enumerate(zip(rows, gone, strict=True)):
        _, alone = fed(R, gates, x, 40)
        for a, b in zip(padded, alone, strict=True):
            assert [{t - g for t in s} for s in tokens_of(a, row)] == tokens_of(b)


@torch.no_grad()
def test_what_is_learnt_step_by_step_is_what_a_prompt_gives(rope):
    _, _, x = case(rope, 150, 150)
    gates = gates_for(x, R)
    slow, _ = fed(R, gates, x, 70)
    fast, _ = fed(R, gates, x, 1)
    torch.testing.assert_close(slow.rows, fast.rows)
    assert slow.rows.shape[2] == 150 // B
    assert slow.nbytes() < x.k.nbytes


@torch.no_grad()
def test_a_cropped_cache_and_reordered_beams(rope):
    _, _, x = case(rope, 150, 150, batch=2)
    gates = gates_for(x, R)
    for back in (3, 20, 60):  # within a block, a block, and more than the keys that are kept
        state, _ = fed(R, gates, x, 8)
        state.crop(150 - back)
        assert len(state) == 150 - back
        state.reorder(torch.tensor([1, 0]))
        swapped = replace(x, q=x.q.flip(0), k=x.k.flip(0), learner=gates)
        for t in range(150 - back, 150):
            R.append(state, swapped.k[:, :, t : t + 1])
            got = R.select(state, replace(swapped, q=swapped.q[:, :, t : t + 1], k=swapped.k[:, :, : t + 1]))
        _, want = fed(R, gates, x, 1)
        assert tokens_of(got, 0) == tokens_of(want[-1], 1)
        assert tokens_of(got, 1) == tokens_of(want[-1], 0)


@torch.no_grad()
def test_a_store_hides_the_cache_but_not_the_new_keys(rope):
    """Beside a store the cache holds NaN while decoding: new blocks come from the keys as they arrived."""
    _, _, x = case(rope, 150, 150)
    gates = gates_for(x, R)
    state = R.new_state(1)
    at = replace(x, learner=gates)
    R.append(state, x.k[:, :, :90])
    R.observe(state, replace(at, q=x.q[:, :, :90], k=x.k[:, :, :90]))
    for t in range(90, 150):
        R.append(state, x.k[:, :, t : t + 1])
        hidden = torch.full((1, 1, 1, 1), torch.nan).expand(1, 2, t + 1, D)
        got = R.select(state, replace(at, q=x.q[:, :, t : t + 1], k=hidden))
    _, want = fed(R, gates, x, 1)
    assert tokens_of(got) == tokens_of(want[-1])


def test_decoding_in_a_model_with_and_without_a_store(model):
    ids = IDS[:, :150]
    method = replace(R, steps=5, phase="both", nz_ratio=0.5)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for methods in (method, [method, "mustafar:sparsity=0.5"]):
        with sl.apply(model, methods, calibration_ids=ids) as handle:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            stats = handle.stats()
        assert 0.2 < stats.decode_density < 0.4
        assert stats.density < 0.9


def test_short_caches_and_large_budgets_are_read_whole(rope):
    _, _, x = case(rope, 40, 40)
    gates = gates_for(x, R)
    assert fed(replace(R, budget=40), gates, x, 1)[1] == [None]
    assert fed(replace(R, budget=None, threshold=0.0), gates, x, 1)[1] == [None]
    short = replace(x, **{n: getattr(x, n)[:, :, :B] for n in ("q", "k", "v")})
    assert fed(R, gates, short, 1)[1] == [None]
    assert fed(replace(R, budget=1), gates, x, 1)[1][0].shape[2] == B  # its own block alone


# -------------------------------------------------------------- the public side


def test_card_spec_roles_and_defaults():
    method = parse_spec("seer-attention")
    assert method == sl.SeerAttention()
    assert (method.block_size, method.threshold, method.last_dense) == (64, 2e-3, 2)
    assert method.roles == {"prefill"}
    assert replace(method, phase="decode").roles == {"select"}
    for setting in SeerAttention.grid(4096):
        assert parse_spec(setting.spec) == setting
        assert setting.calibration_key == SeerAttention.grid(4096)[0].calibration_key
    assert replace(method, threshold=0.01).calibration_key == method.calibration_key
    assert replace(method, block_size=32).calibration_key != method.calibration_key


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("seer-attention:threshold=1", "threshold=1 is not allowed"),
        ("seer-attention:nz_ratio=0", "nz_ratio=0"),
        ("seer-attention:block_size=48", "16, 32, 64 or 128"),
        ("seer-attention:phase=never", "one of prefill, decode, both"),
        ("seer-attention:lr=0", "lr=0"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)


def test_what_cannot_be_done_is_one_clear_line(model):
    with pytest.raises(
        SparselandError, match="gate_dim=8 is not allowed; it must be the model's head size 16"
    ):
        sl.apply(model, "seer-attention:gate_dim=8", calibration_ids=IDS)
    with pytest.raises(SparselandError, match=r"N >= 129, got \[\[2, 100\]\]"):
        train_gates(model, [IDS[:, :100]], SeerAttention())
    with pytest.raises(SparselandError, match=r"N >= 129, got \[\]"):
        train_gates(model, [], SeerAttention())
    changing = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(SparselandError, match="changes with the length"):
        sl.apply(tiny_model("llama", rope_parameters=changing), "seer-attention", calibration_ids=IDS)
    with pytest.raises(SparselandError, match="the loss of step 2 is not a number"):
        train_gates(model, [IDS], replace(R, phase="decode"), steps=5, lr=1e25)
    other = tiny_model("llama", num_attention_heads=2, num_key_value_heads=2)
    learnt = train_gates(other, [IDS], SeerAttention(block_size=B), steps=0)
    with pytest.raises(SparselandError, match="what was learnt for layer 0 does not fit this model"):
        sl.apply(model, SeerAttention(block_size=B), calibrations={"seer-attention": learnt})
