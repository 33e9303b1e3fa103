"""SALE: the equations by loops with exact estimates, a needle, what 4 bits cost, calibration."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from sparseland.attention.flexprefill import FlexPrefill
from sparseland.attention.sale import Sale
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, method_class, parse_spec
from sparseland.models.capture import capture_qkv
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from sparseland.ops.lowbit_scores import fast
from sparseland.patterns import BlockPattern, WindowPattern

HALF_PRODUCTS = fast._half_products
SHAPES = [(448, 448), (411, 411), (128, 400), (77, 371)]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared with a definition is multiplied in float32, whatever this CPU prefers."""
    monkeypatch.setattr(fast, "_half_products", lambda: False)


def sale(tau: float = 0.5, **options: float) -> Sale:
    return Sale(tau=tau, **{"dense_up_to": 0, **options})


def causal(n_queries: int, n_keys: int) -> torch.Tensor:
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)


def four_bits(x: torch.Tensor) -> torch.Tensor:
    """Each token rounded to fifteen levels."""
    step = x.abs().amax(-1, keepdim=True) / 7
    return (x / step).round() * step


def literal(x: AttentionInputs, head: int, tau: float, quantized: bool) -> torch.Tensor:
    """The computed 64 x 64 blocks of one head, tile by tile."""
    n_queries, n_keys = x.q.shape[2], x.k.shape[2]
    offset = n_keys - n_queries
    q, k = x.q[0, head].double(), x.k[0, head // x.group].double()
    k = k - k.mean(0)
    estimate = q @ k.T * x.scale
    if quantized:
        mean = q.mean(0)
        estimate = (four_bits(q - mean) @ four_bits(k).T + (k @ mean)[None]) * x.scale
    blocks = torch.zeros(-(-n_queries // 64), -(-n_keys // 64), dtype=torch.bool)
    for u in range(blocks.shape[0]):
        rows = range(64 * u, min(64 * u + 64, n_queries))
        tiles = math.ceil((offset + 64 * u + 64) / 32)
        between = max(0, (tiles - 1 - 4) // 4 * 4)  # whole segments of 128 keys
        for t in range(tiles):
            keep = t == 0 or t > between
            for i in rows:
                if keep:
                    break
                area = [j for j in range(offset + i + 1) if j < 32 or j >= 32 * (1 + between)]
                total = (k[area] @ q[i] * x.scale).exp().sum()
                keep = bool((estimate[i, 32 * t : 32 * t + 32].exp() / total > tau).any())
            if keep and 32 * t <= offset + rows[-1]:
                blocks[u, t // 2] = True
    return blocks


# ------------------------------------------------------------------ selection


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_selection_is_the_literal_algorithm(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries, heads=2, kv_heads=1)
    x.q.add_(0.5)
    x.k.add_(1.0)
    tau = 0.12
    got = sale(tau).pattern(x).block_mask()[0]
    for head in range(2):
        assert torch.equal(got[head], literal(x, head, tau, quantized=True)), f"head {head}"


def test_the_literal_case_keeps_some_and_leaves_some(inputs):
    x = inputs(448, heads=2, kv_heads=1)
    bounds = [sale(tau).pattern(x).density().mean() for tau in (1e30, 0.12, 1e-5)]
    assert bounds[0] + 0.02 < bounds[1] < bounds[2] - 0.02
    assert bounds[2] == 1


def test_four_bits_disagree_with_exact_scores_near_the_threshold_only(inputs):
    x = inputs(448, heads=2, kv_heads=1)
    x.k.add_(1.0)
    tau = 0.12
    got = sale(tau).pattern(x).block_mask()[0]
    for head in range(2):
        exact = [literal(x, head, t, quantized=False) for t in (tau * 2.0, tau / 2.0)]
        assert not (exact[0] & ~got[head]).any()  # twice the threshold is never missed
        assert not (got[head] & ~exact[1]).any()  # half of it never kept


@pytest.mark.parametrize(("n_queries", "n_keys"), SHAPES)
def test_thresholds_at_their_ends(inputs, n_queries, n_keys):
    x = inputs(n_keys, n_queries=n_queries)
    assert (sale(1e-5).pattern(x).density() == 1).all()
    assert isinstance(sale(0.0).pattern(x), WindowPattern)
    never = sale(1e30).pattern(x).mask()
    offset = n_keys - n_queries
    for i in range(n_queries):
        position, tiles = offset + i, math.ceil((offset + i // 64 * 64 + 64) / 32)
        start = 32 * (1 + max(0, (tiles - 5) // 4 * 4))
        # The sink's and the first local tile's blocks of 64 keys are computed whole.
        expected = [j for j in range(position + 1) if j < 64 or j >= start // 64 * 64]
        assert never[0, 0, i].nonzero().flatten().tolist() == expected


def test_products_as_this_cpu_prefers_them_differ_near_the_threshold_only(inputs, monkeypatch):
    x = inputs(448, heads=2, kv_heads=1)
    x.k.add_(1.0)
    wide, narrow = (sale(tau).pattern(x).block_mask() for tau in (0.12 / 1.1, 0.12 * 1.1))
    for half in (HALF_PRODUCTS, lambda: True):  # the default path, and the one that rounds
        monkeypatch.setattr(fast, "_half_products", half)
        got = sale(0.12).pattern(x).block_mask()
        assert not (narrow & ~got).any()
        assert not (got & ~wide).any()


def test_density_falls_with_tau_and_selections_are_nested(inputs):
    x = inputs(512)
    masks = [sale(tau).pattern(x).block_mask() for tau in (0.03, 0.08, 0.2, 1.0)]
    for many, few in pairwise(masks):
        assert not (few & ~many).any()
        assert few.sum() < many.sum()


def test_rows_of_a_batch_do_not_meet(inputs):
    x = inputs(400, batch=2)
    both = sale(0.12).pattern(x).block_mask()
    for row in range(2):
        alone = AttentionInputs(x.q[[row]], x.k[[row]], x.v[[row]], x.scale, 0)
        assert torch.equal(both[row], sale(0.12).pattern(alone).block_mask()[0])


# ---------------------------------------------------------- planted structure


def needle() -> AttentionInputs:
    """Flat attention, and one query that gives 5 % of its own to one far key."""
    g = torch.Generator().manual_seed(0)
    n, d = 1024, 16
    q, k = (0.3 * torch.randn(1, 1, n, d, generator=g) for _ in range(2))
    q[..., 0] = k[..., 0] = 0
    q[:, :, 700, 0], k[:, :, 300, 0] = 4, 4
    logits = (q[0, 0, 700] @ k[0, 0, :701].T) * 1.0
    # Bring the needle to 5 % of the row.
    others = logits[torch.arange(701) != 300].logsumexp(0)
    k[:, :, 300, 0] = float((others + math.log(0.05 / 0.95) - (q[0, 0, 700, 1:] @ k[0, 0, 300, 1:])) / 4)
    return AttentionInputs(q, k, torch.randn(1, 1, n, d, generator=g), 1.0, 0)


def test_a_needle_of_one_query_is_found_where_pooling_misses_it():
    x = needle()
    weights = (x.q[0, 0, 700] @ x.k[0, 0, :701].T).softmax(-1)
    assert weights[300] == pytest.approx(0.05, rel=1e-3)
    blocks = sale(0.05).pattern(x).block_mask()[0, 0]
    assert blocks[700 // 64, 300 // 64]
    assert blocks.double().sum() < 0.7 * causal(16, 16).sum()
    # Mean queries and mean keys dilute it by a thousand.
    pooled = FlexPrefill(gamma=0.5, tau=1.0, min_budget=16, block_size=64).pattern(x).block_mask()[0, 0]
    assert not pooled[700 // 64, 300 // 64]


def test_what_four_bits_lose_costs_density():
    """The admitted cost: a large component that no key answers to takes the levels of those that matter."""
    g = torch.Generator().manual_seed(0)
    k = 0.1 * torch.randn(1, 1, 512, 16, generator=g)
    k[..., 0] = 0
    q = 2.0 * torch.randint(0, 2, (1, 1, 512, 16), generator=g) - 1
    q[..., 0] *= 40
    q[..., 1:] *= 3  # rounded to the step of 40 / 7, almost twice what they are
    x = AttentionInputs(q, k, k, 1.0, 0)
    exact = literal(x, 0, 0.2, quantized=False).sum()
    assert sale(0.2).pattern(x).block_mask().sum() > exact


# ---------------------------------------------------------------------- faults


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q", "k"])
def test_bad_numbers_spoil_what_they_spoil_in_dense_attention(inputs, bad, where):
    x = inputs(400)
    (x.q if where == "q" else x.k)[0, 1, 100, 3] = bad
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(400, 400), scale=x.scale, backend="reference")
    pattern = sale(0.12).pattern(x)
    got = attend(x.q, x.k, x.v, pattern, scale=x.scale, backend="reference")
    assert torch.equal(got.isfinite(), dense.isfinite())
    assert pattern.density().min() < 1


def test_views(inputs):
    x = inputs(400)
    strided = AttentionInputs(*(t.mT.contiguous().mT for t in (x.q, x.k, x.v)), x.scale, 0)
    assert torch.equal(sale(0.12).pattern(strided).block_mask(), sale(0.12).pattern(x).block_mask())


def test_chunks_stay_near_the_whole_prompt(inputs):
    """Means are the call's own, so a later chunk may judge tiles otherwise, but few of them."""
    x = inputs(512)
    whole = sale(0.12).pattern(x).block_mask()[:, :, 4:]
    chunk = AttentionInputs(x.q[:, :, 256:], x.k, x.v, x.scale, 0)
    apart = sale(0.12).pattern(chunk).block_mask()
    assert 0 < (whole != apart).sum() < 0.1 * whole.sum() or torch.equal(whole, apart)


# ----------------------------------------------------------------- calibration


def test_calibration_halves_until_the_error_is_in_bound(inputs):
    x = inputs(512, heads=4, kv_heads=2)
    x.q[:, 1] *= 0.2
    method = sale(1.0, error_bound=0.8)
    tau = method.calibrate_layer(x, torch.full((4,), 1.0))
    dense = attend(x.q, x.k, x.v, WindowPattern.dense(512, 512), scale=x.scale)
    bound = 0.8 * 16 / 128 * 512

    def errors(taus: torch.Tensor) -> torch.Tensor:
        known = Calibration(tensors={"tau": taus[None]})
        out = attend(x.q, x.k, x.v, method.pattern(x, known), scale=x.scale)
        return (out - dense).abs().sum((0, 2, 3))

    assert (errors(tau) < bound).all()
    halved = tau < 1
    assert halved.any()
    assert (errors(torch.where(halved, 2 * tau, tau))[halved] >= bound).all()  # one step earlier was too far
    assert all(math.log2(t) % 1 == 0 for t in tau.tolist() if t)


def test_heads_that_cannot_be_in_bound_are_dense(inputs):
    x = inputs(512)
    tau = sale(0.008, error_bound=1e-9).calibrate_layer(x, torch.full((4,), 0.008))
    assert not tau.any()
    known = Calibration(tensors={"tau": tau[None]})
    assert (sale(0.008).pattern(x, known).density() == 1).all()


def test_calibration_of_a_model():
    model = tiny_model("llama", max_position_embeddings=1024)
    ids = torch.randint(3, 128, (2, 448), generator=torch.Generator().manual_seed(0))
    method = sale(0.5, error_bound=0.05)
    found = method.calibrate(model, ids)
    layers = list(capture_qkv(model, ids[:1]))
    assert found.tensors["tau"].shape == (len(layers), layers[0].q.shape[1])
    # Rows in turn, tau only falls.
    expected = layers[0]
    tau = method.calibrate_layer(expected, torch.full((expected.q.shape[1],), 0.5))
    tau = method.calibrate_layer(next(capture_qkv(model, ids[1:])), tau)
    assert torch.equal(found.tensors["tau"][0], tau)
    assert found.meta["dense_heads"] == (found.tensors["tau"] == 0).double().mean()


def test_a_calibration_of_another_model_is_refused(inputs):
    known = Calibration(tensors={"tau": torch.ones(2, 3)})
    with pytest.raises(SparselandError, match="tau for 2 layers of 3 heads; layer 0 has 4"):
        sale().pattern(inputs(400), known)
    with pytest.raises(SparselandError, match="N above dense_up_to=1024"):
        Sale().calibrate(torch.nn.Linear(1, 1), torch.zeros(1, 64, dtype=torch.long))


# ------------------------------------------------------------------ parameters


def test_card_spec_and_defaults(inputs):
    assert method_class("sale") is Sale
    default = Sale()
    assert (default.tau, default.error_bound, default.dense_up_to) == (0.008, 0.4, 1024)
    assert isinstance(default.pattern(inputs(1024, heads=1, kv_heads=1)), WindowPattern)
    assert isinstance(default.pattern(inputs(1025, heads=1, kv_heads=1)), BlockPattern)
    for length in (640, 2048, 8192, 131_072):
        settings = Sale.grid(length)
        assert [s.tau for s in settings] == sorted((s.tau for s in settings), reverse=True)
        assert all(parse_spec(s.spec) == s for s in settings)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sale:tau=-1", "tau=-1 is not allowed; it must be a number >= 0"),
        ("sale:error_bound=0", "error_bound=0"),
        ("sale:dense_up_to=-1", "dense_up_to=-1"),
        ("sale:theta=1", "no parameter 'theta'"),
    ],
)
def test_wrong_parameters_say_what_is_allowed(spec, words):
    with pytest.raises(SparselandError, match=words):
        parse_spec(spec)
