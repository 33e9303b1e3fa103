"""What prompts and decoding steps cost: linear layers, attention in proportion to its density, and choosing.

For N parameters of the layers, E of the output head, L tokens, density rho, per layer H heads of size d::

    prompt        2 (N L + E)  +  layers H 4 d rho L (L + 1) / 2  +  choosing
    decoded token 2 (N + E)    +  layers H 4 d rho L              +  choosing

Choosing is what the study's units do before: the probe's products with all keys, products of block means, the
bounds of pages. A multiplication and an addition are two operations. The embedding table is looked up, which
costs nothing; a prompt needs the head for its last token only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sparseland.attention.sparse_frontier import SparseFrontier


@dataclass(frozen=True)
class ModelShape:
    """The numbers that costs depend on; ``params`` without the embedding table and the output head."""

    params: float
    head: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: Any) -> ModelShape:
        """The shape of a transformers decoder."""
        config = model.config.get_text_config()
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        outside = {id(m.weight): m.weight.numel() for m in (table, head) if m is not None}
        total = sum(p.numel() for p in model.parameters()) - sum(outside.values())
        heads = config.num_attention_heads
        return cls(
            total,
            0 if head is None else head.weight.numel(),
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


# The paper's models (Qwen2.5-Instruct).
QWEN = {
    "7B": ModelShape(6.53e9, 0.545e9, 28, 28, 4, 128),
    "14B": ModelShape(13.1e9, 0.779e9, 48, 40, 8, 128),
    "32B": ModelShape(31.0e9, 0.779e9, 64, 40, 8, 128),
    "72B": ModelShape(70.0e9, 1.246e9, 80, 64, 8, 128),
}


def prefill_flops(
    shape: ModelShape, length: int, density: float = 1.0, method: SparseFrontier | None = None
) -> float:
    """Operations of a prompt of ``length`` tokens; ``method`` says what choosing costs (None: nothing)."""
    pairs = length * (length + 1) / 2
    attention = shape.layers * shape.heads * 4 * shape.head_dim * pairs * density
    linear = 2 * (shape.params * length + shape.head)
    return linear + attention + choosing_flops(shape, length, method)


def choosing_flops(shape: ModelShape, length: int, method: SparseFrontier | None) -> float:
    """Operations of a prompt's selection: the unit's products, sums and comparisons."""
    if method is None:
        return 0.0
    per_head = 0.0
    if method.unit in ("vertical-slash", "flexprefill"):
        probe = min(length, method.value("probe"))
        # The probe's attention, its sums along columns and diagonals, and two sorts.
        per_head = probe * length * (2 * shape.head_dim + 5) + 2 * length * math.log2(max(2, length))
    elif method.unit == "block":
        blocks = math.ceil(length / method.value("block_size"))
        # Means of queries and keys, all products of means, and finding the best of each row.
        per_head = 2 * length * shape.head_dim + blocks**2 * (2 * shape.head_dim + 2)
    elif method.unit in ("snapkv", "ada-snapkv"):
        probe = min(length, method.value("probe"))
        per_head = probe * length * (2 * shape.head_dim + 4)
    elif method.unit == "quest":
        per_head = 2 * length * shape.head_dim * shape.kv_heads / shape.heads  # the pages' extremes
    return shape.layers * shape.heads * per_head


def decode_flops(
    shape: ModelShape, length: int, density: float = 1.0, method: SparseFrontier | None = None
) -> float:
    """Operations of one decoded token behind ``length`` tokens of which ``density`` are read."""
    attention = shape.layers * shape.heads * 4 * shape.head_dim * length * density
    if method is not None and method.unit == "quest":
        pages = math.ceil(length / method.value("page_size"))
        attention += shape.layers * shape.heads * 4 * shape.head_dim * pages
    return 2 * (shape.params + shape.head) + attention


def decode_bytes(
    shape: ModelShape,
    length: int,
    density: float = 1.0,
    method: SparseFrontier | None = None,
    width: int = 2,
) -> float:
    """Bytes that one decoded token reads: weights, keys and values, Quest's page bounds."""
    row = 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    tokens = length * density
    if method is not None and method.unit == "quest":
        tokens += math.ceil(length / method.value("page_size"))
    return (shape.params + shape.head) * width + row * tokens


def equal_cost_compression(large: ModelShape, small: ModelShape, length: int) -> float | None:
    """The compression at which ``large`` reads a prompt for what ``small`` costs densely; None: at none."""
    spare = prefill_flops(small, length) - prefill_flops(large, length, 0.0)
    return None if spare <= 0 else (prefill_flops(large, length) - prefill_flops(large, length, 0.0)) / spare
