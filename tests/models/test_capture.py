"""Captured queries, keys and values are what the stock attention function is called with."""

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparseland.models.capture import capture_qkv
from sparseland.models.surgery import attention_layers
from sparseland.models.tiny import TINY_ARCHITECTURES, tiny_model

SUPPORTED = sorted(set(TINY_ARCHITECTURES) - {"gemma2", "gpt_oss"})
# Longer than the local windows of Mistral (100) and Gemma 3 (64).
IDS = torch.randint(3, 128, (2, 130), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def seen_by_sdpa(model):
    """(q, k, v, scale) of every layer, noted by transformers' own SDPA function under another name."""
    notes = []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, q, k, v, *args, **kwargs):
        notes.append((q.clone(), k.clone(), v.clone(), kwargs["scaling"]))
        return sdpa(module, q, k, v, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    ALL_MASK_ATTENTION_FUNCTIONS.register("spy", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.config._attn_implementation = "spy"
    try:
        model(input_ids=IDS, use_cache=False)
    finally:
        model.config._attn_implementation = "sdpa"
    return notes


@pytest.mark.parametrize("arch", SUPPORTED)
def test_it_is_what_attention_saw(arch):
    """In the deep layers too: so the dense attention that is computed meanwhile is the model's own."""
    model = tiny_model(arch)
    expected = seen_by_sdpa(model)
    found = list(capture_qkv(model, IDS))
    assert [x.layer for x in found] == list(range(3))
    for x, (q, k, v, scale) in zip(found, expected, strict=True):
        assert x.scale == scale
        for got, want in ((x.q, q), (x.k, k), (x.v, v)):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
            # Two layers differ by far more than rounding.
            assert (want - expected[x.layer - 1][0][:, : want.shape[1]]).abs().max() > 0.1 or x.layer == 0


def test_only_the_asked_layers_come_in_their_order():
    model = tiny_model("llama")
    every = list(capture_qkv(model, IDS))
    some = list(capture_qkv(model, IDS, [2, 0]))
    assert [x.layer for x in some] == [0, 2]
    assert torch.equal(some[1].k, every[2].k)
    assert list(capture_qkv(model, IDS, [])) == []


def test_nothing_stays_on_the_model_not_even_after_an_error():
    model = tiny_model("llama")
    broken = model.model.layers[2].mlp

    def fail(*_):
        raise MemoryError

    def clean():
        return model.config._attn_implementation == "sdpa" and all(
            "_sparseland" not in vars(layer) for layer in attention_layers(model).values()
        )

    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    list(capture_qkv(model, IDS))
    assert clean()
    broken.forward = fail
    with pytest.raises(MemoryError):
        list(capture_qkv(model, IDS))
    del broken.forward
    assert clean()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_what_was_captured_is_no_view_of_anything():
    x, y = list(capture_qkv(tiny_model("llama"), IDS))[:2]
    before = y.k.clone()
    for t in (x.q, x.k, x.v):
        t.zero_()
        assert not t.requires_grad
    assert torch.equal(y.k, before)
