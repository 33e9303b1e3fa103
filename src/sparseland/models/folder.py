"""Reading a model and its tokenizer the one way this package reads them: safe, quiet, with SDPA if it can."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparseland.errors import SparselandError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A decoder in eval mode with its tokenizer, and the name to call it by."""

    model: nn.Module
    tokenizer: Any
    name: str


def as_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``; anything else than the three known names is an error."""
    if name not in DTYPES:
        raise SparselandError(f"dtype={name!r} is not allowed; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def read_model(source: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A causal language model in eval mode from safetensors files; a model's own code is never run.

    Attention is SDPA, or eager where transformers has no SDPA for the architecture.

    Args:
        source: folder or Hugging Face id.
        dtype: of the weights in memory.
        options: passed on to ``from_pretrained``.

    Raises:
        SparselandError: the files lack some of the architecture's tensors (transformers would fill them
            with random numbers).
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        attn_implementation=None,  # SDPA if there is one, whatever the configuration asks for
        output_loading_info=True,
        **options,
    )
    if missing := sorted(info["missing_keys"]):
        raise SparselandError(f"model {source!r}: its files lack {len(missing)} tensors, e.g. {missing[0]}")
    return model.eval()  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, log lines or warnings from transformers inside; its settings come back after.

    Downloads keep their own bars: they may take long.
    """
    from huggingface_hub import utils
    from transformers.utils import logging

    hub: Any = utils  # its annotations are incomplete
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_level = hub.logging.get_verbosity()
    downloads = not hub.are_progress_bars_disabled()
    logging.set_verbosity_error()
    hub.logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        hub.enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
