"""Common words and several questions: an oracle that counts, or matches, is always right."""

import re
from collections import Counter
from itertools import pairwise

import pytest

from sparseland.errors import SparselandError
from sparseland.tasks import TASKS
from sparseland.tasks.words import COMMON, RARE_TIMES, word_list

ITEM = re.compile(r"\d+\. ([a-z]+)")


def listed(sample):
    return ITEM.findall(sample.prompt_text.split("Remember those.")[1].split("What are")[0])


@pytest.mark.parametrize("length", [640, 1536])
def test_counting_words_gives_the_common_ones(smollm, text, length):
    for sample in TASKS["common-words"](smollm, text, length, 3, 0):
        counts = Counter(listed(sample)).most_common()
        assert {word for word, _ in counts[:COMMON]} == set(sample.facts)
        assert len({count for _, count in counts[:COMMON]}) == 1
        assert all(count == RARE_TIMES for _, count in counts[COMMON:])
        assert counts[0][1] >= 2 * RARE_TIMES


def test_a_longer_list_has_more_of_both_and_at_most_thirty_of_each():
    pool = [f"word{i}" for i in range(2000)]
    for size in (40, 200, 5000):
        counts = Counter(word_list(pool, size, "0"))
        assert counts["word0"] == min(30, max(6, int(0.4 * size / 4)))
        assert sum(counts.values()) == pytest.approx(size, abs=RARE_TIMES + COMMON)
    with pytest.raises(SparselandError, match="the text has 10 different words"):
        word_list(pool[:10], 200, "0")


def test_common_words_are_spread_over_the_list(smollm, text):
    (sample,) = TASKS["common-words"](smollm, text, 1536, 1, 0)
    words = listed(sample)
    for word in sample.facts:
        places = [i for i, w in enumerate(words) if w == word]
        assert places[0] < len(words) / 3
        assert places[-1] > 2 * len(words) / 3


def test_matching_keys_gives_all_four_numbers(smollm, text):
    for sample in TASKS["needle-multi-query"](smollm, text, 1024, 4, 0):
        question = sample.prompt_text.split("What are the 4 special magic numbers for ")[1]
        keys = re.split(r", | and ", question.split(" in the text")[0])
        found = dict(re.findall(r"special magic number for (\w+ \w+) is (\d{7})\.", sample.prompt_text))
        assert [found[key] for key in keys] == list(sample.facts)
        assert len(sample.answers) == 24
        places = sorted(sample.prompt_text.index(fact) for fact in sample.facts)
        size = len(sample.prompt_text)
        assert all(0.1 < (b - a) / size < 0.4 for a, b in pairwise(places))


@pytest.mark.parametrize("task", ["common-words", "needle-multi-query", "needle", "variables"])
def test_what_is_offered_beside_the_answer_is_wrong(smollm, text, task):
    for sample in TASKS[task](smollm, text, 640, 2, 0):
        right = {frozenset(re.split(r",(?: VAR)? ", smollm.decode(a.ids).strip())) for a in sample.answers}
        assert right == {frozenset(sample.facts)}
        wrong = [frozenset(re.split(r",(?: VAR)? ", smollm.decode(o.ids).strip())) for o in sample.others]
        assert len(set(wrong)) == 4
        assert not right & set(wrong)
        assert all(len(o.ids) == len(o.asked) and o.asked.any() for o in sample.others)
