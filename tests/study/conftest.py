"""Model folders as users have them: tiny random Llamas of two sizes with the embedded model's tokenizer."""

import pytest
from transformers import AutoTokenizer

from sparseland.models.embedded import embedded_folder
from sparseland.models.tiny import tiny_model


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A smaller and a larger one; not to be written into."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)
    made = []
    for name, sizes in (("small", {"num_hidden_layers": 2}), ("large", {"hidden_size": 96})):
        path = tmp_path_factory.mktemp("sizes") / name
        model = tiny_model("llama", max_position_embeddings=2048, vocab_size=len(tokenizer), **sizes)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        made.append(path)
    return made
