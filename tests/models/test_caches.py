"""Tracked caches: bytes to the last one, beams, crops, resets, life after remove(), refusals."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import sparseland as sl
from sparseland.errors import SparselandError
from sparseland.models.caches import TrackedLayer, cache_nbytes
from sparseland.models.tiny import tiny_model

# The tiny models: 3 layers, 2 key heads and 4 query heads of 16 channels, in float32.
LAYERS, KV_HEADS, HEADS, DIM = 3, 2, 4, 16
BATCH, LENGTH = 2, 60
IDS = torch.randint(3, 128, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
SELECT = "double-sparsity:budget=1/4,min_length=0,min_tokens=1,dense_layers=0,bits=4"
STORE = "mustafar:sparsity=0.5,window=16,group=1"


@torch.no_grad()
def fed(model, ids=IDS, cache=None):
    return model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values


def settled(cache):
    """As the first token after a prompt finds it."""
    for layer in cache.layers:
        layer.store.settle()
    return cache


def applied(model, *specs):
    return sl.apply(model, list(specs), calibration_ids=IDS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def dense_bytes(length=LENGTH, size=4):
    return LAYERS * BATCH * 2 * KV_HEADS * length * DIM * size


# ------------------------------------------------------------------- bytes


def test_a_plain_cache(model):
    cache = DynamicCache(config=model.config)
    assert cache_nbytes(cache) == 0
    assert cache_nbytes(fed(model, cache=cache)) == dense_bytes()
    assert cache_nbytes(fed(model, IDS[:, :1], cache)) == dense_bytes(LENGTH + 1)


def test_half_precision_takes_half():
    assert cache_nbytes(fed(tiny_model("llama").bfloat16())) == dense_bytes(size=2)


def test_a_static_cache_counts_all_its_slots(model):
    cache = StaticCache(config=model.config, max_cache_len=100)
    assert cache_nbytes(cache) == 0
    assert cache_nbytes(fed(model, cache=cache)) == dense_bytes(100)


def test_local_layers_hold_their_window_only():
    model = tiny_model("mistral", sliding_window=25)
    # A window of 25 keeps 24 tokens for the next one.
    assert cache_nbytes(fed(model, cache=DynamicCache(config=model.config))) == dense_bytes(24)


@pytest.mark.parametrize(
    ("options", "heads", "per_row"),
    [
        ("", HEADS, 2 + 4),  # 4 channels of 4 bits, smallest value and step in 2 bytes each
        (",group=mean", KV_HEADS, 2 + 4),
        (",bits=16", HEADS, 4 * 4),  # 4 channels as they are
    ],
)
def test_labels_come_on_top(model, options, heads, per_row):
    with applied(model, SELECT.replace(",bits=4", "") + (options or ",bits=4")):
        found = cache_nbytes(fed(model))
    assert found == dense_bytes() + LAYERS * BATCH * heads * LENGTH * per_row


def test_a_store_counts_what_it_holds(model):
    # Behind the window: 8 bytes of bitmap and half the channels.
    per_vector = 8 + DIM // 2 * 4
    with applied(model, STORE):
        found = cache_nbytes(settled(fed(model)))
    vectors = LAYERS * BATCH * 2 * KV_HEADS
    assert found == vectors * ((LENGTH - 16) * per_vector + 16 * DIM * 4)
    assert found < dense_bytes()


def test_both_together(model):
    with applied(model, SELECT):
        labels = cache_nbytes(fed(model)) - dense_bytes()
    with applied(model, STORE):
        stored = cache_nbytes(settled(fed(model)))
    with applied(model, SELECT, STORE):
        assert cache_nbytes(settled(fed(model))) == labels + stored


# ------------------------------------------------------------------ wrapping


def test_a_cache_is_wrapped_once_and_only_where_something_is_kept(model):
    with applied(model, SELECT):
        cache = fed(model)
        wrapped = list(cache.layers)
        assert all(isinstance(layer, TrackedLayer) for layer in wrapped)
        fed(model, IDS[:, :1], cache)
        assert all(a is b for a, b in zip(cache.layers, wrapped, strict=True))
        assert cache.get_seq_length() == LENGTH + 1
        assert len(wrapped[0].state) == LENGTH + 1
    with applied(model, "streaming:sinks=4,window=8"):
        assert not any(isinstance(layer, TrackedLayer) for layer in fed(model).layers)


def test_no_cache_is_brought_where_none_is_wanted(model):
    with applied(model, SELECT), torch.no_grad():
        assert model(input_ids=IDS, use_cache=False).past_key_values is None


def test_local_layers_are_left_to_their_window():
    model = tiny_model("gemma3")
    with applied(model, SELECT):
        layers = fed(model).layers
    assert [isinstance(layer, TrackedLayer) for layer in layers] == [False, True, False]


def test_a_cache_that_was_filled_before_is_refused(model):
    cache = fed(model, cache=DynamicCache())
    with applied(model, SELECT), pytest.raises(sl.SparselandError, match="filled before the method was"):
        fed(model, IDS[:, :1], cache)


def test_a_cache_of_another_sparse_model_is_refused(model):
    other = tiny_model("llama", seed=1)
    with applied(other, SELECT), applied(model, SELECT):
        cache = fed(model)
        with pytest.raises(sl.SparselandError, match="belongs to another sparse model"):
            fed(other, IDS[:, :1], cache)


def test_a_store_needs_a_dynamic_cache(model):
    cache = StaticCache(config=model.config, max_cache_len=100)
    with applied(model, STORE), pytest.raises(sl.SparselandError, match=r"mustafar replaces .* StaticLayer"):
        fed(model, cache=cache)


# ------------------------------------------------------- what caches must do


METHODS = {"select": [SELECT], "store": [STORE], "both": [SELECT, STORE]}


@torch.no_grad()
def step(model, cache, token):
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("kind", METHODS)
def test_rows_can_be_reordered_and_repeated(model, kind):
    token = torch.tensor([[5], [9], [7]])
    with applied(model, *METHODS[kind]):
        rows = [2 * [i] for i in range(2)]
        expected = [step(model, fed(model, IDS[[r[0]]]), token[i : i + 1]) for i, r in enumerate(rows)]
        swapped = fed(model)
        swapped.reorder_cache(torch.tensor([1, 0]))
        found = step(model, swapped, token[[1, 0]])
        torch.testing.assert_close(found, torch.cat(expected[::-1]), rtol=1e-4, atol=1e-4)
        repeated = fed(model)
        repeated.batch_repeat_interleave(2)
        found = step(model, repeated, token[[0, 0, 1, 1]])
        torch.testing.assert_close(found, torch.cat(expected)[[0, 0, 1, 1]], rtol=1e-4, atol=1e-4)
        chosen = fed(model)
        chosen.batch_select_indices(torch.tensor([1]))
        torch.testing.assert_close(step(model, chosen, token[[1]]), expected[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(*expected, atol=1e-2)


# Plain layers of newer transformers can be told what to remove only, ours also what to keep.
@pytest.mark.parametrize(
    ("kind", "by"), [("select", -3), ("store", -3), ("both", -3), ("store", LENGTH - 3), ("both", LENGTH - 3)]
)
def test_a_cropped_cache_has_forgotten(model, kind, by):
    token = torch.tensor([[5], [9]])
    with applied(model, *METHODS[kind]):
        cache = fed(model)
        before = [layer.keys.clone() for layer in cache.layers]
        for layer in cache.layers:
            layer.crop(by)
        assert cache.get_seq_length() == LENGTH - 3
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys[:, :, : LENGTH - 3])
            assert layer.state is None or len(layer.state) == LENGTH - 3
            assert layer.store is None or len(layer.store) == LENGTH - 3
        # What is put back is as if it had never been cut; a store may have pruned other tokens by then.
        whole = step(model, fed(model), token)
        fed(model, IDS[:, -3:], cache)
        assert cache.get_seq_length() == LENGTH
        found = step(model, cache, token)
    if kind == "select":
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", METHODS)
def test_a_reset_cache_is_as_new(model, kind):
    token = torch.tensor([[5], [9]])
    with applied(model, *METHODS[kind]):
        expected = step(model, fed(model), token)
        cache = fed(model, IDS.flip(1)[:, :20])
        cache.reset()
        assert cache.get_seq_length() == 0
        fed(model, IDS, cache)
        torch.testing.assert_close(step(model, cache, token), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_a_cache_lives_on_after_remove(model, kind):
    """Then the dense model attends to all that the cache gives back."""
    token = torch.tensor([[5], [9]])
    handle = applied(model, *METHODS[kind])
    cache = fed(model)
    if kind != "select":
        settled(cache)
    keys, values = (getattr(cache.layers[0], name).clone() for name in ("keys", "values"))
    handle.remove()
    found = step(model, cache, token)
    assert found.isfinite().all()
    if kind == "select":
        torch.testing.assert_close(found, step(model, fed(model), token), rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == LENGTH + 1
    assert torch.equal(cache.layers[0].keys[:, :, : LENGTH - 16], keys[:, :, : LENGTH - 16])
    assert values.shape == (BATCH, KV_HEADS, LENGTH, DIM)


@pytest.mark.parametrize("kind", METHODS)
def test_cropping_by_nothing_changes_nothing(model, kind):
    token = torch.tensor([[5], [9]])
    with applied(model, *METHODS[kind]):
        cache = fed(model)
        cache.crop(0)
        assert cache.get_seq_length() == LENGTH
        found = step(model, cache, token)
        assert torch.equal(found, step(model, fed(model), token))


@pytest.mark.parametrize(
    "spec",
    [
        "mustafar:sparsity=0", "s2-attention:vert_stride=1", "masformer:span=4096,full=0",
        "dynamic-mask-attention", "sparse-frontier:unit=snapkv,capacity=4096",
        "sparse-frontier:unit=quest,budget=4096", "double-sparsity:budget=1",
    ],
)  # fmt: skip
def test_assisted_decoding_is_dense_at_full_budget(model, spec):
    """Guesses are checked several at a time; the cache is cropped by those that were wrong, often none."""
    ids = IDS[:1, :12].repeat(1, 6)
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = model.generate(ids, **options)
    with applied(model, spec):
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **options), want)


@pytest.mark.parametrize(
    "spec",
    [
        "dynamic-mask-attention:keep=60", "masformer:full=1,span=8", "masformer:full=1,span=8,sinks=2",
        "s2-attention:block_size=16,local_blocks=1,vert_stride=2", "sparse-frontier:unit=quest,budget=16",
        STORE, SELECT,
    ],
)  # fmt: skip
def test_an_emptied_cache_is_as_new(model, spec):
    """Not even where the padding of the tokens before ended is remembered."""
    padded = torch.ones_like(IDS)
    padded[0, :17] = 0

    @torch.no_grad()
    def run(cache):
        steps = [model(input_ids=IDS[:, :33], past_key_values=cache, use_cache=True).logits[:, -1]]
        for i in range(33, 38):
            steps.append(step(model, cache, IDS[:, i : i + 1])[:, -1])
        return torch.stack(steps)

    with applied(model, spec):
        fresh = run(DynamicCache(config=model.config))
        used = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=IDS, attention_mask=padded, past_key_values=used, use_cache=True)
        used.crop(-LENGTH)
        assert used.get_seq_length() == 0
        assert torch.equal(run(used), fresh)


def test_a_cache_that_dropped_tokens_can_be_repeated(model):
    with applied(model, "sparse-frontier:unit=snapkv,capacity=16,window=4,probe=8,kernel=5"):
        cache = fed(model)
        step(model, cache, IDS[:, :1])
        cache.batch_repeat_interleave(2)
        assert step(model, cache, IDS[:, :1].repeat_interleave(2, 0)).shape[0] == 2 * BATCH


@pytest.mark.parametrize("spec", [SELECT, STORE])
def test_a_cache_method_where_every_layer_is_local_is_refused(spec):
    model = tiny_model("mistral", sliding_window=25)
    with pytest.raises(SparselandError, match=r"MistralForCausalLM: .* would do nothing; not supported"):
        applied(model, spec)
    model(torch.tensor([[5, 6]]))  # untouched
    with applied(tiny_model("gemma3"), spec):  # one layer of three keeps all tokens
        pass
