"""What transformers would put in an N x N mask, kept as a few numbers.

transformers gives an attention function no mask at all unless a mask function is registered beside it,
and then causality is lost silently. Ours is registered, and instead of a tensor it hands each layer a
:class:`MaskSpec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.errors import SparselandError


@dataclass(frozen=True)
class MaskSpec:
    """Causal attention over keys ``[kv_offset, kv_offset + n)``, with padding.

    Args:
        n_keys: valid cache entries for this call, counted from the first key handed to the layer.
        window: sliding window in tokens, or None.
        valid: ``[B, n_keys]`` bool, False at padding; None where there is none.
        first_key: ``[B]`` first valid key of each row; None without padding.
        one_run: every row's valid keys are one run.
    """

    n_keys: int
    window: int | None = None
    valid: Bool[Tensor, "B N"] | None = None
    first_key: Int[Tensor, " B"] | None = None
    one_run: bool = True

    # `generate` builds the mask of a static cache early and passes it in again as the attention mask;
    # transformers leaves what has four dimensions alone.
    ndim: ClassVar[int] = 4

    def contiguous(self) -> MaskSpec:
        """Itself: ``generate`` asks this of every mask it makes for a static cache."""
        return self


def build_mask_spec(
    batch_size: int | None = None,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | MaskSpec | None = None,
    local_size: int | None = None,
    **_: Any,
) -> MaskSpec:
    """transformers' mask interface; refuses masks that are not causal (with a window) plus padding."""
    if isinstance(attention_mask, MaskSpec):
        return attention_mask
    _check_plain(mask_function, int(q_offset), q_length, kv_offset, local_size)
    # A static cache hands over all its slots; those after the newest query are empty.
    n_keys = min(kv_length, int(q_offset) + q_length - kv_offset)
    if attention_mask is None:
        return MaskSpec(n_keys, local_size)
    valid = attention_mask[:, kv_offset : kv_offset + n_keys].bool()
    if valid.shape[1] < n_keys:  # a mask for fewer tokens than the cache holds says nothing of the rest
        valid = torch.nn.functional.pad(valid, (0, n_keys - valid.shape[1]), value=True)
    if bool(valid.all()):
        return MaskSpec(n_keys, local_size)
    first = valid.int().argmax(1)
    last = n_keys - 1 - valid.flip(1).int().argmax(1)
    one_run = bool(((last - first + 1) == valid.sum(1)).all())
    return MaskSpec(n_keys, local_size, valid, first, one_run)


def _check_plain(
    mask_function: Any, q_offset: int, n_queries: int, kv_offset: int, window: int | None
) -> None:
    """Causal, or causal in a window; anything laid over it (packed rows, image tokens, chunks) is refused."""
    from transformers.masking_utils import causal_mask_function

    if mask_function is None or mask_function is causal_mask_function:
        return
    rows = torch.arange(q_offset, q_offset + n_queries)
    # Overlays show where they differ from causal: at the next token, the token before, the window's edge.
    steps = [-1, 0, 1] + ([window - 1, window] if window else [n_queries // 2])
    zero = torch.zeros((), dtype=torch.long)
    for step in steps:
        columns = rows - step
        inside = (columns >= kv_offset) & (columns < q_offset + n_queries)
        if not bool(inside.any()):
            continue
        expected = step >= 0 and (not window or step < window)
        seen = mask_function(zero, zero, rows[inside], columns[inside])
        if not bool((torch.as_tensor(seen) == expected).all()):
            raise SparselandError(
                "this model or call uses an attention mask that is not plainly causal (packed sequences, "
                "image tokens or chunked attention); sparseland can't combine it with a sparse pattern"
            )
