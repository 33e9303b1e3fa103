"""A model folder as users have them: a tiny Llama with a tokenizer, in safetensors."""

import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparseland.models.tiny import tiny_model


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory):
    """Not to be written into; see ``folder``."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(path)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 3, "word": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    return path


@pytest.fixture
def folder(whole_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(whole_folder, tmp_path / "model")
