"""The controls: dense, sinks and window, random blocks, and the oracle."""

from __future__ import annotations

import math

import pytest
import torch

from sparseland.attention._controls import blocks_per_row
from sparseland.attention.dense import Dense
from sparseland.attention.oracle import Oracle, block_mass
from sparseland.attention.random_blocks import RandomBlocks
from sparseland.attention.streaming import Streaming
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, method_class, parse_spec

CONTROLS = (Streaming, RandomBlocks, Oracle)
# Whole prompt, odd length, chunks that do and do not start at a block's edge.
SHAPES = [(256, 256), (200, 200), (64, 192), (50, 211), (1, 130)]


def causal(n_queries: int, n_keys: int) -> torch.Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def true_attention(x: AttentionInputs) -> torch.Tensor:
    k = x.k.repeat_interleave(x.group, 1).double()
    logits = x.q.double() @ k.transpose(-1, -2) * x.scale
    return logits.masked_fill(~causal(x.q.shape[2], x.k.shape[2]), -torch.inf).softmax(-1)


@pytest.mark.parametrize("cls", [Dense, *CONTROLS])
def test_file_class_and_spec_agree(cls):
    assert method_class(cls.card.slug) is cls
    assert parse_spec(cls().spec) == cls()
    for setting in cls.grid(4096):
        assert parse_spec(setting.spec) == setting


@pytest.mark.parametrize("cls", CONTROLS)
def test_phase_sets_the_roles(cls):
    assert cls().roles == {"prefill"}
    assert cls(phase="decode").roles == {"select"}
    assert cls(phase="both").roles == {"prefill", "select"}
    with pytest.raises(SparselandError, match="one of prefill, decode, both"):
        cls(phase="sometimes")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("random-blocks:budget=0", "budget=0 is not allowed"),
        ("random-blocks:budget=1.5", "budget=1.5"),
        ("oracle:block_size=48", "16, 32, 64 or 128"),
        ("random-blocks:block_size=48", "16, 32, 64 or 128"),
        ("streaming:window=0", "window=0"),
        ("streaming:sink=4", "no parameter 'sink'"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)


# ------------------------------------------------------------------- prompts


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_dense_is_every_causal_pair(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries)
    assert torch.equal(Dense().pattern(x).mask()[0, 0], causal(n_queries, n_keys))


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_streaming_is_sinks_and_window(inputs, n_queries, n_keys):
    mask = Streaming(sinks=5, window=20).pattern(inputs(n_keys, n_queries=n_queries)).mask()[0, 0]
    for row in range(n_queries):
        i = n_keys - n_queries + row
        seen = {j for j in range(i + 1) if j < 5 or i - j < 20}
        assert set(mask[row].nonzero().flatten().tolist()) == seen


def visible_per_row(n_queries: int, n_keys: int, size: int) -> list[int]:
    starts = range(n_keys - n_queries, n_keys, size)
    return [(min(first + size, n_keys) - 1) // size + 1 for first in starts]


def test_a_budget_is_spent_evenly_and_completely():
    visible = list(range(1, 41))
    for budget in (0.05, 0.2, 1 / 3, 0.9, 1.0):
        counts = blocks_per_row(budget, visible)
        assert abs(sum(counts) - budget * sum(visible)) <= 1
        short = [c for c, n in zip(counts, visible, strict=True) if c < n]
        assert max(counts) - min(short, default=max(counts)) <= 1
    assert blocks_per_row(0.5, [4, 4, 4]) == [2, 2, 2]
    assert blocks_per_row(0.5, [5, 5]) == [2, 3]
    assert blocks_per_row(0.5, [1, 9, 10]) == [1, 5, 4]


@pytest.mark.parametrize("cls", [RandomBlocks, Oracle])
@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
@pytest.mark.parametrize("budget", [0.01, 1 / 3, 1.0])
def test_each_row_gets_the_budget(inputs, cls, n_queries, n_keys, budget):
    x = inputs(n_keys, n_queries=n_queries, batch=2)
    blocks = cls(budget=budget, block_size=16).pattern(x).block_mask()
    visible = visible_per_row(n_queries, n_keys, 16)
    counts = blocks_per_row(budget, visible)
    for row in range(blocks.shape[2]):
        first = n_keys - n_queries + 16 * row
        last = min(first + 15, n_keys - 1)
        forced = set(range(first // 16, last // 16 + 1)) | ({0} if cls is RandomBlocks else set())
        taken = blocks[:, :, row]
        assert (taken.sum(-1) == max(len(forced), counts[row])).all()
        assert taken[..., sorted(forced)].all()
        assert not taken[..., visible[row] :].any()
    if budget == 1.0:
        mask = cls(budget=budget, block_size=16).pattern(x).mask()
        assert torch.equal(mask, causal(n_queries, n_keys).expand_as(mask))


def test_random_blocks_depend_on_seed_layer_and_head_only(inputs):
    method = RandomBlocks(budget=0.25, block_size=16)
    a, b = (method.pattern(inputs(512, seed=s)).block_mask() for s in (0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a[:, 0], a[:, 1])
    assert not torch.equal(a, method.pattern(inputs(512, layer=1)).block_mask())
    other = RandomBlocks(budget=0.25, block_size=16, seed=1)
    assert not torch.equal(a, other.pattern(inputs(512)).block_mask())
    both = method.pattern(inputs(512, batch=2)).block_mask()
    assert torch.equal(both[0], a[0])
    assert torch.equal(both[1], a[0])


def test_random_blocks_draw_every_block_alike(inputs):
    x = inputs(1024, heads=64, kv_heads=64)
    last = RandomBlocks(budget=0.3, block_size=16).pattern(x).block_mask()[0, :, -1]
    free = last[:, 1:-1].double().mean(0)  # first and diagonal are forced
    drawn = int(last[0].sum()) - 2
    assert 5 < drawn < 30
    assert free.mean().item() == pytest.approx(drawn / 62)
    assert free.std().item() < 1.5 * math.sqrt(drawn / 62 * (1 - drawn / 62) / 64)


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_oracle_takes_the_blocks_with_most_mass(inputs, monkeypatch, n_queries, n_keys):
    # Few logits at once, so that the chunked path has several chunks.
    monkeypatch.setattr("sparseland.attention.oracle._CHUNK", 16 * n_keys * 4 * 3)
    x = inputs(n_keys, n_queries=n_queries, sharpness=3.0)
    p = true_attention(x)[0]
    got = Oracle(budget=1 / 3, block_size=16).pattern(x).block_mask()[0]
    counts = blocks_per_row(1 / 3, visible_per_row(n_queries, n_keys, 16))
    for head in range(4):
        for row in range(got.shape[1]):
            first = n_keys - n_queries + 16 * row
            last = min(first + 15, n_keys - 1)
            rows = p[head, 16 * row : 16 * row + 16]
            mass = {c: rows[:, 16 * c : 16 * c + 16].sum().item() for c in range(last // 16 + 1)}
            forced = set(range(first // 16, last // 16 + 1))
            wanted = max(len(forced), counts[row])
            rest = sorted(set(mass) - forced, key=lambda c: -mass[c])
            expected = forced | set(rest[: wanted - len(forced)])
            assert set(got[head, row].nonzero().flatten().tolist()) == expected


def test_oracle_measures_true_mass_and_beats_random(inputs):
    x = inputs(256, sharpness=3.0, batch=2)
    p = true_attention(x)
    mass = block_mass(x, 32)
    expected = p.unflatten(-1, (8, 32)).sum(-1).unflatten(-2, (8, 32)).sum(-2)
    assert torch.allclose(mass.double(), expected, atol=1e-4)
    kept = [
        (p * cls(budget=0.4, block_size=16).pattern(x).mask()).sum(-1).mean().item()
        for cls in (Oracle, RandomBlocks)
    ]
    assert kept[0] > kept[1] + 0.05


def test_oracle_finds_a_needle_and_streaming_does_not(inputs):
    x = inputs(512, heads=2, kv_heads=1)
    # Only the queries 300..315 look for key 100.
    x.k[:, :, 100] = 0
    x.k[:, :, 100, 0] = 40
    x.q[:, :, :, 0] = 0
    x.q[:, :, 300:316, 0] = 40
    needle = Oracle(budget=0.2, block_size=16).pattern(x).mask()[0, :, 305, 100]
    assert needle.all()
    assert not Streaming(sinks=8, window=64).pattern(x).mask()[0, 0, 305, 100]


@pytest.mark.parametrize("cls", CONTROLS)
@pytest.mark.parametrize("length", [640, 2000])
@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
def test_controls_meet_a_density(inputs, cls, length, density):
    method = cls.at_density(density, length)
    got = method.pattern(inputs(length, heads=2, kv_heads=1)).density()
    # Window and blocks come in steps.
    assert density - 1e-6 <= got.min()
    assert got.max() < density + (0.01 if cls is Streaming else 0.02)
    assert parse_spec(method.spec) == method


@pytest.mark.parametrize("cls", [Dense, *CONTROLS])
def test_the_full_budget_is_dense(inputs, cls):
    assert cls.full_budget(300).pattern(inputs(300)).density().min() == 1


# ------------------------------------------------------------------ decoding


def decode_step(method, x: AttentionInputs, first_key: torch.Tensor | None = None) -> torch.Tensor | None:
    """Select for the last token of ``x`` after a prompt and two more appends."""
    state = method.new_state(x.layer)
    for part in x.k.split([x.k.shape[2] - 3, 2, 1], dim=2):
        method.append(state, part)
    assert len(state) == x.k.shape[2]
    last = AttentionInputs(x.q[:, :, -1:], x.k, x.v, x.scale, x.layer)
    return method.select(state, last, first_key)


def chosen(index: torch.Tensor, row: int, head: int) -> list[int]:
    return [i for i in index[row, head].tolist() if i >= 0]


@pytest.mark.parametrize("n", [40, 101])
def test_streaming_decodes_with_sinks_and_window(inputs, n):
    x = inputs(n, batch=2)
    first = torch.tensor([0, n - 25])
    index = decode_step(Streaming(sinks=6, window=20), x, first)
    assert index.shape[:2] == (2, 2)
    for row, start in enumerate(first.tolist()):
        expected = {j for j in range(start, n) if j - start < 6 or n - 1 - j < 20}
        got = chosen(index, row, 0)
        assert len(got) == len(set(got))
        assert set(got) == expected


@pytest.mark.parametrize("cls", [RandomBlocks, Oracle])
@pytest.mark.parametrize("budget", [0.05, 1 / 3])
def test_decode_budget_counts_valid_tokens(inputs, cls, budget):
    x = inputs(101, batch=2)
    first = torch.tensor([0, 80])
    index = decode_step(cls(budget=budget, phase="decode"), x, first)
    for row, start in enumerate(first.tolist()):
        for head in range(4):
            got = chosen(index, row, head)
            assert len(got) == len(set(got)) == max(1, math.ceil(budget * (101 - start)))
            assert min(got) >= start
            if cls is RandomBlocks:
                assert 100 in got


@pytest.mark.parametrize("cls", CONTROLS)
def test_full_budget_reads_everything(inputs, cls):
    full = cls(phase="both", **({"window": 101} if cls is Streaming else {"budget": 1}))
    assert decode_step(full, inputs(101)) is None


def test_oracle_decodes_the_largest_products(inputs):
    x = inputs(90, batch=2)
    index = decode_step(Oracle(budget=0.1, phase="decode"), x)
    for row in range(2):
        for head in range(4):
            product = x.k[row, head // 2] @ x.q[row, head, -1]
            assert set(chosen(index, row, head)) == set(product.topk(9).indices.tolist())


def test_random_decode_ignores_padding_and_changes_with_the_step(inputs):
    method = RandomBlocks(budget=0.2, phase="decode")
    alone = decode_step(method, inputs(70))
    padded = decode_step(method, inputs(101), torch.tensor([31]))
    assert sorted(chosen(alone, 0, 1)) == [i - 31 for i in sorted(chosen(padded, 0, 1))]
    assert chosen(alone, 0, 0) != chosen(alone, 0, 1)
    assert set(chosen(decode_step(method, inputs(71)), 0, 0)) != set(chosen(alone, 0, 0))


@pytest.mark.parametrize("cls", CONTROLS)
def test_state_follows_cropping_and_beams(inputs, cls):
    method = cls(phase="decode", **({"sinks": 2, "window": 8} if cls is Streaming else {"budget": 0.2}))
    x = inputs(60, batch=2)
    state = method.new_state(0)
    method.append(state, x.k)
    state.crop(50)
    state.reorder(torch.tensor([1, 1]))
    assert len(state) == 50
    swapped = AttentionInputs(*(t[[1, 1]][:, :, :50] for t in (x.q, x.k, x.v)), x.scale, 0)
    last = AttentionInputs(swapped.q[:, :, -1:], swapped.k, swapped.v, x.scale, 0)
    index = method.select(state, last)
    assert torch.equal(index, decode_step(method, swapped))
    assert index.max() < 50
