"""Needles: real prompts taken apart again. Facts once, at the promised depth, and the right one is asked."""

import random
import re

import pytest

from sparseland.errors import SparselandError
from sparseland.tasks import TASKS
from sparseland.tasks.needles import new_keys, new_numbers, spread

FACT = re.compile(r"(?:The|One of the) special magic numbers? for (\w+ \w+) is (\d{7})\. ")
QUESTION = re.compile(r"special magic numbers? for (\w+ \w+) in the text above\?")
LENGTH = 1024


def places(sample):
    """(key, value, depth in the text without the facts), in the order of the prompt."""
    text = sample.prompt_text.split("follows the text.\n\n", 1)[1].rsplit("\n\nWhat ", 1)[0]
    total = len(FACT.sub("", text))
    found, facts_before = [], 0
    for match in FACT.finditer(text):
        found.append((*match.groups(), (match.start() - facts_before) / total))
        facts_before += len(match[0])
    return found


@pytest.fixture(scope="module", params=["needle", "needle-multi-key", "needle-multi-value"])
def samples(request, tokenizer, text):
    return TASKS[request.param](tokenizer, text, LENGTH if tokenizer.chat_template else 4 * LENGTH, 5, 0)


def test_the_asked_fact_stands_at_its_depth(samples):
    assert [s.depth for s in samples] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for sample in samples:
        asked = QUESTION.search(sample.prompt_text)[1]
        depth = min((d for key, value, d in places(sample) if value == sample.facts[0]), default=-1)
        assert depth == pytest.approx(sample.depth, abs=0.05)
        assert {v for key, v, _ in places(sample) if key == asked} == set(sample.facts)


def test_every_value_stands_in_the_prompt_once(samples):
    expected = {"needle": 1, "needle-multi-key": 4, "needle-multi-value": 2}
    for sample in samples:
        found = places(sample)
        assert len(found) == expected[sample.task]
        for _, value, _ in found:
            assert sample.prompt_text.count(value) == 1
        assert len({key for key, _, _ in found}) == (4 if sample.task == "needle-multi-key" else 1)


def test_other_facts_are_evenly_spread(samples):
    for sample in samples:
        found = sorted(d for _, _, d in places(sample))
        expected = sorted((sample.depth + i / len(found)) % 1 for i in range(len(found)))
        assert found == pytest.approx(expected, abs=0.05)


def test_the_prompt_opens_the_answer_but_does_not_give_it(samples):
    for sample in samples:
        key = QUESTION.search(sample.prompt_text)[1]
        assert re.search(rf"(The|One of the) special magic numbers? for {key} is$", sample.prompt_text)


def test_the_gold_answer_is_the_value(samples, tokenizer):
    for sample in samples:
        said = tokenizer.decode(sample.answer)
        if sample.task == "needle-multi-value":
            a, b = sample.facts
            assert said == f" {a}, and the other one is {b}"
            other = sample.answers[1]
            assert tokenizer.decode(other.ids) == f" {b}, and the other one is {a}"
            assert tokenizer.decode(other.ids[~other.asked]) == ", and the other one is"
        else:
            assert said == f" {sample.facts[0]}"
            assert len(sample.answers) == 1


def test_depths_round_the_text():
    assert spread(0.7, 4) == pytest.approx([0.7, 0.95, 0.2, 0.45])
    assert spread(0.3, 1) == [0.3]


def test_keys_and_numbers_are_new_to_the_text():
    every = new_keys(10_000, "", random.Random(0))
    assert len(every) == len(set(every)) == 576
    assert "amber anchor" not in new_keys(10_000, "an amber anchor", random.Random(0))
    assert new_keys(1, "", random.Random(0), joint="_")[0] == every[0].replace(" ", "_")
    digits = "12345678"
    assert new_numbers(1, 1, digits, random.Random(0)) == ["9"]
    numbers = new_numbers(500, 3, "", random.Random(0))
    assert len(set(numbers)) == 500
    assert all(re.fullmatch(r"[1-9]\d\d", n) for n in numbers)


# ------------------------------------------------------- every task alike


# Stories are written, not filled with the user's text.
READ_TEXT = [task for task in TASKS if not task.startswith("story")]


@pytest.mark.parametrize("task", TASKS)
def test_lengths_are_exact(task, tokenizer, text):
    # Six chapters take more than a thousand letters.
    long = task.startswith("story") and not tokenizer.chat_template
    for length in (2000, 3000) if long else (640, 1500):
        for sample in TASKS[task](tokenizer, text, length, 3, 1):
            assert 0.99 * length <= len(sample.prompt) <= length
            assert sample.length == length
            assert sample.task == task


@pytest.mark.parametrize("task", TASKS)
def test_equal_seeds_give_equal_prompts_and_others_give_others(task, smollm, text):
    def prompts(seed):
        return [tuple(s.prompt.tolist()) for s in TASKS[task](smollm, text, 640, 3, seed)]

    first = prompts(0)
    assert prompts(0) == first
    assert len({*first, *prompts(1)}) == 6


def test_a_sample_does_not_depend_on_how_many_are_made(smollm, text):
    (alone,) = TASKS["needle"](smollm, text, 640, 1, 0)
    first, second = TASKS["needle"](smollm, text, 640, 2, 0)
    assert alone.facts == first.facts
    assert alone.facts != second.facts


@pytest.mark.parametrize("task", TASKS)
def test_a_length_too_small_for_the_task_is_refused(task, smollm, text):
    with pytest.raises(SparselandError, match=f"length=24 is too short for task {task}"):
        TASKS[task](smollm, text, 24, 1, 0)


@pytest.mark.parametrize("task", sorted(set(READ_TEXT) - {"retrieval", "common-words"}))
def test_a_text_too_short_for_the_length_is_refused_with_its_tokens(task, smollm):
    text = "A short story. " * 20
    with pytest.raises(SparselandError) as error:
        TASKS[task](smollm, text, 640, 1, 0)
    counts = re.match(r"the text has (\d+) tokens; at least (\d+) are", str(error.value))
    have, need = map(int, counts.groups())
    assert have == pytest.approx(len(smollm(text)["input_ids"]), abs=3)  # it is joined to itself
    assert have < need < 640


@pytest.mark.parametrize("task", READ_TEXT)
def test_an_empty_text_is_refused(task, smollm):
    with pytest.raises(SparselandError, match="the text is empty"):
        TASKS[task](smollm, " \n", 640, 1, 0)
