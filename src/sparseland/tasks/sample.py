"""One question about one long prompt, built to an exact number of tokens.

A task supplies a document (which grows with a filler), a question, how the answer begins and what then
has to follow. :func:`build` puts them into the model's chat template and chooses the filler so that the
prompt fits the asked length.
"""

from __future__ import annotations

import math
import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparseland.errors import SparselandError

# A prompt has at most the asked number of tokens, and at least this share of it.
MIN_FILL = 0.99


@dataclass(frozen=True)
class Answer:
    """One right continuation of a prompt.

    Args:
        ids: its tokens.
        asked: True where the model must say the token; False where it is given, as the beginning of the
            answer is (the words between two facts).
    """

    ids: Int[Tensor, " M"]
    asked: Bool[Tensor, " M"]


@dataclass(frozen=True)
class Sample:
    """A prompt and what greedy decoding must say next.

    Args:
        task: name in ``TASKS``.
        length: asked length; the prompt has at most this many tokens and at most 1 % fewer. The answer
            comes on top.
        depth: where in the document the (first) asked fact stands, 0 = start, 1 = end.
        prompt: token ids, chat template and the beginning of the answer included.
        answers: the right continuations: the gold one, then the same facts in other orders.
        prompt_text: the prompt as text.
        facts: what has to be said, as it stands in the prompt.
        opened: how many of the prompt's last tokens begin the answer.
        others: wrong continuations of the same form, for asking which one the model finds likeliest.
    """

    task: str
    length: int
    depth: float
    prompt: Int[Tensor, " N"]
    answers: tuple[Answer, ...]
    prompt_text: str
    facts: tuple[str, ...]
    opened: int = 0
    others: tuple[Answer, ...] = ()

    @property
    def answer(self) -> Int[Tensor, " M"]:
        """Tokens of the gold answer."""
        return self.answers[0].ids


def depths(count: int) -> list[float]:
    """The middles of ``count`` equal parts of the document, so that each sample stands for its part."""
    return [(i + 0.5) / count for i in range(count)]


def rng_of(task: str, length: int, seed: int, index: int) -> random.Random:
    """The random numbers of one sample; independent of how many others are made."""
    return random.Random(f"{task}/{length}/{seed}/{index}")


def build(
    tokenizer: Any,
    *,
    task: str,
    length: int,
    depth: float,
    document: Callable[[str], str],
    filler: str,
    question: str,
    answer_start: str,
    facts: Sequence[str],
    joint: str = "",
    others: Sequence[Sequence[str]] = (),
) -> Sample:
    """A sample of ``length`` tokens.

    Args:
        document: filler -> document; longer filler, longer document.
        filler: text to take the beginning of.
        question: what is asked below the document.
        answer_start: how the assistant's answer begins; part of the prompt.
        facts: what has to follow it, in any order; each with the blank before it, if there is one.
        joint: what stands between two facts; given, not asked.
        others: wrong facts, written like the right ones.

    Raises:
        SparselandError: the filler is too short, or the length too small for the task.
    """

    def text(n: int) -> str:
        return _chat(tokenizer, f"{document(filler[:n])}\n\n{question}", answer_start)

    n = _fit(lambda n: len(_encode(tokenizer, text(n))), filler, length, task, tokenizer)
    prompt_text = text(n)
    return Sample(
        task=task,
        length=length,
        depth=depth,
        prompt=torch.tensor(_encode(tokenizer, prompt_text), dtype=torch.long),
        answers=tuple(_answer(tokenizer, answer_start, order, joint) for order in permutations(facts)),
        prompt_text=prompt_text,
        facts=tuple(fact.strip() for fact in facts),
        opened=len(_encode(tokenizer, answer_start, plain=True)),
        others=tuple(_answer(tokenizer, answer_start, wrong, joint) for wrong in others),
    )


def _answer(tokenizer: Any, start: str, facts: Sequence[str], joint: str) -> Answer:
    """The tokens of ``start fact joint fact …`` behind ``start``; what stands before it has no say."""
    said, ids = start, _encode(tokenizer, start, plain=True)
    begin, asked = len(ids), []
    for i, fact in enumerate(facts):
        for piece, is_fact in ((joint, False), (fact, True))[i == 0 :]:
            said += piece
            longer = _encode(tokenizer, said, plain=True)
            if longer[: len(ids)] != ids:
                raise SparselandError(f"this tokenizer joins {piece!r} to what stands before it")
            asked += [is_fact] * (len(longer) - len(ids))
            ids = longer
    return Answer(torch.tensor(ids[begin:], dtype=torch.long), torch.tensor(asked, dtype=torch.bool))


def token_count(tokenizer: Any, message: str, answer_start: str) -> int:
    """Tokens of a prompt with this message."""
    return len(_encode(tokenizer, _chat(tokenizer, message, answer_start)))


def _chat(tokenizer: Any, message: str, answer_start: str) -> str:
    """The message in the chat template (as is for models without one), up to the answer's beginning."""
    if not getattr(tokenizer, "chat_template", None):
        return f"{message}\n\n{answer_start}"
    opened = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # templates of reasoning models then open the answer itself
    )
    return f"{opened}{answer_start}"


def _encode(tokenizer: Any, text: str, plain: bool = False) -> list[int]:
    """Token ids; a chat template brings its special tokens itself."""
    special = not plain and not getattr(tokenizer, "chat_template", None)
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def _fit(tokens: Callable[[int], int], filler: str, length: int, task: str, tokenizer: Any) -> int:
    """The number of filler characters with which the prompt has ``length`` tokens, or up to 1 % fewer."""
    least = math.ceil(MIN_FILL * length)
    if (fixed := tokens(0)) > length:
        raise SparselandError(
            f"length={length} is too short for task {task}; it needs at least {fixed} tokens"
        )
    high = min(4 * length, len(filler))
    while tokens(high) <= length and high < len(filler):
        high = min(2 * high, len(filler))
    if tokens(high) < least:
        have = len(_encode(tokenizer, filler, plain=True))
        raise SparselandError(
            f"the text has {have} tokens; at least {least - fixed} are needed "
            f"for task {task} at length {length}"
        )
    n = max(bisect_right(range(high + 1), length, key=tokens) - 1, 0)
    # The count is not quite monotone (pieces move with the filler), so look around; whole words first.
    words = [m.start() for m in re.finditer(r"\s", filler[:n])][-8:]
    for near in [
        *reversed(words),
        n,
        *range(n - 1, max(n - 200, -1), -1),
        *range(n + 1, min(n + 200, high + 1)),
    ]:
        if least <= tokens(near) <= length:
            return int(near)
    raise SparselandError(f"no prompt of {least} to {length} tokens can be made of this text for task {task}")


# ------------------------------------------------------------------ documents


def haystack(tokenizer: Any, text: str, length: int, rng: random.Random) -> str:
    """Real text from a random line on, running on from the beginning where it ends.

    Control tokens that happen to be spelled out in the text are taken out, since they would end the
    message in the chat template.
    """
    text = text.strip()
    if not text:
        raise SparselandError("the text is empty")
    start = text.find("\n", rng.randrange(len(text))) + 1  # 0 if no line follows
    reach = 32 * length  # characters; far more than any length needs
    piece = text[start : start + reach]
    if len(piece) < reach:
        piece += "\n\n" + text[:start]
    for token in tokenizer.all_special_tokens:
        piece = piece.replace(token, "")
    return piece


def insert(text: str, facts: Iterable[tuple[float, str]]) -> str:
    """``text`` with each fact put at its depth (0 … 1), after the sentence or line that ends nearest."""
    ends = [0, *(m.end() for m in re.finditer(r"[.!?]\s+|\n+", text)), len(text)]
    blanks = [m.end() for m in re.finditer(r"\s", text)]
    parts, last = [], 0
    for depth, fact in sorted(facts):
        wanted = depth * len(text)
        at = min(ends, key=lambda e: abs(e - wanted))
        if abs(at - wanted) > 0.03 * len(text) and blanks:
            at = min(blanks, key=lambda e: abs(e - wanted))
        at = max(at, last)
        before = text[last:at]
        joint = "" if not before or before[-1].isspace() else " "
        parts += [before, joint, fact, " "]
        last = at
    return "".join([*parts, text[last:]])
