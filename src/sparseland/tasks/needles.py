"""Needles in real text: one or several facts hidden in a long document, one of them asked for.

After Kamradt, "Needle in a haystack" (2023), and the single-, multi-key and multi-value variants of
Hsieh et al., "RULER" (2024), section 3.1: the haystack is the user's text, keys are pairs of words,
values are seven-digit numbers. The beginning of the answer is given, so that even small models answer.
"""

from __future__ import annotations

import random
from functools import partial
from typing import Any

from sparseland.tasks.sample import Sample, build, depths, haystack, insert, rng_of

KEYS = 4
VALUES = 2
WRONG = 4  # wrong answers that are offered beside the right one

_COLOURS = (
    "amber",
    "azure",
    "black",
    "bronze",
    "brown",
    "cobalt",
    "copper",
    "coral",
    "crimson",
    "golden",
    "green",
    "indigo",
    "ivory",
    "jade",
    "lilac",
    "maroon",
    "olive",
    "orange",
    "pearl",
    "purple",
    "scarlet",
    "silver",
    "violet",
    "white",
)
_THINGS = (
    "anchor",
    "badger",
    "barrel",
    "bridge",
    "candle",
    "canyon",
    "castle",
    "cactus",
    "dolphin",
    "eagle",
    "falcon",
    "forest",
    "garden",
    "glacier",
    "harbor",
    "island",
    "kettle",
    "lantern",
    "meadow",
    "mirror",
    "otter",
    "piano",
    "rocket",
    "tiger",
)

_INTRO = (
    "Some special magic numbers are hidden in the text below. Remember them: one question follows the text."
)


def needle(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` prompts of ``length`` tokens with one fact each, at evenly spread depths.

    Args:
        tokenizer: of the model under test; its chat template is used where it has one.
        text: what the facts are hidden in.
        length: tokens of a prompt.
        count: prompts.
        seed: equal seeds give equal prompts.

    Raises:
        SparselandError: the text is too short, or the length too small.
    """
    return [
        _one_of_keys(tokenizer, text, length, depth, rng_of("needle", length, seed, i), 1, "needle")
        for i, depth in enumerate(depths(count))
    ]


def needle_multi_key(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """As :func:`needle`, with three more facts about other keys, spread evenly through the text."""
    name = "needle-multi-key"
    return [
        _one_of_keys(tokenizer, text, length, depth, rng_of(name, length, seed, i), KEYS, name)
        for i, depth in enumerate(depths(count))
    ]


def needle_multi_value(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """As :func:`needle`, with two facts about the same key, half a text apart; both are asked for.

    Right is an answer that names both values, in either order. The words between them are given, so
    that the score is about finding values and not about how a model likes to write a list.
    """
    name, samples = "needle-multi-value", []
    for i, depth in enumerate(depths(count)):
        rng = rng_of(name, length, seed, i)
        filler = haystack(tokenizer, text, length, rng)
        key = new_keys(1, filler, rng)[0]
        values = new_numbers(VALUES, 7, filler, rng)
        fact = f"One of the special magic numbers for {key} is"
        facts = [(spot, f"{fact} {v}.") for spot, v in zip(spread(depth, VALUES), values, strict=True)]
        samples.append(
            build(
                tokenizer,
                task=name,
                length=length,
                depth=depth,
                document=partial(_document, facts),
                filler=filler,
                question=f"What are the {VALUES} special magic numbers for {key} in the text above?",
                answer_start=fact,
                facts=[f" {value}" for value in values],
                joint=", and the other one is",
                others=[
                    [f" {wrong}" if j == k % VALUES else f" {value}" for j, value in enumerate(values)]
                    for k in range(WRONG)
                    for wrong in misread(values[k % VALUES], 1, rng)
                ],
            )
        )
    return samples


def _one_of_keys(
    tokenizer: Any, text: str, length: int, depth: float, rng: random.Random, n_keys: int, name: str
) -> Sample:
    filler = haystack(tokenizer, text, length, rng)
    keys, values = new_keys(n_keys, filler, rng), new_numbers(n_keys, 7, filler, rng)
    facts = [
        (spot, f"The special magic number for {key} is {value}.")
        for spot, key, value in zip(spread(depth, n_keys), keys, values, strict=True)
    ]
    # The numbers of other keys first: they are in the text, and only the key tells them apart.
    wrong = [*values[1:], *misread(values[0], WRONG - n_keys + 1, rng)]
    return build(
        tokenizer,
        task=name,
        length=length,
        depth=depth,
        document=partial(_document, facts),
        filler=filler,
        question=f"What is the special magic number for {keys[0]} in the text above?",
        answer_start=f"The special magic number for {keys[0]} is",
        facts=[f" {values[0]}"],
        others=[[f" {value}"] for value in wrong],
    )


def _document(facts: list[tuple[float, str]], filler: str) -> str:
    return f"{_INTRO}\n\n{insert(filler, facts)}"


def spread(first: float, count: int) -> list[float]:
    """``count`` depths at equal distances round the text, beginning with ``first``."""
    return [(first + i / count) % 1 for i in range(count)]


def misread(number: str, count: int, rng: random.Random) -> list[str]:
    """``count`` numbers that differ from this one in one digit, each at another place."""
    wrong = []
    for at in rng.sample(range(1, len(number)), count):
        other = rng.choice([digit for digit in "0123456789" if digit != number[at]])
        wrong.append(number[:at] + other + number[at + 1 :])
    return wrong


def new_keys(count: int, text: str, rng: random.Random, joint: str = " ") -> list[str]:
    """Different two-word names that do not occur in the text."""
    names = [f"{colour}{joint}{thing}" for colour in _COLOURS for thing in _THINGS]
    return [name for name in rng.sample(names, len(names)) if name not in text][:count]


def new_numbers(count: int, digits: int, text: str, rng: random.Random) -> list[str]:
    """Different numbers of so many digits that do not occur in the text."""
    found: dict[str, None] = {}
    while len(found) < count:
        number = str(rng.randrange(10 ** (digits - 1), 10**digits))
        if number not in text:
            found[number] = None
    return list(found)
