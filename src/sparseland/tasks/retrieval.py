"""Key-value retrieval: a long JSON object of random pairs, one key asked for.

After Liu et al., "Lost in the Middle" (2023), section 4. Nothing but the key tells the pairs apart, and
no sentence stands out, so selection by similarity has nothing to hold on to but an exact match.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any

from sparseland.errors import SparselandError
from sparseland.tasks.needles import WRONG, new_numbers
from sparseland.tasks.sample import Sample, build, depths, haystack, rng_of, token_count

DIGITS = 6


def retrieval(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` prompts of ``length`` tokens: as many pairs of numbers as fit, the asked one at its depth.

    The tokens that are left, about one pair's, are filled with a piece of ``text`` in front of the object,
    so that the length is exact.

    Args:
        tokenizer: of the model under test; its chat template is used where it has one.
        text: what the remaining tokens are filled with.
        length: tokens of a prompt.
        count: prompts.
        seed: equal seeds give equal prompts.

    Raises:
        SparselandError: the length is too small for one pair, or the text too short.
    """
    samples = []
    for i, depth in enumerate(depths(count)):
        rng = rng_of("retrieval", length, seed, i)
        filler = haystack(tokenizer, text, length, rng)
        # Each pair takes more than four tokens, whatever the tokenizer.
        numbers = new_numbers(length // 2, DIGITS, filler, rng)
        pairs = _as_many_as_fit(tokenizer, numbers, length)
        key, value = pairs[int(depth * len(pairs))]
        samples.append(
            build(
                tokenizer,
                task="retrieval",
                length=length,
                depth=depth,
                document=partial(_document, pairs),
                filler=filler,
                question=_question(key),
                answer_start=_start(key),
                facts=[value],
                # All stand in the object: only the key tells them apart.
                others=[
                    [other] for _, other in rng.sample(pairs, min(WRONG + 1, len(pairs))) if other != value
                ][:WRONG],
            )
        )
    return samples


def _as_many_as_fit(tokenizer: Any, numbers: list[str], length: int) -> list[tuple[str, str]]:
    """The first pairs whose prompt, without filler, has at most ``length`` tokens."""
    pairs = list(zip(numbers[::2], numbers[1::2], strict=False))

    def tokens(n: int) -> int:
        key = pairs[0][0]
        return token_count(tokenizer, f"{_document(pairs[:n], '')}\n\n{_question(key)}", _start(key))

    if not pairs or tokens(1) > length:
        raise SparselandError(f"length={length} is too short for task retrieval")
    per_pair = max(tokens(min(9, len(pairs))) - tokens(1), 1) / (min(9, len(pairs)) - 1 or 1)
    n = min(len(pairs), 1 + int((length - tokens(1)) / per_pair))
    while tokens(n) > length:
        n -= 1
    return pairs[:n]


def _document(pairs: list[tuple[str, str]], filler: str) -> str:
    lines = json.dumps(dict(pairs), indent=0)
    head = f"{filler}\n\n" if filler else ""
    return f"{head}Each key of this JSON object has one value.\n\n{lines}"


def _question(key: str) -> str:
    return f'What is the value of the key "{key}" in the JSON object above?'


def _start(key: str) -> str:
    return f'The value of the key "{key}" is "{key}": "'
