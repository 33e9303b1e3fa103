"""What goes wrong in real use, for every method that acts on prompts: a right result or one clear line."""

import pytest
import torch

import sparseland as sl
from sparseland.method import AttentionInputs
from sparseland.models.tiny import tiny_model
from test_contract import PREFILL, inputs, learnt, pattern_of, run, sparse_setting

LENGTH = 450  # no multiple of any block


def changed(x, **tensors):
    return AttentionInputs(**{"q": x.q, "k": x.k, "v": x.v, **tensors}, scale=x.scale, layer=x.layer)


@pytest.mark.parametrize("slug", PREFILL)
class TestPrompts:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_one_bad_key_stays_with_those_that_see_it(self, slug, value):
        """Neither a crash nor NaN before the bad token."""
        x = inputs(LENGTH, LENGTH)
        k = x.k.clone()
        k[:, :, 300, 3] = value
        out = run(sparse_setting(slug), changed(x, k=k))
        assert out[:, :, :300].isfinite().all()

    def test_strided_inputs_give_what_dense_ones_give(self, slug):
        x = inputs(LENGTH, LENGTH)
        strided = {
            n: t.transpose(1, 2).contiguous().transpose(1, 2)
            for n, t in zip("qkv", (x.q, x.k, x.v), strict=True)
        }
        assert not strided["q"].is_contiguous()
        method = sparse_setting(slug)
        torch.testing.assert_close(run(method, changed(x, **strided)), run(method, x), rtol=1e-4, atol=1e-5)

    def test_scores_beyond_half_precision(self, slug):
        """Products above 65504 would overflow if they were summed in fp16."""
        x = inputs(LENGTH, LENGTH)
        q, k = (x.q * 40).half(), (x.k * 40).half()
        pattern = pattern_of(sparse_setting(slug), changed(x, q=q, k=k, v=x.v.half()))
        assert (pattern.pairs() > 0).all()
        wide = pattern_of(sparse_setting(slug), changed(x, q=q.float(), k=k.float()))
        share = float(pattern.density().mean() / wide.density().mean())
        assert 0.8 < share < 1.25

    def test_queries_that_start_in_the_middle_of_a_block(self, slug):
        """A cached prefix: the queries are the last of the keys."""
        x = inputs(77, LENGTH)
        out = run(sparse_setting(slug), x)
        assert out.isfinite().all()
        mask = pattern_of(sparse_setting(slug), x).mask()
        assert mask.any(-1).all()  # every query computes something
        assert not mask.triu(LENGTH - 77 + 1).any()


@pytest.mark.parametrize("slug", PREFILL)
def test_rows_of_very_different_lengths_in_one_batch(slug):
    model = tiny_model("llama", max_position_embeddings=1024)
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (2, 400), generator=g)
    mask = torch.ones_like(ids)
    mask[1, :380] = 0
    method = sparse_setting(slug)
    with torch.no_grad(), sl.apply(model, method, calibrations=learnt(method)):
        together = model(input_ids=ids, attention_mask=mask).logits[1, 380:]
        alone = model(input_ids=ids[1:, 380:]).logits[0]
    # Positions differ (padding shifts them), attention of a rotary model does not.
    assert together.isfinite().all()
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("slug", ["flexprefill", "minference", "streaming"])
def test_a_row_shorter_than_the_models_window_gets_the_method(slug):
    """In a batch whose longest row the window binds: as it would alone."""
    model = tiny_model("mistral", sliding_window=300, max_position_embeddings=1024)
    ids = torch.randint(3, 128, (2, 400), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :150] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), sl.apply(model, sparse_setting(slug), calibration_ids=ids[:1, :256]):
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=ids[1:, 150:]).logits
        long = model(input_ids=ids[:1]).logits
    torch.testing.assert_close(together[1, 150:], alone[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(together[0], long[0], rtol=2e-4, atol=2e-4)
