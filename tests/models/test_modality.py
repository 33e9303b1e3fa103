"""Which tokens are vision: on tiny models of two families with video tokens, and MMInference on them."""

from __future__ import annotations

import pytest
import torch
import transformers

import sparseland as sl
from sparseland.attention._mminference_search import search
from sparseland.attention.mminference import HeadPlan, Shape, save_patterns
from sparseland.errors import SparselandError
from sparseland.models.modality import (
    Modality,
    capture_inputs,
    frame_strides,
    vision_mask,
    vision_token_ids,
)
from sparseland.models.surgery import attention_layers, decoder_of
from sparseland.models.tiny import tiny_model

IMAGE, VIDEO = 120, 121
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen():
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def llava():
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **TEXT},
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 32,
            "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 24, "patch_size": 4,
        },
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlavaOnevisionForConditionalGeneration(config).eval()


def qwen_call(frames=20, before=30, after=90, seed=0):
    """``frames`` of 8 x 8 patches: 16 tokens each."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 119, (before + after,), generator=g)
    video = torch.full((frames * 16,), VIDEO)
    marks = torch.tensor([122]), torch.tensor([123])
    ids = torch.cat([text[:before], marks[0], video, marks[1], text[before:]])[None]
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == VIDEO).long() * 2,
        "pixel_values_videos": torch.randn(frames * 64, 3 * 2 * 4 * 4, generator=g),
        "video_grid_thw": torch.tensor([[frames, 8, 8]]),
    }


def llava_call(frames=32, before=30, after=90, seed=0):
    """``frames`` of 3 x 3 tokens, and one newline behind them."""
    g = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 119, (before + after,), generator=g)
    ids = torch.cat([text[:before], torch.full((frames * 9 + 1,), VIDEO), text[before:]])[None]
    return {"input_ids": ids, "pixel_values_videos": torch.randn(1, frames, 3, 24, 24, generator=g)}


FAMILIES = {"qwen": (qwen, qwen_call, 16), "llava": (llava, llava_call, 9)}


@pytest.fixture(params=FAMILIES)
def family(request):
    make, call, size = FAMILIES[request.param]
    return make(), call, size


@torch.no_grad()
def logits(model, call):
    return model(**call, use_cache=False).logits


def sparse_plans(tmp_path):
    """Two layers of four heads, each boundary type among them."""
    vs, near, grid = Shape("vertical-slash", 40, 110), Shape("a-shape", 4, 110), Shape("grid", lines=1)
    pairs = {"text-text": near, "text-vision": vs, "vision-text": vs, "vision-vision": grid}
    row = [
        HeadPlan.plain(vs), HeadPlan.by_query(near, grid), HeadPlan.by_pair(pairs), HeadPlan.plain(grid)
    ]  # fmt: skip
    return f"mminference:patterns={save_patterns(tmp_path / 'heads.json', [row, row])}"


# ------------------------------------------------------------------- who sees


def test_token_ids_come_from_the_configuration(family):
    model, call, _ = family
    assert vision_token_ids(model) == (IMAGE, VIDEO)
    ids = call()["input_ids"]
    assert torch.equal(vision_mask(model, ids), ids == VIDEO)
    text = tiny_model("llama")
    assert vision_token_ids(text) == ()
    assert vision_mask(text, ids) is None


def test_grids_tell_frames_and_rows():
    model, call = qwen(), qwen_call()
    assert frame_strides(model, call) == (4, 16)
    assert frame_strides(model, {"image_grid_thw": torch.tensor([[1, 4, 8], [1, 8, 8]])}) == (4, 8, 16)
    assert frame_strides(llava(), llava_call()) == ()


def test_layers_are_told_which_tokens_are_vision(family, monkeypatch, tmp_path):
    model, call, size = family
    seen = []
    original = sl.MMInference.pattern

    def spy(self, x, calibration=None):
        seen.append(x)
        return original(self, x, calibration)

    monkeypatch.setattr(sl.MMInference, "pattern", spy)
    one = call()
    with sl.apply(model, sparse_plans(tmp_path)) as handle:
        seen.clear()
        logits(model, one)
        assert [x.layer for x in seen] == [0, 1]
        for x in seen:
            assert torch.equal(x.vision, one["input_ids"][0] == VIDEO)
            assert x.strides == ((4, 16) if size == 16 else ())
        assert 0.1 < handle.stats().density < 0.95
        # The decoder alone gets embeddings or ids of text: nothing is known of them.
        seen.clear()
        with torch.no_grad():
            decoder_of(model)(input_ids=one["input_ids"], use_cache=False)
        assert all(x.vision is None for x in seen)
    # Methods that don't ask are not told, and pay nothing.
    with sl.apply(model, "streaming:window=50") as handle:
        assert all(r.modality is None for r in handle.runtimes.values())
        assert not model._forward_pre_hooks


def test_a_text_model_has_no_vision(tmp_path):
    model = tiny_model("llama", num_hidden_layers=2)
    ids = torch.randint(3, 119, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sl.apply(model, sparse_plans(tmp_path)) as handle:
        model(input_ids=ids)
        assert handle.runtimes[0].modality.rows is None
        assert handle.stats().density < 1


# ---------------------------------------------------------------- on the model


def test_full_budget_is_dense_and_removal_restores(family):
    model, call, _ = family
    one = call()
    expected = logits(model, one)
    towers = [m for n, m in model.named_modules() if "vis" in n and type(m).__name__.endswith("Attention")]
    assert towers
    with sl.apply(
        model, "mminference:vertical=4096,slash=4096", calibrations={"mminference": sl.method.Calibration()}
    ):
        torch.testing.assert_close(logits(model, one), expected, rtol=1e-3, atol=1e-3)
        # Only the decoder's layers are switched.
        assert all("_sparseland" in m.__dict__ for m in attention_layers(model).values())
        assert not any("_sparseland" in m.__dict__ for m in towers)
        assert {m.config._attn_implementation for m in towers if hasattr(m, "config")} <= {"sdpa", "eager"}
    assert torch.equal(logits(model, one), expected)


def test_sparse_plans_change_the_output_as_their_mask_says(family, tmp_path):
    model, call, _ = family
    one = call()
    expected = logits(model, one)
    with sl.apply(model, sparse_plans(tmp_path)) as handle:
        for runtime in handle.runtimes.values():
            runtime.keep_pattern = True
        got = logits(model, one)
        patterns = {i: r.last_pattern for i, r in handle.runtimes.items()}
    assert (got - expected).abs().max() > 1e-3

    class Masked:
        active = False

        def __init__(self, layer):
            self.mask = patterns[layer].mask()

        def attention(self, q, k, v, mask, scale):
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, self.mask, scale=scale)

    from sparseland.models.attention import switched

    layers = attention_layers(model)
    with switched(layers, {i: Masked(i) for i in layers}):
        masked = logits(model, one)
    torch.testing.assert_close(got, masked, rtol=1e-3, atol=1e-3)


def test_rows_with_videos_in_different_places_and_padding(tmp_path):
    model = llava()
    a, b = llava_call(before=30, after=90), llava_call(before=80, after=40, seed=1)
    spec = sparse_plans(tmp_path)
    both = {name: torch.cat([a[name], b[name]]) for name in a}
    short = llava_call(before=10, after=40, seed=2)
    pad = a["input_ids"].shape[1] - short["input_ids"].shape[1]
    padded = {
        "input_ids": torch.cat([a["input_ids"], torch.nn.functional.pad(short["input_ids"], (pad, 0))]),
        "pixel_values_videos": torch.cat([a["pixel_values_videos"], short["pixel_values_videos"]]),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(short["input_ids"]), (pad, 0)).repeat(2, 1),
    }
    padded["attention_mask"][0] = 1
    with sl.apply(model, spec):
        together = logits(model, both)
        for row, alone in enumerate((a, b)):
            torch.testing.assert_close(together[[row]], logits(model, alone), rtol=1e-3, atol=1e-3)
        got = logits(model, padded)
        torch.testing.assert_close(got[[0]], logits(model, a), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got[[1], pad:], logits(model, short), rtol=1e-3, atol=1e-3)


def test_generation_and_a_second_turn(family, tmp_path):
    model, call, _ = family
    one = call()
    with torch.no_grad(), sl.apply(model, sparse_plans(tmp_path)) as handle:
        out = model.generate(**one, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert out.shape[1] == one["input_ids"].shape[1] + 4
        past = model(**one, use_cache=True).past_key_values
        more = torch.randint(3, 119, (1, 70), generator=torch.Generator().manual_seed(5))
        handle.reset_stats()
        model(input_ids=more, past_key_values=past, use_cache=True)
        rows = handle.runtimes[0].modality.rows
        assert torch.equal(rows[0], torch.cat([one["input_ids"][0] == VIDEO, torch.zeros(70).bool()]))
        assert handle.stats().density < 1


def test_calls_are_told_apart():
    model, modality = llava(), Modality()
    modality.active = True
    ids = llava_call()["input_ids"]

    class Cache:
        length = 0

        def get_seq_length(self):
            return self.length

    cache = Cache()
    modality.note(model, {"input_ids": ids[:, :200], "past_key_values": cache})
    cache.length = 200
    modality.note(model, {"input_ids": ids[:, 200:], "past_key_values": cache})
    assert torch.equal(modality.of(1, ids.shape[1]), ids == VIDEO)
    assert modality.of(1, 7) is None
    assert modality.of(2, ids.shape[1]) is None
    # Another cache's length: what came before is not known.
    cache.length = 50
    modality.note(model, {"input_ids": ids[:, 50:], "past_key_values": cache})
    assert modality.of(1, ids.shape[1]) is None
    modality.note(model, {"inputs_embeds": torch.zeros(1, 5, 64)})
    assert modality.of(1, 5) is None


def test_the_search_reads_the_whole_call(family):
    model, call, _ = family
    one = call()
    inputs = list(capture_inputs(model, one))
    assert [x.layer for x in inputs] == [0, 1]
    assert all(torch.equal(x.vision, one["input_ids"][0] == VIDEO) for x in inputs)
    blind = list(capture_inputs(model, {"input_ids": one["input_ids"]}))
    assert not torch.allclose(inputs[0].q, blind[0].q)  # pixels matter
    with pytest.raises(SparselandError, match="the call to learn from needs input_ids"):
        list(capture_inputs(model, {"inputs_embeds": torch.zeros(1, 5, 64)}))


def test_searched_heads_are_saved_and_used(tmp_path):
    model, one = llava(), llava_call(frames=29, before=20, after=60)
    heads = search(model, one)
    assert [len(row) for row in heads] == [4, 4]
    path = save_patterns(tmp_path / "heads.json", heads)
    with sl.apply(model, f"mminference:patterns={path}") as handle:
        logits(model, one)
        assert handle.stats().density <= 1
    # Token ids alone will do for text; the sizes follow the budget.
    found = sl.MMInference().calibrate(model, one["input_ids"][:, -50:])
    assert len(found.meta["heads"]) == 2
    with sl.apply(model, "mminference:vertical=1,slash=10", calibrations={"mminference": found}) as handle:
        logits(model, one)
        assert handle.stats().density < 1
