"""Asking a model: greedy decoding against the accepted answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseland.tasks.sample import Sample


@torch.no_grad()
def score_sample(model: nn.Module, sample: Sample) -> bool:
    """Whether greedy decoding continues the prompt with one of the sample's answers.

    Tokens between facts that the answer gives are fed, not scored. Decoding stops at the first token
    that fits no answer, so a wrong one costs little more than the prompt. Several facts (multi-value
    needles, variables) count only if all of them are named, in any order: there is no part credit.

    Args:
        model: a causal language model with transformers' cache, in eval mode, on any device.
        sample: from one of ``TASKS``.
    """
    device = next(model.parameters()).device
    left = [list(zip(a.ids.tolist(), a.asked.tolist(), strict=True)) for a in sample.answers]
    ids: Tensor = sample.prompt[None].to(device)
    cache: Any = None
    for step in range(max(len(answer) for answer in left)):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # Answers that agree so far agree on where their facts begin and end, too.
        given, is_asked = left[0][step]
        token = int(out.logits[0, -1].argmax()) if is_asked else given
        left = [answer for answer in left if answer[step] == (token, is_asked)]
        if not left:
            return False
        if any(len(answer) == step + 1 for answer in left):
            return True
        ids, cache = torch.tensor([[token]], device=device), out.past_key_values
    raise AssertionError("an answer is longer than the longest")


def countable(dense_correct: Sequence[bool], minimum: float = 0.5) -> bool:
    """Whether a task may count for or against a method: the dense model gets at least ``minimum`` right."""
    return bool(dense_correct) and sum(dense_correct) / len(dense_correct) >= minimum
