"""The tokenizers that tasks are made with: the embedded model's, and one of single characters."""

import pytest
from letters import Letters
from transformers import AutoTokenizer

from sparseland.models.embedded import embedded_folder
from sparseland.tasks.text import default_text


@pytest.fixture(scope="session")
def smollm():
    """The embedded model's tokenizer: real, with a chat template."""
    return AutoTokenizer.from_pretrained(embedded_folder(), local_files_only=True)


@pytest.fixture(scope="session", params=["smollm", "letters"])
def tokenizer(request):
    return Letters() if request.param == "letters" else request.getfixturevalue("smollm")


@pytest.fixture(scope="session")
def text():
    return default_text()
