"""Questions about a generated story: a fact of one chapter, a step through the plot, chapters without a fact.

After Nawrot et al., "The Sparse Frontier" (2025), whose three tasks differ in how much of the text has to be
attended and how hard it is to find: *retrieval* (one chapter, named by its number), *multi-hop* (which item
was bought before this one), *filtering* (in which chapters nothing was bought). Each chapter has a place, a
reason to go there, somebody who is met, an event and, mostly, a purchase; some have a sale. One question a
story, where the paper asks up to 16, so that small models can answer.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparseland.errors import SparselandError
from sparseland.tasks import _story_words as words
from sparseland.tasks.needles import WRONG
from sparseland.tasks.sample import Sample, build, depths, rng_of, token_count

EMPTY = 3  # chapters in which nothing is bought
LEAST = 6  # chapters that a question needs
MOST = 400  # there are so many different places

_INTRO = "Read this story about the travels of {hero}. A question follows it."


@dataclass(frozen=True)
class Chapter:
    """What happens in a chapter; ``bought`` and ``sold`` are items or None."""

    place: str
    person: str
    text: str
    bought: str | None


@dataclass(frozen=True)
class Story:
    """A hero and the chapters, in their order (the first has number 1)."""

    hero: str
    chapters: tuple[Chapter, ...]

    def document(self, filler: str) -> str:
        """The story as text, the filler as its prologue."""
        head = f"Prologue\n{filler.strip()} …\n\n" if filler.strip() else ""
        told = "\n\n".join(f"Chapter {i}\n{c.text}" for i, c in enumerate(self.chapters, start=1))
        return f"{_INTRO.format(hero=self.hero)}\n\n{head}{told}"

    @property
    def purchases(self) -> list[tuple[int, str]]:
        """Chapter number and item of every purchase."""
        return [(i, c.bought) for i, c in enumerate(self.chapters, start=1) if c.bought is not None]

    @property
    def empty(self) -> list[int]:
        """Numbers of the chapters without one."""
        return [i for i, c in enumerate(self.chapters, start=1) if c.bought is None]


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer begins, what has to follow it, and what would be wrong."""

    text: str
    start: str
    facts: list[str]
    others: list[list[str]]
    joint: str = ""


def story_retrieval(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` stories of ``length`` tokens; where the hero is, whom the hero meets, or what is bought.

    The chapter is named by its number; wrong answers that are offered are those of other chapters. ``text``
    is not used.

    Raises:
        SparselandError: the length holds fewer than six chapters, or more than there are places.
    """
    return _samples("story-retrieval", tokenizer, length, count, seed, _retrieval)


def story_multi_hop(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` stories of ``length`` tokens; which item was bought last before another one.

    There may be chapters without purchase between the two. Wrong answers that are offered are other
    purchases, the one after the named item first. ``text`` is not used.

    Raises:
        SparselandError: as for :func:`story_retrieval`.
    """
    return _samples("story-multi-hop", tokenizer, length, count, seed, _multi_hop)


def story_filtering(tokenizer: Any, text: str, length: int, count: int, seed: int) -> list[Sample]:
    """``count`` stories of ``length`` tokens; the three chapters in which the hero buys nothing.

    Right is an answer that names all three numbers, in any order; in a wrong one that is offered, one of
    them is another. ``text`` is not used.

    Raises:
        SparselandError: as for :func:`story_retrieval`.
    """
    return _samples("story-filtering", tokenizer, length, count, seed, _filtering)


Ask = Callable[[Story, float, int, random.Random], Question]


def _samples(name: str, tokenizer: Any, length: int, count: int, seed: int, ask: Ask) -> list[Sample]:
    samples = []
    for i, depth in enumerate(depths(count)):
        rng = rng_of(name, length, seed, i)
        plot = rng.getrandbits(32)

        def pair(n: int, plot: int = plot, depth: float = depth, kind: int = i) -> tuple[Story, Question]:
            own = random.Random(plot)
            story = write(n, depth, own)
            return story, ask(story, depth, kind, own)

        story, question = pair(_chapters_that_fit(tokenizer, pair, length, name))
        samples.append(
            build(
                tokenizer,
                task=name,
                length=length,
                depth=depth,
                document=story.document,
                filler=words.prologue(max(4000, 2 * length), rng),
                question=question.text,
                answer_start=question.start,
                facts=question.facts,
                joint=question.joint,
                others=question.others,
            )
        )
    return samples


def _chapters_that_fit(
    tokenizer: Any, pair: Callable[[int], tuple[Story, Question]], length: int, name: str
) -> int:
    """The most chapters whose prompt, without prologue, has at most ``length`` tokens."""

    def tokens(n: int) -> int:
        story, question = pair(n)
        return token_count(tokenizer, f"{story.document('')}\n\n{question.text}", question.start)

    least = tokens(LEAST)
    if least > length:
        raise SparselandError(
            f"length={length} is too short for task {name}; it needs at least {least} tokens"
        )
    per_chapter = max(1.0, (tokens(2 * LEAST) - least) / LEAST)
    n = LEAST + int((length - least) / per_chapter)
    if n > MOST:
        raise SparselandError(
            f"length={length} is too long for task {name}; its stories have at most {MOST} chapters"
        )
    while tokens(n) > length:
        n -= 1
    return n


def write(n: int, depth: float, rng: random.Random) -> Story:
    """A story of ``n`` chapters, three of them without purchase, one of these at ``depth``."""
    hero = rng.choice(words.HEROES)
    at = int(depth * n)
    empty = {at, *rng.sample([i for i in range(n) if i != at], EMPTY - 1)}
    goods, towns, folk = words.items(n, rng), words.places(n, rng), words.people(n, rng)
    chapters: list[Chapter] = []
    owned: list[str] = []
    for i in range(n):
        sentences = [
            f"{hero} goes to {towns[i]} {rng.choice(words.REASONS)}.",
            f"There {hero} meets {folk[i]}, {rng.choice(words.TRADES)}.",
            f"That day {rng.choice(words.EVENTS)}.",
        ]
        bought = None if i in empty else goods[i]
        trade = []
        if owned and rng.random() < 0.4:
            trade.append(f"{hero} sells the {owned.pop(rng.randrange(len(owned)))}.")
        if bought is None:
            trade.append(rng.choice(words.IDLE))
        else:
            trade.append(f"{hero} buys the {bought}.")
            owned.append(bought)
        rng.shuffle(trade)
        chapters.append(Chapter(towns[i], folk[i], " ".join(sentences + trade), bought))
    return Story(hero, tuple(chapters))


def _retrieval(story: Story, depth: float, kind: int, rng: random.Random) -> Question:
    """The kinds of question take turns over the samples."""
    hero, numbers = story.hero, range(1, len(story.chapters) + 1)
    if kind % 3 == 2:
        values = dict(story.purchases)
        ask, start = "What does {hero} buy in Chapter {n}?", "In Chapter {n}, {hero} buys the"
    else:
        whom = kind % 3
        values = {n: story.chapters[n - 1].person if whom else story.chapters[n - 1].place for n in numbers}
        ask = "Whom does {hero} meet in Chapter {n}?" if whom else "Where is {hero} in Chapter {n}?"
        start = "In Chapter {n}, {hero} meets" if whom else "In Chapter {n}, {hero} is in"
    n = min(values, key=lambda i: abs(i - 1 - depth * len(story.chapters)))
    wrong = rng.sample([value for i, value in values.items() if i != n], min(WRONG, len(values) - 1))
    said = {"hero": hero, "n": n}
    return Question(
        ask.format(**said), start.format(**said), [f" {values[n]}"], [[f" {value}"] for value in wrong]
    )


def _multi_hop(story: Story, depth: float, kind: int, rng: random.Random) -> Question:
    bought = [item for _, item in story.purchases]
    at = max(1, min(len(bought) - 2, round(depth * len(bought))))
    named, right, after = bought[at], bought[at - 1], bought[at + 1]
    rest = [item for item in bought if item not in (named, right, after)]
    wrong = [after, *rng.sample(rest, min(WRONG - 1, len(rest)))]
    return Question(
        f"What is the last item that {story.hero} buys before the {named}?",
        f"The last item that {story.hero} buys before the {named} is the",
        [f" {right}"],
        [[f" {item}"] for item in wrong],
    )


def _filtering(story: Story, depth: float, kind: int, rng: random.Random) -> Question:
    right = story.empty
    full = [n for n, _ in story.purchases]
    swapped = []
    for i, new in enumerate(rng.sample(full, min(WRONG, len(full)))):
        swapped.append(sorted([*right[: i % EMPTY], *right[i % EMPTY + 1 :], new]))
    return Question(
        f"In which {EMPTY} chapters does {story.hero} buy nothing?",
        f"{story.hero} buys nothing in the chapters",
        [f" {n}" for n in right],
        [[f" {n}" for n in wrong] for wrong in swapped],
        joint=",",
    )
