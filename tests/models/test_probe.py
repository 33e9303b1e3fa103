"""What is refused before anything changes: with the reason, and the model left as it was."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, FalconForCausalLM

import sparseland as sl
from sparseland.errors import SparselandError
from sparseland.method import LayerShape
from sparseland.models import attention
from sparseland.models.attention import evaluating, tiny_forward, tiny_ids
from sparseland.models.probe import probe
from sparseland.models.surgery import attention_layers
from sparseland.models.tiny import tiny_model

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8,
    "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def model_of(model_type, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **fields})
    return AutoModelForCausalLM.from_config(config).eval()


def test_shapes_are_those_that_attention_saw():
    assert probe(tiny_model("llama")) == {i: LayerShape(i, 3, 4, 2, 16) for i in range(3)}
    one_key_head = model_of("gpt_bigcode", multi_query=True)  # its configuration names no number of key heads
    assert probe(one_key_head)[2] == LayerShape(2, 3, 4, 1, 16)


@pytest.mark.parametrize(
    ("model_type", "fields", "words"),
    [
        ("gptj", {}, "GPTJForCausalLM: .* not supported: its attention adds a mask to scores"),
        ("bert", {"is_decoder": True}, "BertLMHeadModel: .* not supported: .*missing 1 required positional"),
        ("llama4_text", {"attention_chunk_size": 4096}, r"layer 0 attends within chunks \(of 4096 tokens\)"),
    ],
)
def test_what_fails_or_would_fail_later_is_one_line_and_changes_nothing(model_type, fields, words):
    model = model_of(model_type, **fields).train()
    before, implementation = copy.deepcopy(model.state_dict()), model.config._attn_implementation
    with pytest.raises(SparselandError, match=words) as caught:
        sl.apply(model, "streaming")
    assert "\n" not in str(caught.value)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(attention.ATTRIBUTE not in vars(m) for m in model.modules())


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "qwen3_moe"])
def test_experts_whose_products_round_differently_are_no_leak(model_type):
    """Another last token moves tokens between the experts' products, which moves the last bits of others."""
    model = model_of(model_type)
    assert len(probe(model)) == 3


def test_attention_that_adds_up_its_own_scores_is_refused_in_words():
    config = FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100)
    with pytest.raises(SparselandError, match=r"FalconForCausalLM: .* not through AttentionInterface$"):
        probe(FalconForCausalLM(config).eval())


def test_out_of_memory_is_no_matter_of_the_model(monkeypatch):
    model = tiny_model("llama")
    for error in (MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory")):

        def broken(*_, error=error, **__):
            raise error

        monkeypatch.setattr(model.model, "forward", broken)
        with pytest.raises(type(error)) as caught:
            tiny_forward(model, tiny_ids(model))
        assert caught.value is error


def test_modules_keep_their_own_mode():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [m.training for m in model.modules()]
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == before
    probe(model)
    assert [m.training for m in model.modules()] == before


def test_a_sparse_model_is_not_probed():
    model = tiny_model("llama")
    with sl.apply(model, "streaming") as handle:
        with pytest.raises(SparselandError, match="sparse already"):
            probe(model)
        assert all(attention.ATTRIBUTE in vars(layer) for layer in attention_layers(model).values())
        assert handle.stats().density is None
