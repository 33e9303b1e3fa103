"""Loading what users name: folders and ids, whole and broken; dtypes, devices, stretched contexts."""

import json
import math
import pickle
import socket
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparseland.errors import SparselandError
from sparseland.models import load, load_model
from sparseland.models.tiny import tiny_model

IDS = torch.arange(3, 90)[None]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def rewrite(folder, **fields):
    """Change fields of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder, **options):
    """The one line with which loading ends."""
    with pytest.raises(SparselandError) as error:
        load_model(str(folder), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------ whole models


def test_a_folder_gives_the_model_that_was_saved(whole_folder):
    loaded = load_model(str(whole_folder), dtype="float32", device="cpu")
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.name == str(whole_folder)
    assert loaded.tokenizer("a word", add_special_tokens=False)["input_ids"] == [3, 4]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_the_asked_dtype_is_loaded(whole_folder, name):
    model = load_model(str(whole_folder), dtype=name, device="cpu").model
    assert {p.dtype for p in model.parameters()} == {getattr(torch, name)}


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bfloat16_only_where_the_cpu_multiplies_in_it(whole_folder, monkeypatch, native, expected):
    monkeypatch.setattr(load, "native_bf16", lambda: native)
    assert load_model(str(whole_folder), device="cpu").model.dtype == expected


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse avx2 avx512f\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16\n", True),
        ("flags : amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("model name : no bf16 amx_bf16 here\n", False),
        ("", False),
    ],
)
def test_native_bf16_reads_the_cpus_flags(monkeypatch, cpuinfo, expected):
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: cpuinfo)
    assert load.native_bf16() is expected


def test_native_bf16_is_false_where_nothing_tells(monkeypatch):
    def missing(path, **_):
        raise FileNotFoundError

    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    monkeypatch.setattr(Path, "read_text", missing)
    assert load.native_bf16() is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert load.native_bf16() is True


@pytest.mark.parametrize("asked", ["flash_attention_2", "some/kernels", "eager"])
def test_the_attention_is_ours_to_choose(folder, asked):
    rewrite(folder, _attn_implementation=asked, attn_implementation=asked)
    assert load_model(str(folder)).model.config._attn_implementation == "sdpa"


TINY = {
    "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "num_local_experts": 2,
    "num_experts_per_tok": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("gemma2", "Gemma2Attention uses soft-capped attention logits"),
        ("gpt_oss", "GptOssAttention uses learned attention sinks"),
        (
            "gptj",
            "GPTJForCausalLM: its decoder fails on a tiny input and is not supported: its attention adds",
        ),
        ("bloom", "BloomForCausalLM has no decoder attention layers"),
        ("mamba", "MambaForCausalLM has no decoder attention layers"),
    ],
)
def test_attention_without_sdpa_is_refused_with_our_own_reason(folder, model_type, words):
    config = AutoConfig.for_model(model_type, **TINY)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    message = refusal(folder)
    assert message.startswith(f"model {str(folder)!r} can't be made sparse: ")
    assert words in message
    assert "Please request" not in message


# ------------------------------------------------------------ broken folders


def test_a_folder_without_configuration_is_refused(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    assert refusal(folder).endswith("has no weights: no *.safetensors file")


def test_pickled_weights_are_refused_and_never_opened(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    assert "found pytorch_model.bin; only safetensors files are read" in refusal(folder)
    assert not (tmp_path / "sprung").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "sprung").exists()  # the trap would have worked


def test_a_folder_without_tokenizer_is_refused(folder):
    for file in (*folder.glob("tokenizer*"), *folder.glob("special_tokens*")):
        file.unlink()
    assert "has no tokenizer: none of tokenizer.json" in refusal(folder)


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "its tokenizer can't be read" in refusal(folder)


def test_missing_tensors_are_refused_not_made_up(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "lack 2 tensors, e.g. model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("cut", [0, 5, 1000, -8])
def test_a_cut_or_empty_weights_file_is_refused(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "can't be read" in refusal(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"intermediate_size": 97},
        {"num_hidden_layers": 5},
        {"vocab_size": 10**9},
        {"hidden_size": 10**6, "head_dim": 10**5},
    ],
    ids=str,
)
def test_weights_of_another_shape_are_refused(folder, fields):
    rewrite(folder, **fields)
    refusal(folder)


@pytest.mark.parametrize(
    "content",
    ["", "{", "not json", "\xff\xfe", "{}", '{"model_type": "nosuch"}', "[" * 100_000, '{"model_type": 3}',
     "[]", '"llama"'],
    ids=lambda c: c[:40] or "empty",
)  # fmt: skip
def test_a_garbled_configuration_is_one_line(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        "null",
        '{"model_type": "llama", "num_attention_heads": 0}',
        '{"model_type": "llama", "hidden_size": "x"}',
    ],
)
def test_a_garbled_field_is_one_line(folder, content):
    (folder / "config.json").write_text(content)
    refusal(folder)


def test_a_decoder_whose_configuration_does_not_say_so_is_read(folder):
    config = {"model_type": "gpt_neox", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps(config))
    assert "is no decoder-only language model" not in refusal(folder)  # its weights are missing


@pytest.mark.parametrize("model_type", ["bert", "t5", "vit", "clip"])
def test_what_is_no_decoder_is_refused_by_its_architecture(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert f"architecture {model_type!r} is no decoder-only language model" in refusal(folder)


def test_a_models_own_code_is_never_run(folder, tmp_path):
    code = f"open({str(tmp_path / 'sprung')!r}, 'w')\nfrom transformers import LlamaConfig as Evil\n"
    (folder / "evil.py").write_text(code)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}})
    )
    assert "needs Python code of its own, which is never run" in refusal(folder)
    assert not (tmp_path / "sprung").exists()


# ------------------------------------------------------------ names


def test_names_that_are_no_folder_and_no_id_are_refused(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_text("x")
    assert "is a file; a folder or a Hugging Face id is needed" in refusal(file)
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere-at-all", "a/b/c"):
        assert "there is no such folder" in refusal(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no-such-model", "bad name!"])
def test_an_unknown_id_without_network_is_refused_at_once(monkeypatch, tmp_path, name):
    monkeypatch.setattr(load, "_offline", lambda: True)
    message = refusal(name)
    assert repr(name) in message
    if "!" not in name:
        assert message.endswith("can't be fetched: the hub can't be reached and it is not in the local cache")


def test_offline_is_found_out_without_asking_the_hub(monkeypatch):
    def unknown(*_):
        raise socket.gaierror

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert load._offline()
    monkeypatch.setattr(load, "getproxies", lambda: {"https": "proxy"})  # which knows the name
    assert not load._offline()
    monkeypatch.setattr(load, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not load._offline()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load._offline()


def test_a_dtype_or_device_that_is_not_there_is_refused(whole_folder):
    assert "dtype='int8' is not allowed; it must be auto, float32" in refusal(whole_folder, dtype="int8")
    for device in ("warp", "cuda:99", "meta"):
        assert f"device={device!r} can't be used here" in refusal(whole_folder, device=device)


# ------------------------------------------------------------ rope scale


def test_a_length_within_the_context_is_let_through_and_one_beyond_is_not(whole_folder):
    load_model(str(whole_folder), length=1024)
    message = refusal(whole_folder, length=1025)
    assert "length=1025 is beyond the context" in message
    assert "1024 tokens; give --rope-scale 1.1 " in message


def test_the_advised_scale_is_enough(whole_folder):
    message = refusal(whole_folder, length=4096, rope_scale=2.0)
    assert "2048 tokens with --rope-scale 2; give --rope-scale 4 " in message
    model = load_model(str(whole_folder), length=4096, rope_scale=4.0).model
    assert model.config.max_position_embeddings == 4096


def test_a_stretch_that_fits_is_what_the_length_needs(whole_folder):
    for length, context in ((1024, 1024), (1500, 1536), (4096, 4096)):
        model = load_model(str(whole_folder), length=length, rope_scale="fit").model
        assert model.config.max_position_embeddings == context


def test_stretching_is_yarn(whole_folder):
    """Fast rotations stay, slow ones are divided by the factor, and attention is sharpened (Peng et al.)."""
    plain = load_model(str(whole_folder), dtype="float32", device="cpu").model
    model = load_model(str(whole_folder), dtype="float32", device="cpu", rope_scale=4).model
    before, after = plain.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq
    # 1024 positions turn less than once in the slow half, and more than 32 times in the first channel.
    turns = 1024 * before / (2 * math.pi)
    assert turns[0] > 32
    assert turns[-1] < 1
    torch.testing.assert_close(after[turns > 32], before[turns > 32])
    torch.testing.assert_close(after[turns < 1], before[turns < 1] / 4)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert (logits(model) - logits(plain)).abs().max() > 1e-3


def test_a_scale_of_one_changes_nothing(whole_folder):
    model = load_model(str(whole_folder), dtype="float32", device="cpu", rope_scale=1.0).model
    assert torch.equal(logits(model), logits(tiny_model("llama")))
    assert model.config.max_position_embeddings == 1024


@pytest.mark.parametrize("scale", [0.99, 0.0, -2.0, math.nan, math.inf])
def test_scales_that_are_none_are_refused(scale):
    with pytest.raises(SparselandError, match="is not allowed; it must be a number >= 1"):
        load._fit_length(tiny_model("llama").config, "tiny", scale, None)


def test_positions_that_are_scaled_already_are_not_scaled_again():
    config = tiny_model("llama").config
    load._fit_length(config, "tiny", 2.0, None)
    before = config.to_dict()
    with pytest.raises(SparselandError, match=r"are already scaled \(yarn\), to 2048 tokens"):
        load._fit_length(config, "tiny", 2.0, None)
    assert config.to_dict() == before


def test_positions_that_do_not_rotate_are_not_stretched():
    with pytest.raises(SparselandError, match="tiny has no rotary positions to stretch"):
        load._fit_length(AutoConfig.for_model("gpt2"), "tiny", 2.0, None)


def test_local_layers_keep_their_positions():
    config = tiny_model("gemma3").config
    local = dict(config.rope_parameters["sliding_attention"])
    load._fit_length(config, "tiny", 3.0, 3072)
    assert config.rope_parameters["sliding_attention"] == local
    stretched = config.rope_parameters["full_attention"]
    assert (stretched["rope_type"], stretched["factor"]) == ("yarn", 3.0)
    assert stretched["original_max_position_embeddings"] == 1024
    assert config.max_position_embeddings == 3072
