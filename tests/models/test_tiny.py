"""The tiny models: seeded, of the architecture they are named for, and with attention worth testing."""

import pytest
import torch

from sparseland.errors import SparselandError
from sparseland.models.capture import capture_qkv
from sparseland.models.tiny import TINY_ARCHITECTURES, tiny_model

IDS = torch.randint(3, 128, (1, 120), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_a_seed_is_a_model_and_torchs_own_seed_is_left_alone(arch):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a = tiny_model(arch)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(logits(a), logits(tiny_model(arch)))
    assert not torch.equal(logits(a), logits(tiny_model(arch, seed=1)))


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_every_model_is_what_its_name_says(arch):
    model = tiny_model(arch)
    model_type, own = TINY_ARCHITECTURES[arch]
    assert model.config.model_type == model_type
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for field, value in own.items():
        if field != "rope_parameters":
            assert getattr(model.config, field) == value


@pytest.mark.parametrize("arch", sorted(set(TINY_ARCHITECTURES) - {"gemma2", "gpt_oss"}))
def test_attention_is_neither_uniform_nor_blind(arch):
    """Else leaving keys out would change little, and tests of methods would pass for nothing."""
    assert logits(tiny_model(arch)).std(1).mean() > 0.1
    for x in capture_qkv(tiny_model(arch), IDS):
        scores = (x.q @ x.k.repeat_interleave(x.group, 1).mT) * x.scale
        assert scores.std(-1).mean() > 0.1


def test_overrides_act_and_unknown_names_are_refused():
    assert len(tiny_model("llama", num_hidden_layers=2).model.layers) == 2
    with pytest.raises(SparselandError, match="no tiny 'gpt5'; there are llama, mistral"):
        tiny_model("gpt5")
