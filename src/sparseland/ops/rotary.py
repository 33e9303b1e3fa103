"""Rotary position embedding on half-split channels, forth and back, by tables of cosine and sine.

Su et al. 2021, "RoFormer", in the layout of Llama: channel ``r`` turns with ``r + R / 2``::

    y_r  = x_r cos - x_r' sin          x_r  = (y_r cos + y_r' sin) / (cos^2 + sin^2)
    y_r' = x_r' cos + x_r sin          x_r' = (y_r' cos - y_r sin) / (cos^2 + sin^2)

Channels from R on pass. Dividing by ``cos^2 + sin^2`` takes out a factor that the tables may carry (YaRN's
attention scaling), and what rounding them to bfloat16 does to the length.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def turn(
    x: Float[Tensor, "*B n D"], cos: Float[Tensor, "*b n R2"], sin: Float[Tensor, "*b n R2"]
) -> Float[Tensor, "*B n D"]:
    """Rotate the first ``R = 2 * cos.shape[-1]`` channels; computed in float32."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    c, s = cos.float(), sin.float()
    return torch.cat(((a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype), rest), dim=-1)


def turn_back(
    x: Float[Tensor, "*B n D"], cos: Float[Tensor, "*b n R2"], sin: Float[Tensor, "*b n R2"]
) -> Float[Tensor, "*B n D"]:
    """The inverse of :func:`turn`."""
    c, s = cos.float(), sin.float()
    size = c * c + s * s
    return turn(x, c / size, -s / size)
