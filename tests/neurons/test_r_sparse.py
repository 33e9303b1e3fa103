"""R-Sparse: exact ends of its two budgets, calibrated density, planted structure, and undoing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparseland.errors import SparselandError
from sparseland.method import Calibration, parse_spec
from sparseland.models.surgery import decoder_linears, replace_module
from sparseland.neurons.r_sparse import RSparse, RSparseLinear, low_rank, quantile

IN, OUT = 48, 32


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_linear(bias: bool = True, seed: int = 0, n_in: int = IN, n_out: int = OUT) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(n_in, n_out, bias=bias)


def calibrated(method: RSparse, linear: nn.Linear, x: Tensor, name: str = "linear") -> Calibration:
    """What calibrate() finds for one layer with inputs ``x [N, in]``."""
    scale = linear.weight.detach().norm(dim=0) if method.alpha < 1 else torch.ones(linear.in_features)
    tensors = {f"{name}.threshold": quantile(x.abs() * scale, method.mask_sparsity)}
    if rank := method.rank(linear.in_features, linear.out_features):
        tensors[f"{name}.A"], tensors[f"{name}.B"] = low_rank(linear.weight, rank)
    return Calibration({"sparsity": method.sparsity, "alpha": method.alpha}, tensors)


def converted(method: RSparse, linear: nn.Linear, x: Tensor) -> RSparseLinear:
    return method.convert(linear, "linear", calibrated(method, linear, x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scope", ["decode", "all"])
def test_no_sparsity_is_dense(bias: bool, scope: str) -> None:
    linear = make_linear(bias)
    x = torch.randn(64, IN)
    want = linear(x)
    layer = converted(RSparse(sparsity=0.0, alpha=1.0, scope=scope), linear, x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
        torch.testing.assert_close(layer(x[:, None])[:, 0], want)
    assert layer.density() == 1.0


@pytest.mark.parametrize("n_out", [32, 80])
def test_full_rank_is_dense_under_any_mask(n_out: int) -> None:
    linear = make_linear(n_out=n_out)
    x = torch.randn(5, 1, IN)
    want = linear(x)
    for limit in (0.0, 0.3, 1.0, math.inf):
        factors = low_rank(linear.weight, min(IN, n_out))
        layer = RSparseLinear(linear, torch.full((IN,), limit), factors)
        with torch.no_grad():
            torch.testing.assert_close(layer(x), want, atol=2e-5, rtol=1e-4)
        layer.undo()


@pytest.mark.parametrize("alpha", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("scope", ["decode", "all"])
def test_output_is_the_papers_formula(alpha: float, scope: str) -> None:
    method = RSparse(sparsity=0.5, alpha=alpha, scope=scope)
    linear = make_linear()
    x = torch.randn(64, IN)
    calibration = calibrated(method, linear, x)
    layer = method.convert(linear, "linear", calibration)
    t = calibration.tensors["linear.threshold"].item()
    with torch.no_grad():
        for token in torch.randn(6, IN):
            want = linear.bias.clone()
            for i in range(IN):
                c = linear.weight[:, i].norm().item() if alpha < 1 else 1.0
                if abs(token[i].item()) * c > t:
                    want += linear.weight[:, i] * token[i]
                elif alpha < 1:
                    a, b = calibration.tensors["linear.A"], calibration.tensors["linear.B"]
                    want += a @ b[:, i] * token[i]
            torch.testing.assert_close(layer(token[None, None])[0, 0], want, atol=1e-5, rtol=1e-4)


def test_prompts_are_dense_unless_everything_is_sparse() -> None:
    linear = make_linear()
    x = torch.randn(2, 7, IN)
    want = linear(x).detach()
    method = RSparse(sparsity=0.5)
    decode = converted(method, linear, x.flatten(0, 1))
    with torch.no_grad():
        torch.testing.assert_close(decode(x), want)
        single = torch.cat([decode(x[:, i : i + 1]) for i in range(7)], dim=1)
        assert not torch.allclose(single, want, atol=1e-3)
        everything = converted(RSparse(sparsity=0.5, scope="all"), linear, x.flatten(0, 1))
        torch.testing.assert_close(everything(x), single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.8])
def test_density_on_the_calibration_tokens_is_the_budget(sparsity: float, alpha: float) -> None:
    method = RSparse(sparsity=sparsity, alpha=alpha, scope="all")
    linear = make_linear()
    x = torch.randn(100, IN)
    layer = converted(method, linear, x)
    layer(x)
    kept = float(layer._kept) / x.numel()
    assert abs(kept - (1 - sparsity) * alpha) <= 2 / x.numel()
    extra = method.rank(IN, OUT) * (IN + OUT) / (IN * OUT)
    assert layer.density() == pytest.approx(kept + extra)


def test_decode_density_is_counted_too() -> None:
    x = torch.randn(100, IN)
    layer = converted(RSparse(sparsity=0.5, alpha=1.0), make_linear(), x)
    assert layer.density() is None
    with torch.no_grad():
        layer(x[None])
        assert layer.density() is None  # a dense prompt is not a sparse token
        layer(torch.cat([torch.full((1, 1, IN // 4), 9.0), torch.zeros(1, 1, IN - IN // 4)], dim=-1))
    assert layer.density() == 0.25


def test_rank_budgets_follow_the_true_shapes() -> None:
    method = RSparse(sparsity=0.5, alpha=0.95)
    for n_in, n_out in ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096)):
        rank = method.rank(n_in, n_out)
        spent = int(n_in * 0.475) * n_out + rank * (n_in + n_out)
        assert 0 <= n_in * n_out * 0.5 - spent < n_in + n_out
    assert method.rank(4096, 1024) == 20
    assert RSparse(alpha=1.0).rank(4096, 4096) == 0
    assert RSparse(sparsity=0.5, alpha=0.0).rank(4096, 4096) == 1024


def test_error_falls_with_rank() -> None:
    linear = make_linear(bias=False)
    x = torch.randn(200, 1, IN)
    want = linear(x)
    errors = []
    for rank in (0, 2, 8, 16, 32):
        factors = low_rank(linear.weight, rank) if rank else None
        layer = RSparseLinear(linear, torch.full((IN,), 0.8), factors)
        errors.append((layer(x) - want).square().mean().item())
        layer.undo()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9 < errors[0]


def test_column_norms_are_those_of_the_svd() -> None:
    w = make_linear().weight.detach().double()
    _, s, vh = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close((vh.t() * s).norm(dim=1), w.norm(dim=0))


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
def test_low_rank_is_as_good_as_the_truncated_svd(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    w = torch.randn(shape)  # a flat spectrum: the hard case for subspace iteration
    for rank in (1, 4, 16):
        a, b = low_rank(w, rank)
        assert a.shape == (shape[0], rank)
        best = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()
        assert (w - a @ b).norm() <= 1.01 * best
    assert torch.equal(low_rank(w, 4)[0], low_rank(w, 4)[0])


def test_both_together_beat_either_alone_on_their_own_ground() -> None:
    """A rank-4 matrix plus heavy columns, inputs with few large entries: what the method is for."""
    torch.manual_seed(0)
    n = 128
    common = torch.randn(n, 4) @ torch.randn(4, n) / 4
    own = torch.randn(n, n) * 0.15
    linear = nn.Linear(n, n, bias=False)
    linear.weight.data = common + own
    x = torch.randn(400, n) * 0.3
    large = torch.rand(400, n) < 0.05
    x = torch.where(large, 6 * torch.randn(400, n), x)
    error = {}
    for alpha in (0.0, 0.5, 1.0):
        layer = converted(RSparse(sparsity=0.8, alpha=alpha, scope="all"), linear, x)
        error[alpha] = (layer(x) - x @ linear.weight.t()).square().mean().item()
        assert layer.density() == pytest.approx(0.2, abs=0.02)
        layer.undo()
    assert error[0.5] < 0.7 * error[1.0]
    assert error[0.5] < 0.7 * error[0.0]


def test_undo_restores_bits_and_layout() -> None:
    linear = make_linear()
    parameter, before = linear.weight, linear.weight.detach().clone()
    layer = converted(RSparse(), linear, torch.randn(64, IN))
    assert layer.weight is parameter
    assert layer.weight.t().is_contiguous()  # one copy, with its columns contiguous
    assert layer.weight.t().data_ptr() == parameter.data_ptr()
    assert torch.equal(linear.weight, before)
    layer.undo()
    assert linear.weight is parameter
    assert torch.equal(linear.weight, before)
    assert linear.weight.is_contiguous()


def test_gradients_match_the_masked_formula() -> None:
    linear = make_linear()
    x = torch.randn(1, 1, IN, requires_grad=True)
    layer = converted(RSparse(), linear, torch.randn(64, IN))
    layer(x).sum().backward()
    mask = x.detach().abs() > layer.threshold
    assert layer.A is not None
    assert layer.B is not None
    w = torch.where(mask[0, 0], linear.weight.detach(), layer.A @ layer.B)
    torch.testing.assert_close(x.grad[0, 0], w.sum(0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype: torch.dtype) -> None:
    linear = make_linear()
    x = torch.randn(64, IN)
    with torch.no_grad():
        want = converted(RSparse(), linear, x)(x[:8, None])
        half = make_linear().to(dtype)
        got = converted(RSparse(), half, x)(x[:8, None].to(dtype))
    assert got.dtype == dtype
    # A value at the threshold may fall on either side of it: compare the bulk.
    assert (got.float() - want).abs().median() < 0.01


def test_quantile_is_the_kth_smallest() -> None:
    scores = torch.randperm(1000).float().view(10, 100)
    assert quantile(scores, 0.0) == -math.inf
    assert quantile(scores, 0.25) == 249  # 250 values, 0 to 249, are not above it


# ----------------------------------------------------------------- a whole model


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_calibration_covers_every_decoder_linear_on_512_tokens() -> None:
    model = tiny_llama()
    method = RSparse(sparsity=0.4, alpha=0.9, scope="all")
    ids = torch.randint(0, 97, (3, 700))
    calibration = method.calibrate(model, ids)
    names = decoder_linears(model)
    assert len(names) == 2 * 7
    assert calibration.meta["tokens"] == 512
    assert {n.removesuffix(".threshold") for n in calibration.tensors if n.endswith(".threshold")} == set(
        names
    )
    assert not any(linear._forward_pre_hooks for linear in names.values())
    # Layer 0's q_proj sees the same inputs in the sparse model as in the dense: the budget is met.
    for name, linear in names.items():
        replace_module(model, name, method.convert(linear, name, calibration))
    with torch.no_grad():
        model(ids[:1, :512])
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert float(layer._kept) / layer._seen == pytest.approx(0.6 * 0.9, abs=1e-4)
    k_proj = model.get_submodule("model.layers.0.self_attn.k_proj")
    assert not torch.allclose(k_proj.threshold, layer.threshold)


def test_calibration_of_short_rows_uses_several() -> None:
    calibration = RSparse().calibrate(tiny_llama(), torch.randint(0, 97, (9, 100)))
    assert calibration.meta["tokens"] == 500


def test_spec_round_trip_grid_and_errors() -> None:
    method = parse_spec("r-sparse:sparsity=0.4,alpha=1,scope=all")
    assert method == RSparse(sparsity=0.4, alpha=1.0, scope="all")
    assert parse_spec(method.spec) == method
    assert len(set(RSparse.grid(4096))) >= 2
    linear = make_linear()
    with pytest.raises(SparselandError, match="sparsity=1"):
        RSparse(sparsity=1.0)
    with pytest.raises(SparselandError, match="needs a calibration"):
        RSparse().convert(linear, "linear", None)
    other = calibrated(RSparse(sparsity=0.3), linear, torch.randn(8, IN))
    with pytest.raises(SparselandError, match=r"made for sparsity=0\.3"):
        RSparse().convert(linear, "linear", other)
    with pytest.raises(SparselandError, match=r"lacks 'other\.threshold'"):
        RSparse().convert(linear, "other", calibrated(RSparse(), linear, torch.randn(8, IN)))
