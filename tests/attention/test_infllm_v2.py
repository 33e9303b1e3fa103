"""InfLLM-V2: the paper's choice with loops, planted blocks, decoding that repeats prefill, and its limits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import sparseland as sl
from sparseland.attention.infllm_v2 import InfLLMV2
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, method_class, parse_spec
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.patterns import TokenBlockPattern, WindowPattern

SMALL = {"kernel": 8, "stride": 4, "block_size": 16, "window": 32, "topk": 3, "dense_len": 0}


def literal(x: AttentionInputs, m: InfLLMV2) -> torch.Tensor:
    """Key blocks per row, key head and query, by loops over the paper's definitions."""
    batch, kv_heads, n_keys = x.k.shape[:3]
    p, s, b, near = m.kernel, m.stride, m.block_size, math.ceil(m.window / m.block_size)
    q, k = x.q.double(), x.k.double()
    out = torch.zeros(batch, kv_heads, x.q.shape[2], math.ceil(n_keys / b), dtype=torch.bool)
    for row, hk, i in torch.cartesian_prod(*(torch.arange(n) for n in out.shape[:3])).tolist():
        position = x.offset + i
        own = position // b
        mask = out[row, hk, i]
        mask[max(0, own - near + 1) : own + 1] = True
        far = range(max(0, own - near + 1))
        if position + 1 < m.dense_len:
            mask[: len(far)] = True
            continue
        means = [k[row, hk, j : j + p].mean(0) for j in range(0, n_keys, s) if j + p - 1 <= position]
        total = torch.zeros(math.ceil(n_keys / s), dtype=torch.float64)
        if means:
            for head in range(hk * x.group, (hk + 1) * x.group):
                total[: len(means)] += (torch.stack(means) @ q[row, head, i] * x.scale).softmax(0)
        # Window j of the paper's pooling: five wide, every four, from one before the block's first.
        score = {
            block: max(
                float(total[j]) for j in range(len(total)) if j * s < b * block + b and j * s + p > b * block
            )
            for block in far
        }
        ranked = sorted(far, key=lambda block: (block >= m.init, -score[block], block))
        mask[ranked[: m.topk]] = True
    return out


@pytest.mark.parametrize(("n_queries", "n_keys"), [(97, 97), (33, 130), (1, 131)])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"init": 0, "topk": 1},
        {"window": 1, "init": 2},
        {"dense_len": 90},
        {"kernel": 4},
        {"topk": 2, "block_size": 32},
    ],
)
def test_selection_is_the_literal_algorithm(inputs, n_queries, n_keys, setting):
    x = inputs(n_keys, n_queries=n_queries, batch=2, heads=6, kv_heads=2, sharpness=3.0)
    method = InfLLMV2(**{**SMALL, "lse": "exact", **setting})
    pattern = method.pattern(x)
    if isinstance(pattern, WindowPattern):
        assert literal(x, method).all() or n_keys < method.dense_len
        return
    assert torch.equal(pattern.token_mask(), literal(x, method))


def test_selection_pools_five_windows_per_block():
    # The paper's sizes: block B is touched by the windows 4 B - 1 ... 4 B + 3.
    x = AttentionInputs(
        torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8), 1.0, 0
    )
    method = InfLLMV2(window=64, topk=1, init=0, dense_len=0, lse="exact")
    x.q[..., 0] = 8
    x.k[:, :, 64:80, 0] = 6  # the windows 3 (keys 48 to 79) and 4 (64 to 95) hold it, 3 also touches block 0
    taken = method.pattern(x).token_mask()[0, 0, -1]
    assert taken.nonzero().flatten().tolist() == [0, 6]  # equal maxima: the earlier block
    x.k[:, :, 80:96, 0] = 6
    assert method.pattern(x).token_mask()[0, 0, -1].nonzero().flatten().tolist() == [1, 6]


def test_heads_are_summed_after_their_softmax(inputs):
    x = inputs(256, heads=3, kv_heads=1)
    x.q[:], x.k[:] = 0, 0
    # One head is very sure of block 3; two are moderately sure of block 5: together more than it.
    x.k[:, :, 48:64, 0], x.k[:, :, 80:96, 1] = 8, 8
    x.q[:, 0, :, 0], x.q[:, 1:, :, 1] = 50, 4
    taken = {
        lse: InfLLMV2(**{**SMALL, "topk": 1, "init": 0, "lse": lse}).pattern(x).token_mask()[0, 0, -1]
        for lse in ("exact", "coarse")
    }
    assert taken["exact"].nonzero().flatten().tolist() == [5, 14, 15]
    # What is given up for one pass less: coarse means miss a peak, and the sharper head weighs too much.
    assert taken["coarse"].nonzero().flatten().tolist() == [3, 14, 15]


def test_a_planted_needle_is_found_by_the_whole_group(inputs):
    x = inputs(600, heads=6, kv_heads=2)
    x.k[:, 1, 208:224] = 3 * x.q[:, 4, -1:, :] / x.q[:, 4, -1:, :].norm()
    x.q[:, 4, -1] *= 8
    mask = InfLLMV2(**SMALL).pattern(x).mask()[0, :, -1, 208:224]
    assert mask[3:].all()
    assert not mask[:3].any()


def test_a_key_that_its_neighbours_cancel_is_missed(inputs):
    # What means hide is not found: the limit of every selection by pooled keys.
    x = inputs(600, heads=1, kv_heads=1)
    x.q[:], x.k[:] = 0.0, torch.randn(x.k.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    x.q[..., 0] = 20
    x.k[:, :, 200, 0] = 6
    found = InfLLMV2(**SMALL).pattern(x).mask()[0, 0, -1, 200]
    x.k[:, :, [199, 201], 0] = -6
    assert found
    assert not InfLLMV2(**SMALL).pattern(x).mask()[0, 0, -1, 200]


@pytest.mark.parametrize("full", [{"topk": 40}, {"window": 600}, {"dense_len": 601}])
def test_full_budgets_are_dense_with_equal_gradients(inputs, full):
    x = inputs(600, heads=4, kv_heads=2)
    pattern = InfLLMV2(**{**SMALL, **full}).pattern(x)
    assert isinstance(pattern, WindowPattern)
    assert pattern.density().min() == 1


def test_every_block_listed_is_dense_through_the_lists(inputs):
    # 17 of 19 blocks before the window may be listed: the kernels run, and early queries read all.
    x = inputs(330, heads=4, kv_heads=2)
    method = InfLLMV2(**{**SMALL, "topk": 18, "window": 16})
    pattern = method.pattern(x)
    assert isinstance(pattern, TokenBlockPattern)
    dense = WindowPattern.dense(330, 330)
    early = 19 * 16
    torch.testing.assert_close(
        attend(x.q, x.k, x.v, pattern, scale=x.scale)[:, :, :early],
        attend(x.q, x.k, x.v, dense, scale=x.scale)[:, :, :early],
    )


def test_gradients_are_those_of_the_masked_softmax(inputs):
    x = inputs(300, heads=4, kv_heads=2, sharpness=2.0)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    pattern = InfLLMV2(**SMALL).pattern(x)
    weight = torch.randn(x.q.shape, generator=torch.Generator().manual_seed(5))
    got = torch.autograd.grad((attend(*leaves, pattern, scale=x.scale) * weight).sum(), leaves)
    k, v = (t.repeat_interleave(2, 1) for t in leaves[1:])
    logits = (leaves[0] @ k.mT * x.scale).masked_fill(~pattern.mask(), -math.inf)
    expected = torch.autograd.grad(((logits.softmax(-1) @ v) * weight).sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_last_keys_have_no_mean_and_come_through_the_window(inputs):
    x = inputs(300, heads=2, kv_heads=1)
    for n in (300, 299, 293):
        y = AttentionInputs(x.q[:, :, :n], x.k[:, :, :n], x.v[:, :, :n], x.scale, 0)
        mask = InfLLMV2(**{**SMALL, "window": 8}).pattern(y).mask()
        assert mask[..., -1, n - n % 16 - 1 if n % 16 == 0 else n - n % 16 :].all()


def test_chunks_at_any_place_compute_the_same_pairs(inputs):
    x = inputs(300, heads=4, kv_heads=2, sharpness=3.0)
    method = InfLLMV2(**{**SMALL, "dense_len": 120})
    whole = method.pattern(x).mask()
    for start, end in ((0, 37), (37, 150), (150, 151), (151, 300)):
        y = AttentionInputs(x.q[:, :, start:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, 0)
        part = method.pattern(y).mask().expand(1, 4, -1, -1)
        assert torch.equal(part, whole[:, :, start:end, :end])


# ------------------------------------------------------------------ decoding


def step_tokens(method, state, x, first=None):
    """Per key head the set of tokens that one step reads, relative to the row's first."""
    index = method.select(state, x, first)
    if index is None:
        return None
    start = torch.zeros(x.k.shape[0], dtype=torch.long) if first is None else first
    rows = []
    for row in range(index.shape[0]):
        heads = [[t - int(start[row]) for t in head if t >= 0] for head in index[row].tolist()]
        assert all(len(h) == len(set(h)) for h in heads)
        rows.append([set(h) for h in heads])
    return rows


@pytest.mark.parametrize("lse", ["exact", "coarse"])
@pytest.mark.parametrize("dense_len", [0, 170])
def test_decoding_token_by_token_reads_what_prefill_reads(inputs, lse, dense_len):
    x = inputs(260, heads=4, kv_heads=2, batch=2, sharpness=3.0)
    method = InfLLMV2(**{**SMALL, "lse": lse, "dense_len": dense_len})
    mask = method.pattern(x).mask()[:, ::2]
    state = method.new_state(0)
    method.append(state, x.k[:, :, :50])
    method.observe(state, AttentionInputs(x.q[:, :, :50], x.k[:, :, :50], x.v[:, :, :50], x.scale, 0))
    selected = 0
    for n in range(51, 261):
        method.append(state, x.k[:, :, n - 1 : n])
        step = AttentionInputs(x.q[:, :, n - 1 : n], x.k[:, :, :n], x.v[:, :, :n], x.scale, 0)
        got = step_tokens(method, state, step)
        for row in range(2):
            for h in range(2):
                expected = set(mask[row, h, n - 1].nonzero().flatten().tolist())
                assert (set(range(n)) if got is None else got[row][h]) == expected
        selected += got is not None
    assert selected > 80
    # Incremental means are the prompt's means, bit for bit.
    alone = method.new_state(0)
    method.append(alone, x.k)
    alone.settle(x.k, None)
    assert torch.equal(alone.windows, state.windows)


def padded_inputs(inputs, pads, n=220):
    rows = [inputs(n - pad, heads=4, kv_heads=2, seed=i, sharpness=3.0) for i, pad in enumerate(pads)]
    q, k, v = (
        torch.cat(
            [
                torch.nn.functional.pad(getattr(r, name), (0, 0, pad, 0), value=7.0)
                for r, pad in zip(rows, pads, strict=True)
            ]
        )
        for name in "qkv"
    )
    return rows, AttentionInputs(q, k, v, rows[0].scale, 0)


@pytest.mark.parametrize("dense_len", [0, 150])
def test_rows_of_a_padded_batch_read_what_they_would_alone(inputs, dense_len):
    pads = [0, 13, 101]
    rows, x = padded_inputs(inputs, pads)
    first = torch.tensor(pads)
    method = InfLLMV2(**{**SMALL, "dense_len": dense_len})
    masks = [method.pattern(row).mask()[0, ::2] if row.k.shape[2] >= 16 else None for row in rows]
    state = method.new_state(0)
    for start, end in ((0, 150), (150, 170), (170, 171), *((n - 1, n) for n in range(172, 221))):
        method.append(state, x.k[:, :, start:end])
        part = AttentionInputs(x.q[:, :, start:end], x.k[:, :, :end], x.v[:, :, :end], x.scale, 0)
        if end - start > 1:
            method.observe(state, part, first)
            continue
        got = step_tokens(method, state, part, first)
        for row, pad in enumerate(pads):
            for h in range(2):
                mask = masks[row].expand(2, -1, -1) if masks[row].shape[0] == 1 else masks[row]
                assert got[row][h] == set(mask[h, end - 1 - pad].nonzero().flatten().tolist())


def test_state_follows_beams_crops_and_later_prompts(inputs):
    x = inputs(260, heads=4, kv_heads=2, batch=2, sharpness=3.0)
    method = InfLLMV2(**SMALL)
    mask = method.pattern(x).mask()[:, ::2]

    def check(state, n, rows):
        y = AttentionInputs(x.q[rows][:, :, n - 1 : n], x.k[rows][:, :, :n], x.v[rows][:, :, :n], x.scale, 0)
        got = step_tokens(method, state, y)
        for at, row in enumerate(rows):
            assert got[at][1] == set(mask[row, 1, n - 1].nonzero().flatten().tolist())

    def feed(state, start, end, rows):
        method.append(state, x.k[rows][:, :, start:end])
        assert len(state) == end

    both, swapped = [0, 1], [1, 1]
    state = method.new_state(0)
    feed(state, 0, 180, both)
    check(state, 180, both)
    before = state.nbytes()
    assert 0 < before < 180 * 2 * 2 * 16 * 4 / 2  # windows every fourth key and a short tail
    feed(state, 180, 200, both)  # a second prompt
    check(state, 200, both)
    state.crop(195)  # within the tail or not, the cache still has the keys
    feed(state, 195, 210, both)
    check(state, 210, both)
    state.crop(100)
    feed(state, 100, 130, both)
    check(state, 130, both)
    feed(state, 130, 131, both)
    state.crop(130)  # nothing but what was waiting
    feed(state, 130, 140, both)
    state.reorder(torch.tensor(swapped))
    check(state, 140, swapped)
    feed(state, 140, 141, swapped)
    check(state, 141, swapped)


def test_a_crop_beyond_the_tail_needs_the_keys(inputs):
    x = inputs(260, heads=4, kv_heads=2)
    method = InfLLMV2(**SMALL)
    state = method.new_state(0)
    method.append(state, x.k)
    state.settle(x.k, None)
    state.crop(200)
    method.append(state, x.k[:, :, 200:201])
    hidden = torch.full((1, 1, 1, 1), math.nan).expand(1, 2, 201, 16)
    with pytest.raises(SparselandError, match="cropped to 200 tokens, and its store does not give back"):
        state.settle(hidden, None)


def test_generation_uses_it_and_counts(inputs):
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (2, 200), generator=torch.Generator().manual_seed(0))
    method = InfLLMV2(**SMALL)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad(), sl.apply(model, method) as handle:
        whole = model(input_ids=ids).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        step = model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1]
        torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
        model.generate(input_ids=ids, **options)
        stats = handle.stats()
    assert stats.density < 0.7
    assert stats.decode_density < 0.6


def test_it_combines_with_a_pruned_cache():
    model = tiny_model("llama")
    ids = torch.randint(3, 128, (1, 200), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    outputs = []
    for store in ([], ["mustafar:sparsity=0"]):
        with torch.no_grad(), sl.apply(model, [InfLLMV2(**SMALL), *store]):
            outputs.append(model.generate(input_ids=ids, **options))
    assert torch.equal(*outputs)


# ------------------------------------------------------------------- faults


@pytest.mark.parametrize("lse", ["exact", "coarse"])
def test_a_key_that_is_not_a_number_shows_as_in_dense_attention(inputs, lse):
    x = inputs(300, heads=2, kv_heads=1)
    x.k[:, :, 134] = math.nan  # windows that hold it touch its own block only
    method = InfLLMV2(**SMALL, lse=lse)
    pattern = method.pattern(x)
    assert pattern.mask()[0, 0, 134:, 134].all()
    out = attend(x.q, x.k, x.v, pattern, scale=x.scale)
    assert torch.equal(out[0, 0].isnan().all(-1), torch.arange(300) >= 134)
    assert pattern.density().max() < 0.9
    state = method.new_state(0)
    method.append(state, x.k)
    assert 134 in step_tokens(method, state, replace(x, q=x.q[:, :, -1:]))[0][0]


def test_strided_inputs_and_half_precision(inputs):
    x = inputs(300, heads=4, kv_heads=2, sharpness=2.0)
    method = InfLLMV2(**SMALL)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x.q, x.k, x.v)]
    assert torch.equal(
        method.pattern(AttentionInputs(*strided, x.scale, 0)).token_mask(), method.pattern(x).token_mask()
    )
    half = [t.to(torch.bfloat16) for t in (x.q, x.k, x.v)]
    a, b = method.pattern(AttentionInputs(*half, x.scale, 0)).token_mask(), method.pattern(x).token_mask()
    assert (a == b).float().mean() > 0.97


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults():
    assert method_class("infllm-v2") is InfLLMV2
    default = InfLLMV2()
    assert (default.kernel, default.stride, default.block_size) == (32, 16, 64)
    assert (default.init, default.window, default.topk, default.dense_len) == (1, 2048, 64, 8192)
    method = parse_spec("infllm-v2:topk=32,window=1024,lse=exact")
    assert method == InfLLMV2(topk=32, window=1024, lse="exact")
    assert parse_spec(method.spec) == method
    for length in (300, 2048, 8192, 131_072):
        settings = InfLLMV2.grid(length)
        assert all(parse_spec(s.spec) == s for s in settings)
        assert [s.topk for s in settings] == sorted(s.topk for s in settings)
        assert all(s.dense_len < length and not s._reads_all(length) for s in settings)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("infllm-v2:kernel=24", "kernel=24 must be a multiple of stride=16"),
        ("infllm-v2:stride=24,kernel=48", "block_size=64 must be a multiple of stride=24"),
        ("infllm-v2:kernel=96", "kernel=96 must be at most block_size \\+ stride = 80"),
        ("infllm-v2:block_size=48", "block_size=48 is not allowed; it must be 16, 32, 64 or 128"),
        ("infllm-v2:init=65", "init=65 is above topk=64"),
        ("infllm-v2:topk=0", "topk=0 is not allowed"),
        ("infllm-v2:lse=rough", "lse=rough is not allowed; it must be one of exact, coarse"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)
