"""Variable tracking: the chains are read out of the prompt and followed, step by step."""

import re
from itertools import pairwise

import pytest

from sparseland.tasks.variables import variables

LINK = re.compile(r"VAR (\w+) = (?:VAR (\w+)|(\d{5}))\. ")
LENGTH = 1536


@pytest.fixture(scope="module")
def samples(smollm, text):
    return variables(smollm, text, LENGTH, 4, 0)


def document(sample):
    return sample.prompt_text.split("follows the text.\n\n", 1)[1].rsplit("\n\nWhich ", 1)[0]


def chains(sample):
    """Value -> its variables in the order of their assignment; a link before its source is an error."""
    value_of, found = {}, {}
    for name, source, value in LINK.findall(document(sample)):
        value_of[name] = value or value_of[source]
        found.setdefault(value_of[name], []).append(name)
    return found


def test_following_the_chain_gives_the_facts(samples):
    for sample in samples:
        asked = re.search(r"have the value (\d{5}) in the text above", sample.prompt_text)[1]
        assert chains(sample)[asked] == list(sample.facts)
        assert len(sample.facts) == 3


def test_there_are_two_chains_of_three_and_sources_come_first(samples):
    for sample in samples:
        found = chains(sample)
        assert sorted(map(len, found.values())) == [3, 3]
        assert len({name for chain in found.values() for name in chain}) == 6


def test_the_asked_chain_begins_at_its_depth_and_is_evenly_spread(samples):
    for sample in samples:
        text = document(sample)
        total, before, places = len(LINK.sub("", text)), 0, {}
        for match in LINK.finditer(text):
            places[match[1]] = (match.start() - before) / total
            before += len(match[0])
        found = [places[name] for name in sample.facts]
        step = (1 - sample.depth) / 3
        assert found == pytest.approx([sample.depth + i * step for i in range(3)], abs=0.05)
        assert all(a <= b for a, b in pairwise(found))


def test_all_three_must_be_named_in_any_order(samples, smollm):
    for sample in samples:
        assert sample.prompt_text.endswith(": VAR")
        said = {smollm.decode(answer.ids) for answer in sample.answers}
        assert len(said) == 6
        for words in said:
            assert set(words.split(", VAR")) == {f" {name}" for name in sample.facts}
        for answer in sample.answers:
            assert smollm.decode(answer.ids[~answer.asked]) == ", VAR, VAR"
