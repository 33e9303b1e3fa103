"""Needles with several questions: four facts about four keys hidden in real text, all of them asked for.

After Hsieh et al., "RULER" (2024), section 3.1 (NIAH with several queries), with the four queries that Nawrot
et al., "The Sparse Frontier" (2025), use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparseland.tasks.needles import WRONG, misread, new_keys, new_numbers, spread
from sparseland.tasks.sample import Sample, build, depths, haystack, insert, rng_of

QUERIES = 4

_INTRO = (
    "Some special magic numbers are hidden in the text below. Remember all of them: one question follows "
    "the text."
)


def needle_multi_query(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` prompts of ``length`` tokens with four facts, spread evenly through the text.

    Right is an answer that names all four numbers, in any order; the commas between them are given. In a
    wrong one that is offered, one digit of one number is another.

    Args:
        tokenizer: of the model under test; its chat template is used where it has one.
        text: what the facts are hidden in.
        length: tokens of a prompt.
        count: prompts.
        seed: equal seeds give equal prompts.

    Raises:
        SparselandError: the text is too short, or the length too small.
    """
    name, samples = "needle-multi-query", []
    for i, depth in enumerate(depths(count)):
        rng = rng_of(name, length, seed, i)
        filler = haystack(tokenizer, text, length, rng)
        keys = new_keys(QUERIES, filler, rng)
        values = new_numbers(QUERIES, 7, filler, rng)
        facts = [
            (spot, f"The special magic number for {key} is {value}.")
            for spot, key, value in zip(spread(depth, QUERIES), keys, values, strict=True)
        ]
        wrong = [misread(values[k % QUERIES], 1, rng)[0] for k in range(WRONG)]
        listed = ", ".join(keys[:-1]) + f" and {keys[-1]}"
        samples.append(
            build(
                tokenizer,
                task=name,
                length=length,
                depth=depth,
                document=partial(_document, facts),
                filler=filler,
                question=f"What are the {QUERIES} special magic numbers for {listed} in the text above?",
                answer_start=f"The special magic numbers for {listed} are",
                facts=[f" {value}" for value in values],
                joint=",",
                others=[
                    [f" {new if j == k % QUERIES else value}" for j, value in enumerate(values)]
                    for k, new in enumerate(wrong)
                ],
            )
        )
    return samples


def _document(facts: list[tuple[float, str]], filler: str) -> str:
    return f"{_INTRO}\n\n{insert(filler, facts)}"
