"""Queries, keys and values of the embedded model on real text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs

DTYPES = (torch.float32, torch.bfloat16)
# Fewer and shorter on a CPU, so that a benchmark is over in seconds.
LENGTHS = {"cuda": 8192, "cpu": 4096}
LAYERS = {"cuda": (8, 15, 22), "cpu": (4,)}
_CHARACTERS = 16  # per token, at most: the text need not be tokenised to its end


def device() -> str:
    """Where benchmarks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def captured(length: int | None) -> list[AttentionInputs]:
    """Float32 q, k, v of ``length`` tokens of the default text in some layers.

    Raises:
        SparselandError: the text is shorter.
    """
    from sparseland.models import load_embedded
    from sparseland.models.capture import capture_qkv
    from sparseland.tasks.text import default_text, tokenize

    length = length or LENGTHS[device()]
    loaded = load_embedded("float32")
    ids = tokenize(loaded.tokenizer, default_text()[: _CHARACTERS * length])[:length]
    if len(ids) < length:
        raise SparselandError(f"length={length} is not allowed; the text has {len(ids)} tokens")
    return list(capture_qkv(loaded.model.to(device()), ids[None], LAYERS[device()]))


def cast(x: AttentionInputs, dtype: torch.dtype) -> AttentionInputs:
    """The same inputs in another type."""
    return replace(x, q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


def labels(x: AttentionInputs) -> dict[str, Any]:
    """What a row says of its inputs."""
    return {
        "dtype": name(x.q.dtype), "length": x.k.shape[2], "layer": x.layer, "heads": x.q.shape[1],
        "kv_heads": x.k.shape[1], "head_dim": x.q.shape[3],
    }  # fmt: skip


def name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")
