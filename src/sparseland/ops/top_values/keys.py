"""Numbers as integers that order like them."""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered_keys(b_x):
    """int32 keys of float32 values: -0 ties with 0, NaN comes above all numbers."""
    b_x = tl.where(b_x == 0.0, 0.0, b_x)
    bits = b_x.to(tl.int32, bitcast=True)
    bits = tl.where(b_x != b_x, 0x7FC00000, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
