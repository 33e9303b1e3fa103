"""Key-value retrieval: the JSON object is read out of the prompt and asked."""

import json
import re

import pytest

from sparseland.errors import SparselandError
from sparseland.tasks.retrieval import retrieval

LENGTHS = (160, 1024)


@pytest.fixture(scope="module", params=LENGTHS)
def samples(request, smollm, text):
    return retrieval(smollm, text, request.param, 4, 0)


def pairs(sample):
    written = sample.prompt_text.split("has one value.\n\n", 1)[1].split("\n\nWhat is", 1)[0]
    found = json.loads(written, object_pairs_hook=list)
    assert len(dict(found)) == len(found)
    return found


def test_the_object_gives_the_answer(samples, smollm):
    for sample in samples:
        key = re.search(r'value of the key "(\d{6})" in the JSON object', sample.prompt_text)[1]
        assert dict(pairs(sample))[key] == sample.facts[0]
        assert smollm.decode(sample.answer) == sample.facts[0]
        assert sample.prompt_text.endswith(f'"{key}": "')
        assert len(sample.answers) == 1


def test_the_asked_pair_stands_at_its_depth(samples):
    for sample in samples:
        found = pairs(sample)
        index = next(i for i, (_, value) in enumerate(found) if value == sample.facts[0])
        assert index == int(sample.depth * len(found))
    assert [s.depth for s in samples] == [0.125, 0.375, 0.625, 0.875]


def test_numbers_are_all_different_and_the_value_stands_once(samples):
    for sample in samples:
        numbers = [n for pair in pairs(sample) for n in pair]
        assert len(set(numbers)) == len(numbers)
        assert all(re.fullmatch(r"\d{6}", n) for n in numbers)
        assert sample.prompt_text.count(sample.facts[0]) == 1


def test_as_many_pairs_as_fit(samples, smollm):
    for sample in samples:
        one_pair = len(smollm('"123456": "123456",\n')["input_ids"])
        filler = sample.prompt_text.split("user\n")[-1].split("Each key of this", 1)[0]
        assert len(smollm(filler)["input_ids"]) < one_pair + 3


def test_a_length_for_no_pair_is_refused(smollm, text):
    with pytest.raises(SparselandError, match="length=40 is too short for task retrieval"):
        retrieval(smollm, text, 40, 1, 0)


def test_a_text_that_can_not_fill_the_rest_is_refused(smollm):
    with pytest.raises(SparselandError, match=r"the text has \d+ tokens; at least \d+ are needed for task"):
        retrieval(smollm, "ab", 1024, 8, 0)
