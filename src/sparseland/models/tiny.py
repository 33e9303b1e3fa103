"""Tiny random decoders, one per supported architecture: what tests run on instead of downloads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparseland.errors import SparselandError

# Weights this large (against the usual 0.02) give logits that vary and attention that is far from uniform.
_COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

# Name -> transformers' model type, and what sets this architecture apart.
TINY_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 100}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma3": (
        "gemma3_text",
        {
            "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "phi3": ("phi3", {"original_max_position_embeddings": 1024}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 0]}),
    "gemma2": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 16}),
    "gpt_oss": (
        "gpt_oss",
        {
            "sliding_window": 64,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

# Soft-capped logits and learned sinks are nothing that SDPA can do.
_EAGER = ("gemma2", "gpt_oss")


def tiny_model(arch: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random float32 decoder in eval mode: 3 layers, hidden size 64, 4 query and 2 key heads, 128 tokens.

    GPT-NeoX has no grouped queries: 4 key heads. Mistral's window is 100 tokens; Gemma 3 has local
    layers (64 tokens) around a global one; SmolLM3's last layer has no positions; Gemma 2 soft-caps
    and GPT-OSS has learned sinks, which is what they are here for.

    Args:
        arch: a key of :data:`TINY_ARCHITECTURES`.
        seed: equal seeds give equal weights; torch's global random state is left alone.
        overrides: fields of the architecture's configuration.

    Raises:
        SparselandError: unknown architecture.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if arch not in TINY_ARCHITECTURES:
        raise SparselandError(f"no tiny {arch!r}; there are {', '.join(TINY_ARCHITECTURES)}")
    model_type, own = TINY_ARCHITECTURES[arch]
    config = AutoConfig.for_model(model_type, **{**_COMMON, **own, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager" if arch in _EAGER else "sdpa"
        )
    return model.float().eval()  # type: ignore[no-any-return]
