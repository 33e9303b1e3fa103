"""Every method's kernels on a GPU, and on another than the current one.

Under ``compute-sanitizer`` (``make gpu-memcheck``) the first half checks the kernels' memory accesses.
"""

import os
from dataclasses import replace

import pytest
import torch

import sparseland as sl
from sparseland.method import Calibration, method_slugs
from sparseland.models.tiny import tiny_model
from sparseland.ops.attend import attend
from test_contract import PREFILL, inputs, pattern_of, sparse_setting

pytestmark = pytest.mark.gpu
N = 1111  # no multiple of any block
# Thousands of launches take longer than the sanitizer has patience; `make gpu-memcheck` sets the variable.
SLOW_CALIBRATIONS = ("minference", "seer-attention")
SANITIZED = "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ


def prompt(dim, device):
    x = inputs(N, N, heads=(4, 2), dim=dim, dtype=torch.bfloat16)
    return replace(x, q=x.q.to(device), k=x.k.to(device), v=x.v.to(device))


def logits(slug, device):
    """A prompt and three steps of a tiny model."""
    model = tiny_model("llama", max_position_embeddings=1024).to(device)
    ids = torch.randint(3, 128, (1, 300), generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    known = {slug: Calibration()} if SANITIZED and slug in SLOW_CALIBRATIONS else {}
    with (
        torch.no_grad(),
        sl.apply(model, sparse_setting(slug), calibration_ids=ids[:, :256], calibrations=known),
    ):
        out = model(input_ids=ids, use_cache=True)
        for _ in range(3):
            found.append(out.logits[:, -1].float().cpu())
            token = ids[:, :1]
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return torch.stack(found)


@pytest.fixture(params=[0, 1], ids=["first", "second"])
def device(request):
    if torch.cuda.device_count() <= request.param:
        pytest.skip(f"needs {request.param + 1} GPUs")
    assert torch.cuda.current_device() == 0
    return f"cuda:{request.param}"


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("slug", PREFILL)
def test_prompts(slug, dim, device, monkeypatch):
    x = prompt(dim, device)
    pattern = pattern_of(sparse_setting(slug), x)
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    out = attend(q, k, v, pattern, scale=x.scale)
    out.float().square().sum().backward()
    assert out.device == x.q.device
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    monkeypatch.setenv("SPARSELAND_BACKEND", "reference")
    expected = attend(x.q.float(), x.k.float(), x.v.float(), pattern, scale=x.scale)
    torch.testing.assert_close(out.float(), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("slug", [s for s in method_slugs() if s not in ("dense", "oracle")])
def test_models(slug, device):
    found = logits(slug, device)
    assert found.isfinite().all()
    torch.testing.assert_close(found, logits(slug, "cuda:0"), rtol=2e-2, atol=2e-2)
