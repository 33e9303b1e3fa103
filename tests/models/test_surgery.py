"""Finding layers by transformers' conventions, replacing them, and the attention function's refusals."""

import pytest
import torch
from torch import nn

from sparseland.errors import SparselandError
from sparseland.models.attention import attention_forward, switched, tiny_ids
from sparseland.models.surgery import attention_layers, decoder_linears, decoder_of, replace_module
from sparseland.models.tiny import TINY_ARCHITECTURES, tiny_model

LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
LINEARS = {
    "llama": ("model.layers", LLAMA),
    "gemma3": ("model.layers", LLAMA),
    "phi3": ("model.layers", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_every_layer_is_found_in_order(arch):
    model = tiny_model(arch)
    layers = attention_layers(model)
    assert list(layers) == [0, 1, 2]
    assert [layer.layer_idx for layer in layers.values()] == [0, 1, 2]
    assert len({id(layer) for layer in layers.values()}) == 3


@pytest.mark.parametrize("arch", LINEARS)
def test_linears_are_those_inside_the_layers(arch):
    stack, names = LINEARS[arch]
    model = tiny_model(arch)
    found = decoder_linears(model)
    assert sorted(found) == sorted(f"{stack}.{i}.{name}" for i in range(3) for name in names)
    assert all(found[name] is model.get_submodule(name) for name in found)


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_the_decoder_is_what_loops_over_the_layers(arch):
    model = tiny_model(arch)
    assert decoder_of(model) is model.base_model


class OddAttention(nn.Module):
    def __init__(self, index, **fields):
        super().__init__()
        self.config, self.layer_idx = object(), index
        for name, value in fields.items():
            setattr(self, name, value)


def test_cross_attention_and_encoders_do_not_count():
    model = nn.Module()
    model.layers = nn.ModuleList(
        [OddAttention(0), OddAttention(0, is_cross_attention=True), OddAttention(0, is_causal=False),
         OddAttention(None)]
    )  # fmt: skip
    assert attention_layers(model) == {0: model.layers[0]}


def test_two_layers_of_one_index_and_none_at_all_are_refused():
    model = nn.Module()
    model.layers = nn.ModuleList([OddAttention(1), OddAttention(1)])
    with pytest.raises(SparselandError, match=r"layers\.1 repeats attention layer 1"):
        attention_layers(model)
    with pytest.raises(SparselandError, match="Linear has no decoder attention layers"):
        attention_layers(nn.Linear(2, 2))


def test_attention_outside_a_list_of_layers_is_refused():
    model = nn.Module()
    model.only = OddAttention(0)
    with pytest.raises(SparselandError, match="attention layer only is in no list of layers"):
        decoder_of(model)


def test_a_replaced_module_runs_and_the_old_one_comes_back():
    model = tiny_model("llama")
    ids = tiny_ids(model)
    name = "model.layers.1.mlp.down_proj"
    old = model.get_submodule(name)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        replace_module(model, name, nn.Linear(96, 64))
        assert not torch.equal(model(input_ids=ids).logits, before)
        replace_module(model, name, old)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert model.get_submodule(name) is old


# ------------------------------------------------------------- attention


class Dense:
    def __init__(self):
        self.calls = []

    def attention(self, q, k, v, mask, scale):
        self.calls.append((mask, scale))
        return q


def test_switched_layers_run_their_runtime_and_come_back_after_an_error():
    model = tiny_model("mistral")
    layers = attention_layers(model)
    runtimes = {i: Dense() for i in layers}
    ids = tiny_ids(model)

    def run_and_fail():
        model(input_ids=ids, use_cache=False)
        assert model.config._attn_implementation == "sparseland"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), switched(layers, runtimes):
        run_and_fail()
    for runtime in runtimes.values():
        ((mask, scale),) = runtime.calls
        assert (mask.n_keys, mask.window) == (ids.shape[1], 100)
        assert scale == 16**-0.5
    assert model.config._attn_implementation == "sdpa"
    assert all("_sparseland" not in vars(layer) for layer in layers.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout": 0.1}, r"attention dropout \(0.1\) is not supported"),
        ({"softcap": 30.0}, "soft-capped attention logits"),
        ({"s_aux": torch.zeros(2)}, "learned attention sinks"),
        ({"position_bias": torch.zeros(1)}, "an attention bias"),
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "ready-made 4-D attention mask"),
    ],
)
def test_what_no_op_computes_is_refused(options, words):
    module = nn.Identity()
    module.__dict__["_sparseland"] = Dense()
    q = torch.zeros(1, 2, 3, 8)
    given = {"attention_mask": None, **options}
    with pytest.raises(SparselandError, match=words):
        attention_forward(module, q, q, q, **given)
    out, _ = attention_forward(module, q, q, q, None, softcap=None)
    assert out.shape == (1, 3, 2, 8)
    assert module.__dict__["_sparseland"].calls[0][1] == 8**-0.5


def test_values_of_another_size_and_layers_without_a_method_are_refused():
    module = nn.Identity()
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(SparselandError, match="Identity runs sparseland's attention but no method"):
        attention_forward(module, q, q, q, None)
    module.__dict__["_sparseland"] = Dense()
    with pytest.raises(SparselandError, match="keys and values differ in head size"):
        attention_forward(module, q, q, q[..., :4], None)


def test_a_probe_has_distinct_tokens_of_the_vocabulary():
    ids = tiny_ids(tiny_model("llama"))
    assert ids.shape == (1, 12)
    assert len(set(ids[0].tolist())) == 12
    assert int(tiny_ids(tiny_model("llama", vocab_size=32)).max()) < 32
