"""Tensors of more than 2^31 elements: offsets inside kernels must not overflow. About 100 GB on a GPU."""

from dataclasses import replace

import pytest
import torch

from sparseland.ops.attend import attend
from sparseland.ops.bitmap_cache import bitmap_decode, compress
from sparseland.ops.channel_labels import label_scores, new_labels, write_labels
from sparseland.ops.gather_decode import dense_decode, gather_decode
from test_contract import PREFILL, inputs, pattern_of, sparse_setting

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 100e9,
        reason="needs a GPU with 100 GB of memory",
    ),
]
BATCH, HEADS, N, DIM = 8190, (8, 4), 1088, 64


@pytest.mark.parametrize("slug", [s for s in PREFILL if s != "oracle"])  # whose scores alone are 300 GB
def test_the_last_row_is_what_it_is_alone(slug):
    alone = inputs(N, N, heads=HEADS, dim=DIM, dtype=torch.bfloat16)
    alone = replace(alone, **{name: getattr(alone, name).cuda() for name in "qkv"})
    x = replace(alone, **{name: stacked(getattr(alone, name)) for name in "qkv"})
    assert all(getattr(x, name).numel() > 2**31 for name in "qkv")
    method = sparse_setting(slug)
    for got, want in zip(prefill(method, x), prefill(method, alone), strict=True):
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def labels(q, k, v):
    """A step of Double Sparsity: labels, scores."""
    channels = torch.arange(0, DIM, 4, device="cuda").expand(HEADS[0], -1)
    rows, ranges = new_labels(k, channels, 4, k.shape[2])
    write_labels(k, channels, 4, rows, ranges, 0)
    return label_scores(q, channels, 4, rows, ranges)


def packed(q, k, v):
    return bitmap_decode(q, compress(k, 32), compress(v, 32))


def chosen(q, k, v):
    """Every third cached token."""
    index = torch.arange(0, k.shape[2], 3, device="cuda").expand(q.shape[0], q.shape[1], -1)
    return gather_decode(q, k, v, index)


@pytest.mark.parametrize("step", [dense_decode, chosen, packed, labels], ids=lambda f: f.__name__)
def test_a_decoding_step_of_the_last_row(step):
    x = inputs(1, 65_600, heads=HEADS, dim=DIM, dtype=torch.bfloat16)
    alone = [getattr(x, name).cuda() for name in "qkv"]
    many = [stacked(t, 130) for t in alone]
    assert many[1].numel() > 2**31
    torch.testing.assert_close(step(*many)[-1:], step(*alone), rtol=3e-2, atol=3e-2)


def stacked(row, batch=BATCH):
    """Other rows before it, so that one read in its place shows."""
    many = row.new_empty(batch, *row.shape[1:])
    many[:-1] = row.flip(2)
    many[-1:] = row
    return many


def prefill(method, x):
    """The last row's output and gradients."""
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    with torch.no_grad():
        pattern = pattern_of(method, x)
    out = attend(q, k, v, pattern, scale=x.scale)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return [t[-1:].detach().float() for t in (out, *gradients)]
