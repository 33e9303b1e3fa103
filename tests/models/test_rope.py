"""Queries and keys before RoPE, got back from those after it: against what the projections really gave."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import sparseland as sl
from sparseland.attention.dense import Dense
from sparseland.errors import SparselandError
from sparseland.method import Card, PrefillMethod
from sparseland.models import attention as models_attention
from sparseland.models import rope as rope_module
from sparseland.models.capture import capture_qkv
from sparseland.models.rope import NoRope, RotaryRope, find_ropes
from sparseland.models.surgery import attention_layers
from sparseland.models.tiny import TINY_ARCHITECTURES, tiny_model
from sparseland.ops.rotary import turn, turn_back
from sparseland.patterns import WindowPattern

SUPPORTED = sorted(set(TINY_ARCHITECTURES) - {"gemma2", "gpt_oss"})
IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}


def before_rope(model, ids):
    """(q, k) of every layer as they enter the rotation, noted by the modelling file's own function."""
    module = __import__(type(model).__module__, fromlist=["x"])
    stock, notes = module.apply_rotary_pos_emb, []

    def spy(q, k, *args, **kwargs):
        notes.append((q.clone(), k.clone()))
        return stock(q, k, *args, **kwargs)

    module.apply_rotary_pos_emb = spy
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        module.apply_rotary_pos_emb = stock
    return notes


@pytest.mark.parametrize("arch", SUPPORTED)
def test_it_gives_back_what_entered_the_rotation(arch):
    model = tiny_model(arch)
    notes = before_rope(model, IDS)
    positions = torch.arange(IDS.shape[1])
    for x in capture_qkv(model, IDS):
        if arch == "smollm3" and x.layer == 2:
            assert isinstance(x.rope, NoRope)
            assert torch.equal(x.rope.unrotate(x.q, positions), x.q)
            continue
        for after, before in zip((x.q, x.k), notes[x.layer], strict=True):
            got = x.rope.unrotate(after, positions)
            torch.testing.assert_close(got, before, rtol=1e-3, atol=1e-4 * float(before.abs().max()))
            assert (after - before).norm() > 0.1 * before.norm()  # it did turn
            torch.testing.assert_close(x.rope.rotate(got, positions), after, rtol=1e-3, atol=1e-4)


def test_layers_of_one_kind_share_and_kinds_differ():
    a, b, c = find_ropes(tiny_model("gemma3")).values()
    assert a is c
    assert (a.layer_type, b.layer_type) == ("sliding_attention", "full_attention")
    x = torch.ones(1, 1, 1, 16)
    assert not torch.allclose(a.rotate(x, torch.tensor([30])), b.rotate(x, torch.tensor([30])))


def test_yarn_scaling_is_divided_out():
    model = tiny_model("llama", rope_parameters=YARN)
    assert model.model.rotary_emb.attention_scaling > 1.1
    notes = before_rope(model, IDS)
    for x in capture_qkv(model, IDS):
        got = x.rope.unrotate(x.k, torch.arange(IDS.shape[1]))
        torch.testing.assert_close(got, notes[x.layer][1], rtol=1e-3, atol=1e-3)


def test_partial_rotary_leaves_the_other_channels():
    model = tiny_model("gpt_neox")
    (x, *_) = capture_qkv(model, IDS)
    turned = 2 * x.rope.tables(1, x.q)[0].shape[1]
    assert 0 < turned < x.q.shape[3]
    back = x.rope.unrotate(x.q, torch.arange(IDS.shape[1]))
    assert torch.equal(back[..., turned:], x.q[..., turned:])
    assert not torch.allclose(back[..., :turned], x.q[..., :turned])


def test_cached_keys_and_later_chunks():
    """Keys of any chunk come back by their own positions, whatever was computed with them."""
    model = tiny_model("llama")
    (x, *_) = capture_qkv(model, IDS)
    whole = x.rope.unrotate(x.k, torch.arange(40))
    torch.testing.assert_close(x.rope.unrotate(x.k[:, :, 17:29], torch.arange(17, 29)), whole[:, :, 17:29])
    one = x.rope.unrotate(x.k[:, :, 39:], torch.tensor([39]))
    torch.testing.assert_close(one, whole[:, :, 39:])


def test_rows_at_different_places():
    rope = find_ropes(tiny_model("llama"))[0]
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.stack((torch.arange(5), torch.arange(5) + 11))
    got = rope.rotate(x, positions)
    for row in range(2):
        torch.testing.assert_close(got[row : row + 1], rope.rotate(x[row : row + 1], positions[row]))
    torch.testing.assert_close(rope.unrotate(got, positions), x, rtol=1e-5, atol=1e-5)


def test_tables_are_the_module_and_grow():
    model = tiny_model("llama")
    rope = find_ropes(model)[0]
    like = torch.empty(0)
    short = rope.tables(10, like)
    long = rope.tables(3000, like)
    assert short[0].shape == (10, 8)
    assert long[1].shape == (3000, 8)
    assert torch.equal(long[0][:10], short[0])
    cos, sin = model.model.rotary_emb(like, torch.arange(3000)[None])
    assert torch.equal(long[0], cos[0, :, :8])
    assert torch.equal(long[1], sin[0, :, :8])
    x = torch.randn(1, 2, 3000, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(turn(x, *long), rope.rotate(x, torch.arange(3000)))
    torch.testing.assert_close(turn_back(turn(x, *long), *long), x, rtol=1e-4, atol=1e-5)


def test_a_bf16_model_turns_by_its_own_rounded_angles():
    model = tiny_model("llama").bfloat16()
    notes = before_rope(model, IDS)
    for x in capture_qkv(model, IDS):
        got = x.rope.unrotate(x.q, torch.arange(40))
        assert got.dtype == torch.bfloat16
        before = notes[x.layer][0].float()
        assert (got.float() - before).norm() / before.norm() < 0.01


def test_a_rotary_with_changing_frequencies_is_refused():
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(SparselandError, match=r"its RoPE \(dynamic\) changes with the length"):
        find_ropes(tiny_model("llama", rope_parameters=dynamic))


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    """Neighbouring channels turn together, as in GPT-J."""

    def rotated(x):
        a, b = x[..., ::2], x[..., 1::2]
        c, s = cos[:, None, :, ::2], sin[:, None, :, ::2]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)

    return rotated(q), rotated(k)


def test_another_kind_of_rotation_is_refused_and_capture_leaves_it_out(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(SparselandError, match="layer 0's queries and keys before RoPE can't be got back"):
        find_ropes(model)
    assert all(x.rope is None for x in capture_qkv(model, IDS))


@dataclass(frozen=True)
class Nosy(PrefillMethod):
    """Dense, but wants to see queries before RoPE."""

    needs_rope: ClassVar[bool] = True
    card: ClassVar[Card] = Dense.card
    seen: ClassVar[list] = []

    def pattern(self, x, calibration=None):
        self.seen.append(x.rope)
        return WindowPattern.dense(x.q.shape[2], x.k.shape[2])


@pytest.fixture
def nosy():
    Nosy.seen.clear()
    return Nosy()


def test_apply_hands_it_to_methods_that_ask(nosy):
    model = tiny_model("gemma3")
    with torch.no_grad(), sl.apply(model, nosy):
        model(input_ids=IDS)
    assert [r.layer_type for r in nosy.seen] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert all(isinstance(r, RotaryRope) for r in nosy.seen)
    nosy.seen.clear()
    with torch.no_grad(), sl.apply(model, "dense"):
        model(input_ids=IDS)
    assert nosy.seen == []


def test_apply_refuses_before_it_changes_anything(nosy, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    with pytest.raises(SparselandError, match="can't be got back"):
        sl.apply(model, nosy)
    assert model.config._attn_implementation == "sdpa"
    assert all(models_attention.ATTRIBUTE not in vars(layer) for layer in attention_layers(model).values())
    with sl.apply(model, "dense"):  # does not ask
        pass


def test_the_proof_fails_for_a_wrong_rope(monkeypatch):
    """Without the comparison with the projections, the turn forth and back would prove nothing."""
    model = tiny_model("llama")
    real = RotaryRope._cos_sin

    def wrong(self, like, positions):
        return real(self, like, positions + 1)

    monkeypatch.setattr(rope_module.RotaryRope, "_cos_sin", wrong)
    with pytest.raises(SparselandError, match="can't be got back"):
        find_ropes(model)


def other_model(model_type, **fields):
    small = {
        "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **small, **fields)).eval()


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama4_text", {"num_local_experts": 2, "intermediate_size_mlp": 96}),  # angles as complex numbers
        ("hunyuan_v1_dense", {}),  # normalised after the rotation
    ],
)
def test_a_rotation_that_is_not_understood_is_not_taken_for_none(model_type, fields):
    model = other_model(model_type, **fields)
    with pytest.raises(SparselandError, match="layer 0's queries and keys before RoPE can't be got back"):
        find_ropes(model)
    assert all(x.rope is None for x in capture_qkv(model, IDS))
