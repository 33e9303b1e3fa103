"""Common-word extraction: a long numbered list in which a few words come far more often than the others.

After Hsieh et al., "RULER" (2024), section 3.3, as in Nawrot et al., "The Sparse Frontier" (2025): every
place of the list matters a little and none stands out. RULER lists ten common words 30 times each among rare
ones 3 times each; here it is four, and as many times as a share of the list allows, so that prompts of a
thousand tokens hold a list, too.
"""

from __future__ import annotations

import random
import re
from functools import partial
from itertools import chain
from typing import Any

from sparseland.errors import SparselandError
from sparseland.tasks.needles import WRONG
from sparseland.tasks.sample import Sample, build, haystack, rng_of, token_count

COMMON = 4
COMMON_TIMES, RARE_TIMES = 30, 3
# The common words' part of a list that is too short for 30 of each.
SHARE = 0.4

_INTRO = "Below is a numbered list of words. Some of them come more often than the others. Remember those."
_QUESTION = f"What are the {COMMON} most common words in the list above?"
_START = f"The {COMMON} most common words in the list are:"


def common_words(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` prompts of ``length`` tokens: a shuffled list of words of ``text``, as long as it fits.

    Right is an answer that names the four common words, in any order; in a wrong one that is offered, one
    of them is a rare word of the list. The tokens that are left are filled with a piece of ``text``
    before the list. ``depth`` is 0.5: what is asked lies everywhere.

    Args:
        tokenizer: of the model under test; its chat template is used where it has one.
        text: where words and filler come from.
        length: tokens of a prompt.
        count: prompts.
        seed: equal seeds give equal prompts.

    Raises:
        SparselandError: the text has too few different words, or the length is too small.
    """
    vocabulary = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
    samples = []
    for i in range(count):
        rng = rng_of("common-words", length, seed, i)
        filler = haystack(tokenizer, text, length, rng)
        pool = rng.sample(vocabulary, len(vocabulary))
        listed = _longest(tokenizer, pool, length, f"{seed}/{i}")
        common, rare = pool[:COMMON], sorted(set(listed) - set(pool[:COMMON]))
        wrong = rng.sample(rare, min(WRONG, len(rare)))
        samples.append(
            build(
                tokenizer,
                task="common-words",
                length=length,
                depth=0.5,
                document=partial(_document, listed),
                filler=filler,
                question=_QUESTION,
                answer_start=_START,
                facts=[f" {word}" for word in common],
                joint=",",
                others=[
                    [f" {new if j == k % COMMON else word}" for j, word in enumerate(common)]
                    for k, new in enumerate(wrong)
                ],
            )
        )
    return samples


def word_list(pool: list[str], size: int, seed: str) -> list[str]:
    """A shuffled list of about ``size`` words: the first four of ``pool`` often, the next ones rarely.

    Raises:
        SparselandError: the pool is too small.
    """
    often = min(COMMON_TIMES, max(2 * RARE_TIMES, int(SHARE * size / COMMON)))
    n_rare = max(1, (size - COMMON * often) // RARE_TIMES)
    if COMMON + n_rare > len(pool):
        raise SparselandError(
            f"the text has {len(pool)} different words of 4 to 9 letters; {COMMON + n_rare} are needed "
            "for task common-words"
        )
    repeated = ([w] * often for w in pool[:COMMON])
    rare = ([w] * RARE_TIMES for w in pool[COMMON : COMMON + n_rare])
    listed = [*chain.from_iterable(repeated), *chain.from_iterable(rare)]
    random.Random(seed).shuffle(listed)
    return listed


def _longest(tokenizer: Any, pool: list[str], length: int, seed: str) -> list[str]:
    """The longest list whose prompt, without filler, has at most ``length`` tokens."""

    def tokens(size: int) -> int:
        listed = word_list(pool, size, seed)
        return token_count(tokenizer, f"{_document(listed, '')}\n\n{_QUESTION}", _START)

    least = COMMON * 2 * RARE_TIMES + RARE_TIMES
    if (fixed := tokens(least)) > length:
        raise SparselandError(
            f"length={length} is too short for task common-words; it needs at least {fixed} tokens"
        )
    # Guess from the shorter list, then close in: the numbers grow longer, words differ.
    size, per_word = least, max(1.0, fixed / least)
    for _ in range(6):
        spare = length - tokens(size)
        if 0 <= spare <= RARE_TIMES * per_word:
            break
        size = max(least, size + int(spare / per_word) - (spare < 0))
    while tokens(size) > length:
        size -= RARE_TIMES
    return word_list(pool, size, seed)


def _document(listed: list[str], filler: str) -> str:
    head = f"{filler}\n\n" if filler else ""
    return f"{head}{_INTRO}\n\n" + " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
