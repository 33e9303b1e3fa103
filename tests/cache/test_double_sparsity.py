"""Double Sparsity: selection against a literal transcription, labels in few bits, and what it must miss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sparseland.cache.double_sparsity import DoubleSparsity, LabelState
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, parse_spec

B, HQ, HKV, N, D = 2, 6, 2, 100, 16
LAYER = 3


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_calibration(seed: int = 0, heads: int = HQ, kv_heads: int = HKV, dim: int = D) -> Calibration:
    g = torch.Generator().manual_seed(seed)
    statistics = {"q": heads, "k": kv_heads, "qk": heads}
    tensors = {f"layer.{LAYER}.{name}": torch.rand(h, dim, generator=g) for name, h in statistics.items()}
    return Calibration({}, tensors)


def make_inputs(
    seed: int = 0, n: int = N, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, HQ, 1, D, generator=g).to(dtype)
    k, v = (torch.randn(B, HKV, n, D, generator=g).to(dtype) for _ in range(2))
    return q, k, v


def filled(method: DoubleSparsity, k: Tensor, calibration: Calibration, chunks: int = 3) -> LabelState:
    state = method.new_state(LAYER, calibration)
    for part in k.chunk(chunks, dim=2):
        method.append(state, part)
    return state


def select(
    method: DoubleSparsity, q: Tensor, k: Tensor, calibration: Calibration, first: Tensor | None = None
):
    # Keys and values are poison: a selection that read them would show it.
    poison = torch.full_like(k, float("nan"))
    x = AttentionInputs(q, poison, poison, D**-0.5, LAYER)
    return method.select(filled(method, k, calibration), x, first)


def small(**params) -> DoubleSparsity:
    return DoubleSparsity(**{"min_tokens": 1, "min_length": 0, "dense_layers": 0, **params})


def fake_quantise(row: Tensor, bits: int) -> Tensor:
    """One label row rounded as the paper's code rounds it (range kept in half precision)."""
    low, high = row.min().item(), row.max().item()
    step = (high - low) / (2**bits - 1) or 1.0
    low, step = torch.tensor([low, step]).half().tolist()
    return torch.tensor(
        [low + step * min(2**bits - 1, max(0, round((x - low) / step))) for x in row.tolist()]
    )


def literal_scores(
    method: DoubleSparsity, q: Tensor, k: Tensor, calibration: Calibration, b: int, h: int
) -> Tensor:
    """Steps 2 to 4 of the decode loop for one query head, key by key."""
    kv = h // (HQ // HKV)
    statistic = calibration.tensors[f"layer.{LAYER}.{method.metric}"]
    row = statistic[kv] if method.metric == "k" else statistic[h]
    order = sorted(range(D), key=lambda c: -row[c].item())[: round(method.channels * D)]
    q_label = q[b, h, 0, order]
    scores = []
    for token in range(k.shape[2]):
        k_label = k[b, kv, token, order]
        if method.bits < 16:
            k_label = fake_quantise(k_label, method.bits)
        scores.append((q_label * k_label).sum() / math.sqrt(len(order)))
    return torch.stack(scores)


@pytest.mark.parametrize("metric", ["q", "k", "qk"])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_selection_is_the_papers(metric: str, bits: int) -> None:
    method = small(budget=1 / 8, metric=metric, bits=bits, channels=3 / 8)  # 6 channels: bytes are not full
    q, k, _ = make_inputs()
    calibration = make_calibration()
    index = select(method, q, k, calibration)
    assert index.shape == (B, HQ, math.ceil(N / 8))
    for b in range(B):
        for h in range(HQ):
            scores = literal_scores(method, q, k, calibration, b, h)
            chosen = index[b, h]
            assert chosen.unique().numel() == chosen.numel()
            # Not compared as sets: coarse labels tie, and any of the tied tokens is right.
            torch.testing.assert_close(
                scores[chosen].sort().values,
                scores.topk(chosen.numel()).values.sort().values,
                atol=1e-4,
                rtol=1e-4,
            )


def test_all_channels_unrounded_is_exact_top_k() -> None:
    q, k, _ = make_inputs()
    index = select(small(budget=0.1, channels=1.0, bits=16), q, k, make_calibration())
    logits = q @ k.repeat_interleave(HQ // HKV, 1).transpose(-1, -2)
    want = logits[:, :, 0].topk(index.shape[-1]).indices
    assert torch.equal(index.sort().values, want.sort().values)


@pytest.mark.parametrize("group", ["mean", "max"])
def test_group_selects_per_key_head_by_pooled_scores(group: str) -> None:
    q, k, _ = make_inputs()
    index = select(small(budget=0.1, channels=1.0, bits=16, group=group), q, k, make_calibration())
    logits = (q @ k.repeat_interleave(HQ // HKV, 1).transpose(-1, -2))[:, :, 0].unflatten(1, (HKV, -1))
    pooled = logits.mean(2) if group == "mean" else logits.amax(2)
    assert index.shape[1] == HKV
    assert torch.equal(index.sort().values, pooled.topk(index.shape[-1]).indices.sort().values)


def test_sharing_inside_a_group_shrinks_the_labels() -> None:
    _, k, _ = make_inputs()
    per_head = filled(small(), k, make_calibration()).nbytes()
    shared = filled(small(group="mean"), k, make_calibration()).nbytes()
    assert shared * (HQ // HKV) == per_head


@pytest.mark.parametrize("metric", ["q", "k", "qk"])
def test_planted_key_is_found(metric: str) -> None:
    q, k, _ = make_inputs()
    q = q[:, :: HQ // HKV].repeat_interleave(HQ // HKV, 1)  # one direction per group
    k[:, :, 41] = 8 * q[:, :: HQ // HKV, 0]
    index = select(small(budget=1 / 16, metric=metric), q, k, make_calibration())
    assert (index == 41).any(-1).all()


def test_key_that_stands_out_only_outside_the_label_is_missed() -> None:
    q, k, _ = make_inputs()
    q = q.abs() + 1
    calibration = make_calibration()
    method = small(budget=1 / 16, metric="k")
    outside = calibration.tensors[f"layer.{LAYER}.k"].argsort(descending=True)[:, D // 4 :]
    k[:, :, 41] = -5.0
    k[:, :, 41].scatter_(-1, outside.expand(B, -1, -1), 50.0)
    exact = (q @ k.repeat_interleave(HQ // HKV, 1).transpose(-1, -2))[:, :, 0].argmax(-1)
    assert (exact == 41).all()
    assert not (select(method, q, k, calibration) == 41).any()


def test_full_budget_reads_everything() -> None:
    q, k, _ = make_inputs()
    assert select(small(budget=1.0), q, k, make_calibration()) is None
    assert select(small(min_tokens=N), q, k, make_calibration()) is None
    assert select(small(min_length=N + 1), q, k, make_calibration()) is None
    assert select(small(min_length=N), q, k, make_calibration()) is not None
    assert select(small(dense_layers=LAYER + 1), q, k, make_calibration()) is None


def test_more_bits_keep_more_of_the_true_top() -> None:
    recall = {}
    for bits in (2, 4, 8, 16):
        hits = []
        for seed in range(8):
            q, k, _ = make_inputs(seed)
            calibration = make_calibration(seed)
            index = select(small(budget=0.1, channels=0.5, bits=bits), q, k, calibration)
            logits = (q @ k.repeat_interleave(HQ // HKV, 1).transpose(-1, -2))[:, :, 0]
            hits.append(
                (index[..., None] == logits.topk(index.shape[-1]).indices[:, :, None]).any(-1).double().mean()
            )
        recall[bits] = torch.stack(hits).mean().item()
    assert recall[2] < recall[4] <= recall[8]
    assert abs(recall[8] - recall[16]) < 0.02
    assert recall[4] > 2 * 0.1  # far above a random tenth


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_labels_are_stored_in_their_bits(bits: int) -> None:
    _, k, _ = make_inputs()
    state = filled(small(bits=bits, channels=0.5), k, make_calibration())
    per_row = D // 2 * bits // 8 + 4  # packed codes, and a float16 minimum and step
    assert state.nbytes() == B * HQ * N * per_row
    assert state.rows.dtype == torch.uint8


@pytest.mark.parametrize("group", ["head", "mean"])
@pytest.mark.parametrize("min_length", [0, 80])
def test_left_padded_rows_select_what_they_select_alone(group: str, min_length: int) -> None:
    method = small(budget=0.1, min_tokens=4, group=group, min_length=min_length)
    q, k, _ = make_inputs()
    calibration = make_calibration()
    first = torch.tensor([0, 37])
    k[1, :, :37] = 1e3  # padding that would win every comparison
    index = select(method, q, k, calibration, first)
    for row in range(B):
        start = int(first[row])
        alone = select(method, q[row : row + 1], k[row : row + 1, :, start:], calibration)
        length = N - start
        for h in range(index.shape[1]):
            got = sorted(i for i in index[row, h].tolist() if i >= 0)
            want = range(length) if alone is None else alone[0, h].tolist()
            assert got == sorted(i + start for i in want)


@pytest.mark.parametrize("bits", [4, 16])
def test_state_follows_growth_reorder_and_crop(bits: int) -> None:
    method = small(budget=0.1, bits=bits)
    q, k, _ = make_inputs()
    calibration = make_calibration()
    state = method.new_state(LAYER, calibration)
    method.append(state, k[:, :, :60])
    method.append(state, torch.full_like(k[:, :, :9], 77.0))
    state.crop(60)
    for token in range(60, N):
        method.append(state, k[:, :, token : token + 1])
    assert len(state) == N
    whole = filled(method, k, calibration, chunks=1)
    assert torch.equal(state.scores(q), whole.scores(q))
    state.reorder(torch.tensor([1, 1]))
    swapped = filled(method, k[[1, 1]], calibration, chunks=1)
    assert torch.equal(state.scores(q), swapped.scores(q))


def test_channels_may_be_permuted_together() -> None:
    q, k, _ = make_inputs()
    calibration = make_calibration()
    order = torch.randperm(D)
    permuted = Calibration({}, {name: t[:, order] for name, t in calibration.tensors.items()})
    index = select(small(), q, k, calibration)
    other = select(small(), q[..., order], k[..., order], permuted)
    assert torch.equal(index.sort().values, other.sort().values)


def test_bf16_selects_nearly_as_fp32() -> None:
    q, k, _ = make_inputs()
    calibration = make_calibration()
    want = select(small(budget=0.2, bits=16), q, k, calibration)
    got = select(small(budget=0.2, bits=16), q.bfloat16(), k.bfloat16(), calibration)
    same = (got[..., None] == want[:, :, None]).any(-1).double().mean()
    assert same > 0.95


if torch.cuda.is_available():  # elsewhere there is nothing to collect

    @pytest.mark.gpu
    @pytest.mark.parametrize("bits", [4, 16])
    def test_gpu_scores_are_the_cpus(bits: int) -> None:
        q, k, _ = make_inputs(dtype=torch.bfloat16)
        method = small(bits=bits)
        want = filled(method, k, make_calibration()).scores(q)
        got = filled(method, k.cuda(), make_calibration()).scores(q.cuda())
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.cpu(), want, atol=1e-3, rtol=1e-3)
        first = torch.tensor([0, 37])
        x = AttentionInputs(q.cuda(), k.cuda(), k.cuda(), 1.0, LAYER)
        index = method.select(filled(method, k.cuda(), make_calibration()), x, first.cuda())
        assert (index[1] >= 37).logical_or(index[1] == -1).all()


# -------------------------------------------------------------------- calibration


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_calibration_is_the_mean_over_all_tokens() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 97, (2, 600))  # two rows of 512 + 88 tokens
    calibration = DoubleSparsity().calibrate(model, ids)
    outputs: list[Tensor] = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda m, a, out: outputs.append(out[0])
    )
    with torch.no_grad():
        for row in ids:
            for block in row.split(512):
                model(block[None])
    handle.remove()
    want = torch.cat(outputs).abs().mean(0).view(4, 16)
    torch.testing.assert_close(calibration.tensors["layer.1.q"], want)
    assert calibration.meta == {"tokens": 1200, "position": "pre-RoPE"}
    assert calibration.tensors["layer.1.k"].shape == (2, 16)
    # The last block alone, which the authors' script is left with, is another statistic.
    last = DoubleSparsity().calibrate(model, ids[1:, 512:])
    assert not torch.allclose(last.tensors["layer.1.qk"], calibration.tensors["layer.1.qk"])


def test_calibration_reads_normalised_heads_after_rope() -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    calibration = DoubleSparsity().calibrate(model, torch.randint(0, 97, (1, 40)))
    assert calibration.meta["position"] == "post-RoPE"
    assert calibration.tensors["layer.0.q"].shape == (4, 16)
    assert not model.model.layers[0].self_attn.q_proj._forward_hooks


# ------------------------------------------------------------------- specs, errors


def test_spec_round_trip_and_errors() -> None:
    method = parse_spec("double-sparsity:budget=1/32,metric=qk,group=mean")
    assert method == DoubleSparsity(budget=1 / 32, metric="qk", group="mean")
    assert parse_spec(method.spec) == method
    with pytest.raises(SparselandError, match="bits=3 is not allowed; it must be 2, 4, 8 or 16"):
        DoubleSparsity(bits=3)
    with pytest.raises(SparselandError, match="metric=v"):
        DoubleSparsity(metric="v")
    with pytest.raises(SparselandError, match="needs a calibration"):
        DoubleSparsity().new_state(LAYER, None)
    with pytest.raises(SparselandError, match="knows no layer 7"):
        DoubleSparsity().new_state(7, make_calibration())


def test_grid_holds_distinct_settings_that_do_something() -> None:
    for length in (600, 2048, 131072):
        settings = DoubleSparsity.grid(length)
        assert len(set(settings)) == 3
        assert all(m._wanted(length) < length for m in settings)
