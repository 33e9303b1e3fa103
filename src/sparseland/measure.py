"""Measuring one configuration of one model on one window of text: quality, time, memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparseland.models.caches import cache_nbytes
from sparseland.tasks.agreement import agreement
from sparseland.tasks.loss import cross_entropy

# Tokens whose prediction is scored: the last of the prompt, and those decoded one by one after it.
TAIL_TOKENS = 512
DECODE_TOKENS = 96
# Prefills on a GPU, at least: the first one compiles kernels, which takes longer than the prompt.
GPU_REPEATS = 3


@dataclass(frozen=True)
class Window:
    """What one window of text cost and how well its tokens were predicted."""

    prefill_s: float
    decode_ms: float | None
    cache_bytes: int
    tail_logits: Float[Tensor, "T V"]
    decode_logits: Float[Tensor, "S V"]


@dataclass(frozen=True)
class Quality:
    """Losses in nats per token, and agreement with the dense model on the same tokens."""

    loss: float
    decode_loss: float | None
    kl: float
    top1: float


@torch.no_grad()
def run_window(
    model: nn.Module,
    ids: Int[Tensor, " N"],
    length: int,
    repeats: int = 1,
    decode_tokens: int = DECODE_TOKENS,
) -> Window:
    """Prefill ``length`` tokens (timed), then decode the following ones, fed with the text (timed).

    Args:
        ids: at least ``length + decode_tokens + 1`` token ids.
        repeats: prefills, on a GPU three at least; the fastest is reported (compiling kernels, and other work
            on the machine, only ever add time).
    """
    device = next(model.parameters()).device
    ids = ids.to(device)
    tail = min(TAIL_TOKENS, length - 1)
    times = []
    for _ in range(prefills(repeats, device)):
        out: Any = None
        elapsed, out = timed(
            lambda: model(input_ids=ids[None, :length], use_cache=True, logits_to_keep=tail + 1), device
        )
        times.append(elapsed)
    tail_logits = out.logits[0, -tail - 1 : -1].float().cpu()
    cache, last = out.past_key_values, out.logits[0, -1:].float().cpu()
    logits, steps = [last], []
    for step in range(decode_tokens):
        token = ids[None, length + step : length + step + 1]
        elapsed, out = timed(partial(model, input_ids=token, past_key_values=cache, use_cache=True), device)
        logits.append(out.logits[0, -1:].float().cpu())
        steps.append(elapsed)
    # The median leaves out the first steps, which still allocate.
    return Window(
        min(times),
        1e3 * sorted(steps)[len(steps) // 2] if steps else None,
        cache_nbytes(cache),
        tail_logits,
        torch.cat(logits),
    )


def prefills(repeats: int, device: torch.device) -> int:
    """How often a prompt is read until the fastest time says what it takes."""
    return max(repeats, GPU_REPEATS) if device.type == "cuda" else repeats


def quality(run: Window, ids: Int[Tensor, " N"], length: int, dense: Window) -> Quality:
    """Losses of a run, and its agreement with the dense run of the same window."""
    tail = run.tail_logits.shape[0]
    targets = ids[length - tail : length].cpu()
    decoded = run.decode_logits.shape[0]  # one more than there were decoding steps
    following = ids[length : length + decoded].cpu()
    agree = agreement(
        torch.cat([run.tail_logits, run.decode_logits]),
        torch.cat([dense.tail_logits, dense.decode_logits[:decoded]]),
    )
    return Quality(
        cross_entropy(run.tail_logits, targets),
        cross_entropy(run.decode_logits, following) if decoded > 1 else None,
        agree.kl,
        agree.top1,
    )


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall-clock seconds of ``work`` (the device is waited for), and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result
