"""apply() on every supported architecture: it acts, it is exact where it must be, and it leaves no trace."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import sparseland as sl
from sparseland.method import Calibration, parse_spec
from sparseland.models.capture import capture_qkv
from sparseland.models.surgery import attention_layers, decoder_linears
from sparseland.models.tiny import TINY_ARCHITECTURES, tiny_model

REFUSED = {"gemma2": "soft-capped", "gpt_oss": "sinks"}
SUPPORTED = sorted(set(TINY_ARCHITECTURES) - set(REFUSED))
# Sparse at the tiny length used here, with blocks of 64.
SPARSE = "streaming:sinks=4,window=48"
DENSE = "streaming:sinks=0,window=100000"
LENGTH = 160


@pytest.fixture(scope="module")
def models():
    # Mistral's window is on every layer; where it binds, it is the pattern (see the test of windows).
    wide = {"mistral": {"sliding_window": 400}}
    return {arch: tiny_model(arch, **wide.get(arch, {})) for arch in TINY_ARCHITECTURES}


@pytest.fixture
def ids():
    return torch.randint(3, 128, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("arch", SUPPORTED)
def test_full_window_equals_dense_and_a_small_one_does_not(models, arch, ids):
    model = models[arch]
    expected = logits(model, ids)
    with sl.apply(model, DENSE):
        torch.testing.assert_close(logits(model, ids), expected, rtol=2e-4, atol=2e-4)
    with sl.apply(model, SPARSE) as handle:
        assert (logits(model, ids) - expected).abs().max() > 1e-3
        assert 0 < handle.stats().density < 1


@pytest.mark.parametrize("arch", SUPPORTED)
def test_remove_restores_everything_bit_for_bit(models, arch, ids):
    model = models[arch]
    state = copy.deepcopy(model.state_dict())
    config = copy.deepcopy(model.config.to_dict())
    expected = logits(model, ids)
    handle = sl.apply(model, [SPARSE, "r-sparse:sparsity=0.5,alpha=1,scope=all"], calibration_ids=ids)
    assert not torch.equal(logits(model, ids), expected)
    handle.remove()
    handle.remove()
    assert torch.equal(logits(model, ids), expected)
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(state)
    for name, value in state.items():
        assert torch.equal(after[name], value)
        assert after[name].stride() == value.stride()
    assert not model._forward_pre_hooks
    assert all("_sparseland" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("arch", SUPPORTED)
def test_a_left_padded_batch_equals_each_row_alone(models, arch, ids):
    model = models[arch]
    short = ids[1:, 40:]
    batch = ids.clone()
    batch[1, :40] = 0
    mask = torch.ones_like(batch)
    mask[1, :40] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with sl.apply(model, SPARSE):
        together = logits(model, batch, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(together[0], logits(model, ids[:1])[0], rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(together[1, 40:], logits(model, short)[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("arch", SUPPORTED)
def test_a_right_padded_batch_equals_each_row_alone(models, arch, ids):
    model = models[arch]
    mask = torch.ones_like(ids)
    mask[1, 100:] = 0
    with sl.apply(model, SPARSE):
        together = logits(model, ids, attention_mask=mask)
        torch.testing.assert_close(together[1, :100], logits(model, ids[1:, :100])[0], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("arch", SUPPORTED)
@pytest.mark.parametrize("cache", ["dynamic", "plain", "static"])
def test_chunked_prefill_equals_whole_prefill(models, arch, cache, ids):
    model = models[arch]
    with sl.apply(model, SPARSE):
        whole = logits(model, ids)
        past = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "plain": DynamicCache,
            "static": lambda: StaticCache(config=model.config, max_cache_len=LENGTH + 32),
        }[cache]()
        parts = []
        with torch.no_grad():
            for piece in ids.split([70, 50, 39, 1], dim=1):
                parts.append(model(input_ids=piece, past_key_values=past, use_cache=True).logits)
    # The last token is a decoding step, where a prompt method leaves attention dense.
    joined = torch.cat(parts[:-1], 1)
    torch.testing.assert_close(joined, whole[:, :-1], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("arch", ["mistral", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_where_the_models_own_window_binds_it_is_the_pattern(arch, cache, ids):
    model = tiny_model(arch, sliding_window=50)

    def run():
        past = DynamicCache(config=model.config)
        if cache == "static":
            past = StaticCache(config=model.config, max_cache_len=LENGTH + 8)
        parts = [
            logits(model, piece, past_key_values=past, use_cache=True) for piece in ids.split([90, 69, 1], 1)
        ]
        return torch.cat(parts, 1)

    expected = run()
    with sl.apply(model, DENSE) as handle:
        torch.testing.assert_close(run(), expected, rtol=2e-4, atol=2e-4)
        assert min(layer.density[0] for layer in handle.stats().layers) < 0.7


@pytest.mark.parametrize("arch", SUPPORTED)
@pytest.mark.parametrize("how", ["greedy", "sampling", "beams", "static"])
def test_generate_with_dense_settings_gives_the_dense_tokens(models, arch, how, ids):
    model = models[arch]
    options = {
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "top_k": 20},
        "beams": {"do_sample": False, "num_beams": 3},
        "static": {"do_sample": False, "cache_implementation": "static"},
    }[how] | {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mask[1, :30] = 0

    def tokens():
        torch.manual_seed(1)
        return model.generate(input_ids=ids, attention_mask=mask, **options)

    expected = tokens()
    methods = [DENSE]
    if how != "static" and arch != "mistral":  # all of whose layers are local: no cache that grows
        methods.append("double-sparsity:budget=1,min_length=0,dense_layers=0")
    with sl.apply(model, methods, calibration_ids=ids):
        assert torch.equal(tokens(), expected)


def test_a_compressed_cache_that_drops_nothing_generates_the_dense_tokens(models, ids):
    model = models["llama"]
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "num_beams": 2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    expected = model.generate(input_ids=ids, **options)
    with sl.apply(model, "mustafar:sparsity=0"):
        assert torch.equal(model.generate(input_ids=ids, **options), expected)


@pytest.mark.parametrize("arch", sorted(REFUSED))
def test_what_no_op_computes_is_refused_before_anything_changes(models, arch, ids):
    model = models[arch]
    expected = logits(model, ids)
    with pytest.raises(sl.SparselandError, match=REFUSED[arch]):
        sl.apply(model, SPARSE)
    assert torch.equal(logits(model, ids), expected)
    assert all("_sparseland" not in vars(m) for m in model.modules())


def test_a_model_that_bypasses_the_registry_is_refused(ids):
    model = tiny_model("llama")
    layer = model.model.layers[1].self_attn
    original = type(layer).forward

    def own_attention(self, *args, **kwargs):
        before = self.config._attn_implementation
        self.config._attn_implementation = "sdpa"
        try:
            kwargs["attention_mask"] = None
            return original(self, *args, **kwargs)
        finally:
            self.config._attn_implementation = before

    layer.forward = own_attention.__get__(layer)
    with pytest.raises(sl.SparselandError, match=r"layers \[1\] do not go through"):
        sl.apply(model, SPARSE)


def test_a_model_without_causality_is_refused(ids):
    model = tiny_model("llama")
    embed = model.model.embed_tokens.forward

    def leak(x):
        e = embed(x)
        return e + e.mean(1, keepdim=True)

    model.model.embed_tokens.forward = leak
    with pytest.raises(sl.SparselandError, match="later token changes earlier"):
        sl.apply(model, SPARSE)


def test_something_that_is_no_decoder_is_refused():
    with pytest.raises(sl.SparselandError, match="no decoder attention layers"):
        sl.apply(nn.Linear(2, 2), SPARSE)


def test_methods_with_one_role_are_refused_with_the_reason(models):
    with pytest.raises(
        sl.SparselandError, match="minference and flexprefill can't be combined: both decide which"
    ):
        sl.apply(models["llama"], ["minference", "flexprefill"])
    with pytest.raises(sl.SparselandError, match="no method given"):
        sl.apply(models["llama"], [])


def test_a_sparse_model_can_not_be_made_sparse_again(models):
    model = models["llama"]
    with sl.apply(model, SPARSE), pytest.raises(sl.SparselandError, match="sparse already"):
        sl.apply(model, SPARSE)
    sl.apply(model, SPARSE).remove()


def test_four_kinds_of_site_in_one_recipe(models, tmp_path):
    model = models["llama"]
    ids = torch.randint(3, 128, (1, 600), generator=torch.Generator().manual_seed(0))
    methods = [
        "minference:vertical=16,slash=64",
        "double-sparsity:budget=1/4,min_length=0,dense_layers=0",
        "mustafar:sparsity=0.5,window=16,group=1",
        "r-sparse:sparsity=0.3",
    ]
    with sl.apply(model, methods, calibration_ids=ids) as handle:
        out = model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        stats = handle.stats()
        assert stats.density < 1
        assert stats.decode_density < 1
        assert stats.neuron_density < 1
        recipe = handle.recipe({"why": "a test"})
    recipe.save(tmp_path / "recipe.json")
    with sl.Recipe.load(tmp_path / "recipe.json").apply(model):
        again = model.generate(
            input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert torch.equal(out, again)


def test_recall_is_the_kept_softmax_mass(models, ids):
    model = models["llama"]
    with sl.apply(model, SPARSE, recall=True) as handle:
        logits(model, ids)
        stats = handle.stats()
        pattern_mask = None
        handle.runtimes[0].keep_pattern = True
        logits(model, ids)
        pattern_mask = handle.runtimes[0].last_pattern.mask()
    x = next(capture_qkv(model, ids, [0]))
    scores = (x.q @ x.k.repeat_interleave(x.group, 1).mT) * x.scale
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    p = scores.masked_fill(~causal, float("-inf")).softmax(-1)
    expected = (p * pattern_mask).sum(-1).mean((0, 2))
    torch.testing.assert_close(torch.tensor(stats.layers[0].recall), expected.float(), rtol=1e-3, atol=1e-4)
    assert stats.recall < 1


def test_density_counts_pairs_that_were_computed(models, ids):
    model = models["qwen2"]
    with sl.apply(model, SPARSE) as handle:
        logits(model, ids)
        assert len(handle.stats().layers) == len(attention_layers(model))
        expected = sum(min(i + 1, 48) + min(4, max(0, i + 1 - 48)) for i in range(LENGTH))
        assert handle.stats().layers[0].density[0] == pytest.approx(expected / (LENGTH * (LENGTH + 1) / 2))
        handle.reset_stats()
        assert handle.stats().density is None


def test_bf16_and_autocast_stay_close(ids):
    model = tiny_model("llama")
    with sl.apply(model, SPARSE):
        expected = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            close = logits(model, ids).float()
    half = tiny_model("llama").to(torch.bfloat16)
    with sl.apply(half, SPARSE):
        other = logits(half, ids).float()
    for got in (close, other):
        assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).mean() > 0.99


def test_training_reaches_every_weight(ids):
    model = tiny_model("llama").train()
    with sl.apply(model, SPARSE):
        model(input_ids=ids, labels=ids).loss.backward()
    for name, linear in decoder_linears(model).items():
        assert linear.weight.grad is not None, name
        assert linear.weight.grad.abs().sum() > 0, name


def test_a_four_dimensional_mask_and_packed_rows_are_refused(models, ids):
    model = models["llama"]
    with sl.apply(model, SPARSE):
        ready = torch.zeros(2, 1, LENGTH, LENGTH)
        with pytest.raises(sl.SparselandError, match="4-D"):
            logits(model, ids, attention_mask=ready)
        packed = torch.cat([torch.arange(80), torch.arange(80)])[None].expand(2, -1)
        with pytest.raises(sl.SparselandError, match="not plainly causal"):
            logits(model, ids, position_ids=packed, use_cache=False)


def test_a_failure_while_applying_leaves_no_trace(models, ids, monkeypatch):
    model = models["llama"]
    expected = logits(model, ids)
    from sparseland.method import method_class

    calls = []

    def broken(self, linear, name, calibration=None):
        calls.append(name)
        if len(calls) > 3:
            raise sl.SparselandError("no memory for more")
        return nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)

    monkeypatch.setattr(method_class("r-sparse"), "convert", broken)
    with pytest.raises(sl.SparselandError, match="no memory for more"):
        sl.apply(model, [SPARSE, "r-sparse"], calibration_ids=ids)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), r"got torch.int64 \[1, 0\]"),
        (torch.zeros(40, dtype=torch.long), r"got torch.int64 \[40\]"),
        (torch.zeros(1, 40), "got torch.float32"),
        ([1, 2, 3], "got list"),
        (torch.full((1, 40), 10**6), "this model's tokens are numbered from 0 to"),
        (torch.full((1, 40), -1), "go from -1 to -1"),
    ],
)
def test_calibration_ids_are_checked(models, wrong, words):
    with pytest.raises(sl.SparselandError, match=words):
        sl.apply(models["llama"], "double-sparsity", calibration_ids=wrong)


def test_the_readmes_line_of_specs_works(models):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (line,) = re.findall(r'sl\.apply\(model, "([^"]*)"\)', readme)
    ids = torch.randint(3, 128, (1, 256), generator=torch.Generator().manual_seed(0))
    with sl.apply(models["llama"], line, calibration_ids=ids) as handle:
        assert [m.card.slug for m in handle.methods] == ["flexprefill", "double-sparsity"]
        assert handle.methods[0] == sl.FlexPrefill(gamma=0.95)


@pytest.mark.parametrize("methods", [5, None, 0.5, [5], ["streaming", None]])
def test_methods_of_a_wrong_type_are_refused(models, methods):
    with pytest.raises(sl.SparselandError, match="was expected, not"):
        sl.apply(models["llama"], methods)


def test_what_is_no_model_is_refused():
    with pytest.raises(sl.SparselandError, match="a transformers model was expected, not str"):
        sl.apply("some/model", SPARSE)


def test_a_linear_method_on_a_model_without_linear_layers_is_refused(ids):
    config = AutoConfig.for_model("gpt2", n_embd=64, n_layer=2, n_head=4, vocab_size=128)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(sl.SparselandError, match=r"GPT2LMHeadModel: r-sparse found no torch.nn.Linear"):
        sl.apply(model, [SPARSE, "r-sparse"], calibration_ids=ids)
    assert model.config._attn_implementation == "sdpa"
    sl.apply(model, SPARSE).remove()


# ------------------------------------------------------- calibrations of another model

CALIBRATED = {
    "double-sparsity": "double-sparsity:dense_layers=0,group=mean",
    "sale": "sale:dense_up_to=64",
    "r-sparse": "r-sparse",
    "moa": "moa:density=0.5,block_size=16",
}


@pytest.fixture(scope="module")
def learnt(models):
    """What each method learns about the tiny Llama."""
    ids = torch.randint(3, 128, (1, 160), generator=torch.Generator().manual_seed(0))
    return {slug: parse_spec(spec).calibrate(models["llama"], ids) for slug, spec in CALIBRATED.items()}


@pytest.mark.parametrize("slug", CALIBRATED)
@pytest.mark.parametrize(
    "other",
    [{"num_attention_heads": 8}, {"num_key_value_heads": 4}, {"head_dim": 32}, {"num_hidden_layers": 4}],
)
def test_a_calibration_of_another_model_is_one_line(learnt, slug, other, ids):
    known = learnt[slug]
    affected = {
        "sale": {"num_attention_heads", "num_hidden_layers"},
        "moa": {"num_key_value_heads", "num_hidden_layers"},
    }.get(slug, set(other))
    model = tiny_model("llama", **other)
    expected = logits(model, ids)
    if not affected & set(other):
        sl.apply(model, CALIBRATED[slug], calibrations={slug: known}).remove()
        return
    with pytest.raises(sl.SparselandError, match=f"^{slug}: ") as caught:
        sl.apply(model, CALIBRATED[slug], calibrations={slug: known})
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("slug", CALIBRATED)
def test_an_empty_calibration_is_refused_and_a_right_one_is_not(models, learnt, slug, ids):
    model = models["llama"]
    with sl.apply(model, CALIBRATED[slug], calibrations={slug: learnt[slug]}):
        assert logits(model, ids).isfinite().all()
    with pytest.raises(sl.SparselandError, match=f"{slug}: "):
        sl.apply(model, CALIBRATED[slug], calibrations={slug: Calibration()})


@pytest.mark.parametrize("slug", ["double-sparsity", "sale", "r-sparse"])
def test_a_calibration_with_numbers_that_are_none_is_refused(models, learnt, slug):
    known = copy.deepcopy(learnt[slug])
    for tensor in known.tensors.values():
        tensor.fill_(torch.nan)
    with pytest.raises(sl.SparselandError, match=f"{slug}: .* numbers only"):
        sl.apply(models["llama"], CALIBRATED[slug], calibrations={slug: known})
