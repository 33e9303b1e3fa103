"""Variable tracking: chains of assignments scattered through real text.

After Hsieh et al., "RULER" (2024), section 3.2: ``VAR a = 12345``, later ``VAR b = VAR a``, later
``VAR c = VAR b``; which variables have the value 12345? To answer, a model has to follow the chain
through the whole text; a second chain with another value misleads those that only look for ``VAR``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from sparseland.tasks.needles import new_keys, new_numbers
from sparseland.tasks.sample import Sample, build, depths, haystack, insert, rng_of

CHAINS = 2
HOPS = 2

_INTRO = "Assignments to variables are hidden in the text below. Follow them: one question follows the text."


def variables(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` prompts of ``length`` tokens with two chains of three variables, one of them asked for.

    Right is an answer that names all variables of the chain, in any order; the ``VAR`` before each is
    given. ``depth`` is where the asked chain begins; its links follow in order, evenly spread over the
    rest of the text.

    Args:
        tokenizer: of the model under test; its chat template is used where it has one.
        text: what the assignments are hidden in.
        length: tokens of a prompt.
        count: prompts.
        seed: equal seeds give equal prompts.

    Raises:
        SparselandError: the text is too short, or the length too small.
    """
    samples = []
    for i, depth in enumerate(depths(count)):
        rng = rng_of("variables", length, seed, i)
        filler = haystack(tokenizer, text, length, rng)
        names = new_keys(CHAINS * (HOPS + 1), filler, rng, joint="_")
        values = new_numbers(CHAINS, 5, filler, rng)
        chains = [names[c * (HOPS + 1) : (c + 1) * (HOPS + 1)] for c in range(CHAINS)]
        starts = [depth, *(rng.random() for _ in chains[1:])]
        links = [
            link
            for chain, value, start in zip(chains, values, starts, strict=True)
            for link in _links(chain, value, start)
        ]
        samples.append(
            build(
                tokenizer,
                task="variables",
                length=length,
                depth=depth,
                document=partial(_document, links),
                filler=filler,
                question=f"Which {HOPS + 1} variables have the value {values[0]} in the text above?",
                answer_start=f"These variables have the value {values[0]}: VAR",
                facts=[f" {name}" for name in chains[0]],
                joint=", VAR",
                others=[[f" {name}" for name in wrong] for wrong in _mixed(*chains)],
            )
        )
    return samples


def _mixed(right: list[str], other: list[str]) -> list[list[str]]:
    """The other chain, and the right one with one variable of the other."""
    swapped = [[*right[:i], other[i], *right[i + 1 :]] for i in range(len(right))]
    return [other, *swapped]


def _links(chain: list[str], value: str, start: float) -> list[tuple[float, str]]:
    """The assignments of a chain with their depths, from ``start`` to the end in equal steps."""
    step = (1 - start) / len(chain)
    sources = [value, *(f"VAR {name}" for name in chain[:-1])]
    return [
        (start + i * step, f"VAR {name} = {source}.")
        for i, (name, source) in enumerate(zip(chain, sources, strict=True))
    ]


def _document(links: list[tuple[float, str]], filler: str) -> str:
    return f"{_INTRO}\n\n{insert(filler, links)}"
