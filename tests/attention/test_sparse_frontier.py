"""The study's six selectors: against slow transcriptions, on planted structures, on models, and failing."""

import math

import pytest
import torch
import torch.nn.functional as F

import sparseland as sl
from sparseland.attention._frontier_prefill import blocks_density, blocks_for
from sparseland.attention._frontier_search import density_of
from sparseland.attention.sparse_frontier import DECODE_UNITS, DEFAULTS, PREFILL_UNITS, UNITS, SparseFrontier
from sparseland.cache._quest import PageBounds, best_pages, page_bounds
from sparseland.cache._snapkv import EvictingStore, adaptive_top, eviction_scores, probe_scores, uniform_top
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern

N = 300


def inputs(n_queries=N, n_keys=N, batch=1, heads=(4, 2), dim=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads[0], n_queries, dim, generator=g) * 2
    k = torch.randn(batch, heads[1], n_keys, dim, generator=g) * torch.rand(1, 1, n_keys, 1, generator=g) * 2
    v = torch.randn(batch, heads[1], n_keys, dim, generator=g)
    return AttentionInputs(q, k, v, dim**-0.5, layer=0)


def looking_alike():
    """The last queries of a group look for the same, so that there is something to find."""
    x = inputs()
    x.q[:, :, -40:] += (
        2 * torch.randn(2, 16, generator=torch.Generator().manual_seed(5))[None, [0, 0, 1, 1], None]
    )
    return x


def setting(unit, length=N):
    """A small budget."""
    own = {
        "vertical-slash": {"verticals": 20, "slashes": 64, "probe": 40},
        "block": {"blocks": 4},
        "flexprefill": {"coverage": 0.1, "min_budget": 8, "probe": 40},
        "snapkv": {"capacity": 60, "window": 12, "probe": 30, "kernel": 5},
        "ada-snapkv": {"capacity": 60, "window": 12, "probe": 30, "kernel": 5},
        "quest": {"budget": 48},
    }
    return SparseFrontier(unit=unit, **own[unit])


def probabilities(x, h, probe):
    """Causal softmax of the last ``probe`` queries of head h: rows of plain numbers."""
    n = x.k.shape[2]
    rows = []
    for i in range(x.q.shape[2] - probe, x.q.shape[2]):
        logits = (x.k[0, h // x.group] @ x.q[0, h, i]) * x.scale
        logits[x.offset + i + 1 :] = -math.inf
        rows.append(logits.softmax(-1))
    return torch.stack(rows), n


# ---------------------------------------------------------------- prompts


def literal_vertical_slash(x, h, n_columns, n_diagonals, probe, sinks=4, local=64):
    """Chosen columns and diagonals of one head; counts may be functions of the ranked mass."""
    p, n = probabilities(x, h, probe)
    column, diagonal = p.sum(0), torch.zeros(n)
    for i in range(probe):
        at = n - probe + i
        for j in range(at + 1):
            diagonal[at - j] += p[i, j]
    chosen = []
    for mass, forced, count in ((column, sinks, n_columns), (diagonal, local, n_diagonals)):
        order = sorted(range(n), key=lambda j, m=mass, f=forced: (-(j < f), j if j < f else -m[j].item()))
        chosen.append(order[: count(order, mass) if callable(count) else count])
    return chosen


def literal_mask(x, columns, diagonals):
    """Columns for all queries; every 64x64 block that a diagonal touches."""
    n_queries, n_keys = x.q.shape[2], x.k.shape[2]
    mask = torch.zeros(n_queries, n_keys, dtype=torch.bool)
    mask[:, columns] = True
    for row in range(0, n_queries, 64):
        for i in range(row, row + 64):  # the row of blocks is taken whole, past the last query too
            for o in diagonals:
                j = i + x.offset - o
                if j >= 0:
                    mask[row : row + 64, j // 64 * 64 : j // 64 * 64 + 64] = True
    return mask & torch.ones(n_queries, n_keys, dtype=torch.bool).tril(x.offset)


@pytest.mark.parametrize(("n_queries", "n_keys"), [(300, 300), (256, 256), (130, 300)])
def test_vertical_slash_is_its_transcription(n_queries, n_keys):
    x = inputs(n_queries, n_keys)
    mask = SparseFrontier(verticals=20, slashes=66, probe=40).pattern(x).mask()
    for h in range(4):
        expected = literal_mask(x, *literal_vertical_slash(x, h, 20, 66, 40))
        assert torch.equal(mask[0, h], expected)


def test_flexprefill_covers_per_head_and_is_its_transcription():
    x = inputs()
    x.q[0, 1] *= 4  # a peaked head needs fewer

    def covering(order, mass):
        left, count = 0.3 * mass.sum().item(), 0
        while left > 0:
            left -= mass[order[count]].item()
            count += 1
        return max(count, 8)

    method = SparseFrontier(unit="flexprefill", coverage=0.3, min_budget=8, probe=40)
    mask = method.pattern(x).mask()
    taken = []
    for h in range(4):
        columns, diagonals = literal_vertical_slash(x, h, covering, lambda o, m: max(64, covering(o, m)), 40)
        assert torch.equal(mask[0, h], literal_mask(x, columns, diagonals))
        taken.append(len(columns))
    assert len(set(taken)) > 1


@pytest.mark.parametrize(("n_queries", "n_keys"), [(300, 300), (256, 256), (128, 304), (100, 297)])
def test_block_is_its_transcription(n_queries, n_keys):
    x = inputs(n_queries, n_keys)
    mask = setting("block").pattern(x).mask()
    size = 16
    for h in range(4):
        for row in range(0, n_queries, size):
            q = x.q[0, h, row : row + size].mean(0)
            last = min(row + size, n_queries) - 1 + x.offset
            blocks = range(last // size + 1)
            own = set(range((row + x.offset) // size, last // size + 1))
            forced = {0} | own | {min(own) - 1} & set(blocks)
            score = [(x.k[0, h // 2, b * size : (b + 1) * size].mean(0) @ q).item() for b in blocks]
            ranked = sorted(blocks, key=lambda b: (b not in forced, -score[b]))
            count = max(4, len(forced))
            chosen = set(ranked[:count])
            got = {b for b in blocks if mask[0, h, row : row + size, b * size : (b + 1) * size].any()}
            assert got == chosen


def test_no_empty_block_is_added_and_a_partial_block_counts_what_it_holds():
    """The released code adds a block at whole multiples, and its last mean counts zeros."""
    x = inputs(128, 128)
    assert setting("block").pattern(x).counts.shape == (1, 4, 8)
    x = inputs(113, 113)  # one token in the last block
    k = x.k.clone()
    k[:, :, 112] = 0
    k[:, :, 112] += 3 * F.normalize(x.q[:, ::2, 112], dim=-1)
    pattern = SparseFrontier(unit="block", blocks=3).pattern(AttentionInputs(x.q, k, x.v, x.scale, 0))
    assert pattern.density().max() < 1


@pytest.mark.parametrize("unit", PREFILL_UNITS)
class TestPrompts:
    def test_the_density_is_that_of_the_mask(self, unit):
        for x in (inputs(), inputs(100, 297), inputs(batch=2)):
            pattern = setting(unit).pattern(x)
            assert torch.equal(pattern.pairs(), pattern.mask().sum((-1, -2)))
            assert 0 < pattern.density().min() <= pattern.density().max() < 1

    def test_the_full_budget_is_dense(self, unit):
        x = inputs()
        pattern = SparseFrontier.full_budget(N, unit).pattern(x)
        assert pattern.density().min() == 1
        dense = attend(x.q, x.k, x.v, WindowPattern.dense(N, N), scale=x.scale)
        torch.testing.assert_close(attend(x.q, x.k, x.v, pattern, scale=x.scale), dense)

    def test_every_query_sees_itself(self, unit):
        for x in (inputs(), inputs(100, 297), inputs(1, 200), inputs(3, 3)):
            mask = setting(unit).pattern(x).mask().expand(1, 4, -1, -1)
            assert mask.diagonal(x.offset, -2, -1).all()

    def test_rows_of_a_batch_are_as_alone(self, unit):
        x = inputs(batch=2)
        both = setting(unit).pattern(x).mask()
        for row in range(2):
            at = slice(row, row + 1)
            alone = AttentionInputs(x.q[at], x.k[at], x.v[at], x.scale, 0)
            assert torch.equal(setting(unit).pattern(alone).mask()[0], both[row])

    def test_non_contiguous_inputs(self, unit):
        x = inputs()
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v))
        strided = AttentionInputs(q, k, v, x.scale, 0)
        assert torch.equal(setting(unit).pattern(strided).mask(), setting(unit).pattern(x).mask())

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_broken_key_shows_as_it_does_in_dense_attention(self, unit, bad):
        x = inputs()
        x.k[0, 0, 150] = bad
        pattern = setting(unit).pattern(x)
        out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
        dense = attend(x.q, x.k, x.v, WindowPattern.dense(N, N), scale=x.scale)
        # The other key head is not touched at all, nor are blocks of queries before the key's own.
        assert out[:, 2:].isfinite().all()
        assert out[:, :2, :128].isfinite().all()
        assert out[0, 0, 150].isnan().any() == dense[0, 0, 150].isnan().any()

    def test_a_budget_fits_a_prompt(self, unit):
        xs = [inputs(1024, 1024, seed=s) for s in range(2)]
        for x in xs:  # attention that has something to find: a few strong columns
            x.k[:, :, 5:1000:90] += 2 * x.q[:, ::2, -200:].mean(2, keepdim=True)
        method = SparseFrontier.at_sparsity(unit, 2, 1024, xs)
        assert density_of(method, xs) == pytest.approx(0.5, abs=0.06)
        tighter = SparseFrontier.at_sparsity(unit, 16, 1024, xs)
        assert density_of(tighter, xs) < 0.3


def test_a_planted_column_and_block_are_found():
    x = looking_alike()
    needle = 100
    x.k[:, :, needle] = 3 * x.q[:, ::2, -20:].mean(2)
    for unit in PREFILL_UNITS:
        mask = setting(unit).pattern(x).mask()
        assert mask[0, ::2, -1, needle].all(), unit
        without = setting(unit).pattern(looking_alike()).mask()
        assert not without[0, ::2, -1, needle].all(), unit


def test_vertical_slash_misses_what_only_early_queries_look_for():
    x = inputs()
    needle, reader = 30, 180
    x.k[:, :, needle] *= 0.1
    x.q[:, :, reader] = 40 * x.k[:, :, needle].repeat_interleave(2, 1)
    mask = setting("vertical-slash").pattern(x).mask()
    assert not mask[0, :, reader, needle].all()


def test_block_misses_one_key_among_opposite_neighbours():
    x = inputs()
    want = F.normalize(x.q[:, ::2, -16:].mean(2), dim=-1)
    x.k[:, :, 96:112] = -0.5 * want[:, :, None]
    x.k[:, :, 100] = 7 * want
    mask = setting("block").pattern(x).mask()
    assert (x.k[0, :, 100] * want[0]).sum(-1).min() > (x.k[0, :, 96:112].mean(1) * want[0]).sum(-1).max()
    assert not mask[0, ::2, -1, 100].any()


def test_blocks_density_is_the_count_and_its_search_the_nearest():
    n = 40
    for count in (3, 7, 40, 60):
        brute = sum(min(count, row + 1) for row in range(n)) / (n * (n + 1) / 2)
        assert blocks_density(count, n) == pytest.approx(brute)
    for wanted in (0.02, 0.1, 0.25, 0.5, 1.0):
        best = min(range(3, n + 1), key=lambda c: abs(blocks_density(c, n) - wanted))
        assert blocks_for(wanted, n) == best


# ------------------------------------------------------------------ cache


def literal_snapkv(x, h, probe, kernel, window, sinks, reduce):
    """Scores of one key head, in loops."""
    n = x.k.shape[2]
    p = torch.stack([probabilities(x, q, probe)[0] for q in range(h * x.group, (h + 1) * x.group)])
    raw = p.mean(0).sum(0) if reduce == "mean" else p.amax((0, 1))
    scores = []
    for j in range(n):
        near = [raw[i] if 0 <= i < n else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
        scores.append(float(sum(near)) / kernel)
    for j in (*range(sinks), *range(n - window, n)):
        scores[j] = math.inf
    return scores


@pytest.mark.parametrize("unit", ["snapkv", "ada-snapkv"])
def test_kept_tokens_are_the_transcription(unit):
    x = inputs()
    method = setting(unit)
    mask = method.keep(x.q[:, :, -30:], x.k, x.scale)
    reduce = "max" if unit == "ada-snapkv" else "mean"
    scores = [literal_snapkv(x, h, 30, 5, 12, 4, reduce) for h in range(2)]
    own = 60 if unit == "snapkv" else max(int(0.2 * 60), 12 + 4)
    chosen = [set(sorted(range(N), key=lambda j, s=s: -s[j])[:own]) for s in scores]
    rest = sorted(
        ((s[j], h, j) for h, s in enumerate(scores) for j in range(N) if j not in chosen[h]), reverse=True
    )
    for _, h, j in rest[: 2 * (60 - own)]:
        chosen[h].add(j)
    for h in range(2):
        assert set(mask[0, h].nonzero().flatten().tolist()) == chosen[h]


def test_ada_snapkv_spends_the_shared_budget_and_leaves_each_head_its_minimum():
    x = inputs(heads=(8, 4), seed=3)
    x.q[:, :2] *= 0.1  # the first key head's queries look everywhere alike
    mask = setting("ada-snapkv").keep(x.q[:, :, -30:], x.k, x.scale)
    counts = mask.sum(-1)[0]
    assert counts.sum() == 60 * 4
    assert counts.min() >= 16
    assert counts.max() > counts.min()
    even = setting("snapkv").keep(x.q[:, :, -30:], x.k, x.scale)
    assert (even.sum(-1) == 60).all()
    whole = SparseFrontier(unit="ada-snapkv", capacity=60, window=12, probe=30, kernel=5, floor=1.0)
    assert (whole.keep(x.q[:, :, -30:], x.k, x.scale).sum(-1) == 60).all()


def test_mean_and_max_are_not_the_same():
    x = inputs()
    mean, largest = (probe_scores(x.q[:, :, -30:], x.k, x.scale, r) for r in ("mean", "max"))
    assert (mean.argsort(-1) != largest.argsort(-1)).any()
    assert mean.sum(-1).allclose(torch.tensor(30.0))
    assert largest.max() <= 1


def test_scores_in_pieces_are_the_same(monkeypatch):
    x = inputs()
    whole = probe_scores(x.q[:, :, -30:], x.k, x.scale, "mean")
    monkeypatch.setattr("sparseland.cache._snapkv._PIECE", 1)
    torch.testing.assert_close(probe_scores(x.q[:, :, -30:], x.k, x.scale, "mean"), whole)


def test_padding_has_no_say():
    x = inputs(batch=2)
    first = torch.tensor([0, 280])  # the second row's probe is partly padding
    for unit in ("snapkv", "ada-snapkv"):
        mask = setting(unit).keep(x.q[:, :, -30:], x.k, x.scale, first)
        alone = setting(unit).keep(x.q[1:, :, -20:], x.k[1:, :, 280:], x.scale)
        assert torch.equal(mask[1, :, 280:], alone[0])
        assert not mask[1, :, :280].any()
        assert torch.equal(mask[0], setting(unit).keep(x.q[:1, :, -30:], x.k[:1], x.scale)[0])


def test_a_token_that_the_prompt_never_looks_at_is_lost():
    x = looking_alike()
    needle = 100
    x.k[:, :, needle] = -4 * x.q[:, ::2, -30:].mean(2)
    near = slice(needle - 2, needle + 3)
    x.k[:, :, near] = x.k[:, :, needle : needle + 1]
    assert not setting("snapkv").keep(x.q[:, :, -30:], x.k, x.scale)[..., needle].any()
    x.k[:, :, near] *= -1
    assert setting("snapkv").keep(x.q[:, :, -30:], x.k, x.scale)[..., needle].all()


@pytest.mark.parametrize("unit", ["snapkv", "ada-snapkv"])
class TestStore:
    def filled(self, unit, x, pieces=(N,)):
        store = setting(unit).new_store(0)
        at = 0
        for n in pieces:
            part = slice(at, at + n)
            store.append(x.k[:, :, part], x.v[:, :, part])
            store.observe(
                AttentionInputs(x.q[:, :, part], x.k[:, :, : at + n], x.v[:, :, : at + n], x.scale, 0)
            )
            at += n
        return store

    def brute(self, unit, x, q, new):
        """Attention over what the mask keeps and all that came later."""
        mask = setting(unit).keep(x.q[:, :, -30:], x.k, x.scale)
        mask = torch.cat([mask, torch.ones(*mask.shape[:2], new.shape[2], dtype=torch.bool)], -1)
        k, v = (torch.cat([t, new], 2).repeat_interleave(x.group, 1) for t in (x.k, x.v))
        logits = (q @ k.mT * x.scale).masked_fill(~mask.repeat_interleave(x.group, 1)[:, :, None], -math.inf)
        return logits.softmax(-1) @ v

    def test_decoding_reads_what_was_kept_and_what_came_later(self, unit):
        x = inputs(batch=2)
        new = torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(9))
        store = self.filled(unit, x)
        before = store.nbytes()
        for i in range(3):
            store.append(new[:, :, i : i + 1], new[:, :, i : i + 1])
            q = x.q[:, :, -1:] * (i + 1)
            torch.testing.assert_close(
                store.attend(q, x.scale), self.brute(unit, x, q, new[:, :, : i + 1]), rtol=1e-4, atol=1e-5
            )
            assert len(store) == N + i + 1
            assert store.kept() == 60 + i + 1
        # 60 + 3 of 303 tokens, and where they stood (positions and slots as int64).
        assert store.nbytes() < 0.35 * before

    def test_a_prompt_in_pieces_keeps_the_same(self, unit):
        x = inputs()
        stores = [self.filled(unit, x, pieces) for pieces in ((N,), (128, 150, 22), (290, 10))]
        for store in stores:
            store.append(x.k[:, :, :1], x.v[:, :, :1])
        out = [store.attend(x.q[:, :, -1:], x.scale) for store in stores]
        assert torch.equal(out[0], out[1])
        assert torch.equal(out[0], out[2])

    def test_beams_and_cropping(self, unit):
        x = inputs(batch=2)
        new = torch.randn(2, 2, 3, 16, generator=torch.Generator().manual_seed(9))
        store = self.filled(unit, x)
        store.append(new[:, :, :1], new[:, :, :1])
        expected = store.attend(x.q[:, :, -1:], x.scale)
        store.append(new[:, :, 1:2], new[:, :, 1:2])
        store.crop(N + 1)
        assert len(store) == N + 1
        torch.testing.assert_close(store.attend(x.q[:, :, -1:], x.scale), expected)
        order = torch.tensor([1, 0, 1])
        store.reorder(order)
        torch.testing.assert_close(store.attend(x.q[order, :, -1:], x.scale), expected[order])
        store.crop(N - 20)  # into the kept window
        mask = setting(unit).keep(x.q[:, :, -30:], x.k, x.scale)[order, :, : N - 20]
        assert store.kept() == pytest.approx(mask.sum(-1).float().mean().item())

    def test_a_crop_before_the_first_token_forgets_queries_too(self, unit):
        x = inputs()
        store = self.filled(unit, x)
        store.crop(N - 10)
        store.append(x.k[:, :, :1], x.v[:, :, :1])
        cut = AttentionInputs(x.q[:, :, :-10], x.k[:, :, :-10], x.v[:, :, :-10], x.scale, 0)
        # 20 of the 30 remembered queries are left.
        mask = setting(unit).keep(cut.q[:, :, -20:], cut.k, x.scale)
        assert store.kept() == mask.sum(-1).float().mean() + 1

    def test_what_can_not_be_done_is_said(self, unit):
        x = inputs()
        store = self.filled(unit, x)
        store.append(x.k[:, :, :1], x.v[:, :, :1])
        with pytest.raises(SparselandError, match="no second prompt can follow"):
            store.append(x.k[:, :, :2], x.v[:, :, :2])
        with pytest.raises(SparselandError, match=f"unit={unit} has dropped tokens"):
            store.dense()

    def test_a_short_prompt_is_kept(self, unit):
        x = inputs(50, 50)
        store = setting(unit).new_store(0)
        store.append(x.k, x.v)
        store.observe(x)
        store.append(x.k[:, :, :1], x.v[:, :, :1])
        assert store.kept() == len(store) == 51
        assert store.dense()[0].shape[2] == 51


def test_forced_and_padded_scores():
    scores = torch.rand(2, 1, 40)
    out = eviction_scores(scores, 5, 6, 2, torch.tensor([0, 10]))
    assert out[0, 0, :2].isinf().all()
    assert out[1, 0, 10:12].isposinf().all()
    assert out[1, 0, :10].isneginf().all()
    assert out[:, 0, -6:].isposinf().all()
    assert out[0, 0, 2:-6].isfinite().all()
    assert (uniform_top(out, 12).sum(-1) == 12).all()
    assert (adaptive_top(out, 12, 8).sum((1, 2)) == 12).all()
    broken = scores.clone()
    broken[0, 0, 20] = math.nan
    assert uniform_top(eviction_scores(broken, 5, 6, 2), 13)[0, 0, 18:23].all()


# ------------------------------------------------------------------ pages


def pages_of(k, size):
    return [k[:, :, i : i + size] for i in range(0, k.shape[2], size)]


@pytest.mark.parametrize("n", [1, 15, 16, 17, 300])
def test_bounds_are_the_extremes_and_bound_the_attention(n):
    x = inputs(n, n)
    state = PageBounds(16)
    state.push(x.k)
    for p, page in enumerate(pages_of(x.k, 16)):
        low, high = state.rows[:, :, p].chunk(2, -1)
        assert torch.equal(low, page.amin(2))
        assert torch.equal(high, page.amax(2))
    scores = state.scores(x.q[:, :, -1:])
    for h in range(4):
        for p, page in enumerate(pages_of(x.k, 16)):
            true = (page[0, h // 2] @ x.q[0, h, -1]).max()
            assert scores[0, h // 2, h % 2, p] >= true - 1e-4
            literal = torch.maximum(
                x.q[0, h, -1] * page[0, h // 2].amin(0), x.q[0, h, -1] * page[0, h // 2].amax(0)
            ).sum()
            torch.testing.assert_close(scores[0, h // 2, h % 2, p], literal, rtol=1e-4, atol=1e-4)


def test_bounds_grow_token_by_token_as_at_once():
    x = inputs()
    whole, grown = PageBounds(16), PageBounds(16)
    whole.push(x.k)
    for part in x.k.split([100, 1, 1, 30, 5, *[1] * 40, 123], 2):
        grown.push(part)
    assert torch.equal(grown.rows, whole.rows)


def test_padded_rows_have_the_pages_they_would_have_alone():
    x = inputs(batch=2)
    first = torch.tensor([0, 37])
    state, alone = PageBounds(16), PageBounds(16)
    state.push(x.k)
    state.rebuild(x.k, first)
    alone.push(x.k[1:, :, 37:])
    new = torch.randn(2, 2, 20, 16, generator=torch.Generator().manual_seed(1))
    for token in new.split(1, 2):
        state.push(token)
        alone.push(token[1:])
    held = alone.rows.shape[2]
    assert torch.equal(state.rows[1:, :, :held], alone.rows)
    assert state.rows[1, :, held:, :16].isposinf().all()
    q = x.q[:, :, -1:]
    both, one = best_pages(state, q, 3, True), best_pages(alone, q[1:], 3, True)
    for h in range(2):
        assert set(both[1, h].tolist()) - {-1} == {t + 37 for t in one[0, h].tolist()}
    order = torch.tensor([1, 1])
    state.reorder(order)
    assert torch.equal(best_pages(state, q[order], 3, True), both[order])


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("n", [290, 304])
def test_the_best_pages_and_the_newest_are_read(share, n):
    x = inputs(n, n)
    state = PageBounds(16)
    state.push(x.k)
    got = best_pages(state, x.q[:, :, -1:], 3, share)
    scores = state.scores(x.q[:, :, -1:])
    scores = scores.sum(2) if share else scores.flatten(1, 2)
    newest = (n - 1) // 16
    for h in range(scores.shape[1]):
        ranked = sorted(range(newest), key=lambda p, h=h: -scores[0, h, p].item())[:3]
        expected = {t for p in (*ranked, newest) for t in range(16 * p, min(16 * p + 16, n))}
        assert set(got[0, h].tolist()) == expected
        assert got.shape[2] == len(expected)  # so the density that is reported is what is read


def test_a_cropped_page_keeps_a_bound_and_later_pages_are_gone():
    x = inputs()
    state = PageBounds(16)
    state.push(x.k)
    state.crop(100)
    assert len(state) == 100
    kept = x.k[:, :, :100]
    low, high = state.rows.chunk(2, -1)
    true_low, true_high = page_bounds(kept, 16)
    assert torch.equal(low[:, :, :6], true_low[:, :, :6])
    assert (low[:, :, 6] <= true_low[:, :, 6]).all()
    assert (high[:, :, 6] >= true_high[:, :, 6]).all()
    state.push(x.k[:, :, 100:])
    assert torch.equal(state.rows, PageBoundsOf(x.k).rows)


def PageBoundsOf(k):
    state = PageBounds(16)
    state.push(k)
    return state


def test_a_planted_page_is_read():
    x = inputs()
    x.k[:, :, 100] = 3 * x.q[:, ::2, -1]
    state = PageBoundsOf(x.k)
    assert (best_pages(state, x.q[:, :, -1:], 1, True) == 100).any(-1).all()


# ----------------------------------------------------------------- models


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 128, (2, N), generator=torch.Generator().manual_seed(0))


def decoded(model, ids, method, steps=20, pieces=1):
    out = []
    with torch.no_grad(), sl.apply(model, method) as handle:
        past = None
        for piece in ids[:, :-steps].chunk(pieces, 1):
            past = model(input_ids=piece, past_key_values=past, use_cache=True).past_key_values
        for token in ids[:, -steps:].split(1, 1):
            step = model(input_ids=token, past_key_values=past, use_cache=True)
            out.append(step.logits[:, -1])
        return torch.stack(out, 1), handle.stats()


@pytest.mark.parametrize("unit", DECODE_UNITS)
class TestDecoding:
    def test_the_full_budget_is_dense(self, unit, model, ids):
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, -20:]
        got, stats = decoded(model, ids, SparseFrontier.full_budget(N, unit))
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
        assert stats.decode_density == 1

    def test_a_small_budget_reads_what_it_says(self, unit, model, ids):
        with torch.no_grad():
            expected = model(input_ids=ids).logits[:, -20:]
        method = setting(unit)
        got, stats = decoded(model, ids, method)
        assert (got - expected).abs().max() > 1e-2
        lengths = range(281, 301)
        if unit == "quest":
            read = [48 + (n - 1) % 16 + 1 for n in lengths]
        else:
            read = [60 + n - 280 for n in lengths]
        assert stats.decode_density == pytest.approx(sum(read) / sum(lengths))
        assert stats.density == 1

    def test_padded_rows_decode_as_alone(self, unit, model, ids):
        mask = torch.ones_like(ids)
        mask[1, :50] = 0
        options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with sl.apply(model, setting(unit)):
            padded = torch.where(mask.bool(), ids, 0)
            together = model.generate(input_ids=padded, attention_mask=mask, **options)[1, -20:]
            alone = model.generate(input_ids=ids[1:, 50:], **options)[0, -20:]
        assert torch.equal(together, alone)

    def test_beam_search_runs(self, unit, model, ids):
        with sl.apply(model, setting(unit)):
            out = model.generate(
                input_ids=ids[:1], max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0,
                eos_token_id=None,
            )  # fmt: skip
        assert out.shape == (1, N + 6)

    def test_pieces_of_a_prompt_decode_the_same(self, unit, model, ids):
        whole, _ = decoded(model, ids, setting(unit))
        pieces, _ = decoded(model, ids, setting(unit), pieces=3)
        torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-3)

    def test_a_budget_fits_a_length(self, unit, model, ids):
        for compression in (2, 4, 8):
            _, stats = decoded(model, ids, SparseFrontier.at_sparsity(unit, compression, N), steps=4)
            assert stats.decode_density == pytest.approx(1 / compression, abs=0.05)

    def test_a_prompt_unit_goes_with_it(self, unit, model, ids):
        _, stats = decoded(model, ids, [setting("block"), setting(unit)])
        assert stats.density < 1
        assert stats.decode_density < 1


def test_reading_pages_of_a_cache_with_holes_is_refused(model, ids):
    with sl.apply(model, [setting("snapkv"), setting("quest")]), torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(SparselandError, match="has dropped tokens"):
            model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)


def test_a_second_prompt_is_refused_not_computed_wrongly(model, ids):
    with sl.apply(model, setting("snapkv")), torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
        with pytest.raises(SparselandError, match="has dropped tokens"):
            model(input_ids=ids[:, :5], past_key_values=past, use_cache=True)


# -------------------------------------------------------------- parameters


def test_defaults_are_the_studys():
    assert DEFAULTS["block"] == {"blocks": 64, "block_size": 16}
    assert DEFAULTS["quest"] == {"budget": 1024, "page_size": 16, "share_pages": True}
    assert SparseFrontier(unit="flexprefill").value("probe") == 512
    assert SparseFrontier().value("probe") == 256
    assert isinstance(SparseFrontier(unit="snapkv").new_store(0), EvictingStore)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"unit": "page"}, "unit=page is not allowed"),
        ({"unit": "block", "capacity": 9}, "capacity means nothing to unit=block"),
        ({"blocks": 9}, "blocks means nothing to unit=vertical-slash"),
        ({"unit": "block", "blocks": 2}, "blocks=2"),
        ({"unit": "block", "block_size": 48}, "block_size=48"),
        ({"unit": "snapkv", "capacity": 100}, "less than the 132 forced"),
        ({"unit": "snapkv", "kernel": 4}, "kernel=4"),
        ({"unit": "quest", "budget": 8}, "less than one page"),
        ({"verticals": 2}, "fewer than the 4 forced sinks"),
        ({"slashes": 10}, "fewer than the 64 forced local"),
    ],
)
def test_wrong_parameters(values, words):
    with pytest.raises(SparselandError, match=words):
        SparseFrontier(**values)


def test_wrong_budgets():
    with pytest.raises(SparselandError, match="no unit 'page'"):
        SparseFrontier.at_sparsity("page", 2, 1024)
    with pytest.raises(SparselandError, match=r"compression=0\.5"):
        SparseFrontier.at_sparsity("block", 0.5, 1024)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("length", [16, 200, 1024, 16384])
def test_every_budget_at_every_length_is_a_valid_setting(unit, length):
    for compression in (1, 1.5, 4, 64):
        method = SparseFrontier.at_sparsity(unit, compression, length)
        assert sl.Recipe([method], {}, {}, {}).methods[0].unit == unit
    assert SparseFrontier.at_sparsity(unit, 1, length) == SparseFrontier.full_budget(length, unit)


if torch.cuda.is_available():

    @pytest.mark.parametrize("unit", PREFILL_UNITS)
    def test_prompts_on_a_gpu_are_as_on_the_cpu_and_wait_for_nothing(unit):
        x = looking_alike()
        gpu = AttentionInputs(x.q.cuda(), x.k.cuda(), x.v.cuda(), x.scale, 0)
        method = setting(unit)
        expected = method.pattern(x)
        method.pattern(gpu)  # kernels are loaded
        torch.cuda.set_sync_debug_mode("error")
        try:
            pattern = method.pattern(gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # Scores that are equal but for rounding may change places.
        assert (pattern.mask().cpu() == expected.mask()).float().mean() > 0.99
        out = attend(gpu.q, gpu.k, gpu.v, pattern, scale=x.scale).cpu()
        close = (out - attend(x.q, x.k, x.v, expected, scale=x.scale)).norm() / out.norm()
        assert close < 0.1

    def test_pages_on_a_gpu_are_chosen_without_waiting():
        x = inputs()
        state, q, new = PageBoundsOf(x.k.cuda()), x.q[:, :, -1:].cuda(), x.k[:, :, :1].cuda()
        best_pages(state, q, 3, True)
        torch.cuda.set_sync_debug_mode("error")
        try:
            state.push(new)
            tokens = best_pages(state, q, 3, True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        other = PageBoundsOf(torch.cat([x.k, x.k[:, :, :1]], 2))
        assert torch.equal(tokens.cpu().sort().values, best_pages(other, q.cpu(), 3, True).sort().values)

    @pytest.mark.parametrize("unit", DECODE_UNITS)
    def test_decoding_on_a_gpu_is_as_on_the_cpu(unit, model, ids):
        expected, wanted = decoded(model, ids, setting(unit))
        try:
            got, stats = decoded(model.cuda(), ids.cuda(), setting(unit))
        finally:
            model.cpu()
        assert stats.decode_density == pytest.approx(wanted.decode_density)
        assert (got.cpu() - expected).norm() / expected.norm() < 0.05
