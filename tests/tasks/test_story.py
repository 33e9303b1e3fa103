"""Stories: an oracle that only matches strings answers every question; answers are unique."""

import re

import pytest

from sparseland.errors import SparselandError
from sparseland.tasks import TASKS
from sparseland.tasks.story import EMPTY, write

CHAPTER = re.compile(r"Chapter (\d+)\n(.*?)(?=\n\n|$)", re.S)
COUNT = 9


@pytest.fixture(scope="module", params=["story-retrieval", "story-multi-hop", "story-filtering"])
def samples(request, smollm, text):
    return TASKS[request.param](smollm, text, 1024, COUNT, 0)


def oracle(sample):
    """The facts, by matching strings in the prompt."""
    text = sample.prompt_text
    chapters = {int(n): told for n, told in CHAPTER.findall(text)}
    bought = {n: re.findall(r"buys the (\w+ \w+)\.", told) for n, told in chapters.items()}
    if asked := re.search(r"Where is \w+ in Chapter (\d+)\?", text):
        return re.findall(r"goes to (\w+) ", chapters[int(asked[1])])
    if asked := re.search(r"Whom does \w+ meet in Chapter (\d+)\?", text):
        return re.findall(r"meets (\w+ \w+),", chapters[int(asked[1])])
    if asked := re.search(r"What does \w+ buy in Chapter (\d+)\?", text):
        return bought[int(asked[1])]
    if asked := re.search(r"buys before the (\w+ \w+)\?", text):
        order = [item for n in sorted(bought) for item in bought[n]]
        return [order[order.index(asked[1]) - 1]]
    assert "buy nothing?" in text
    return [str(n) for n, items in bought.items() if not items]


def test_the_oracle_is_always_right(samples):
    for sample in samples:
        assert oracle(sample) == list(sample.facts)


def test_answers_are_unique_and_what_is_offered_beside_them_is_wrong(samples, smollm):
    for sample in samples:
        right = {smollm.decode(answer.ids) for answer in sample.answers}
        wrong = [smollm.decode(other.ids) for other in sample.others]
        assert len(wrong) == len(set(wrong)) == 4
        assert not right & set(wrong)
        if sample.task == "story-filtering":
            assert not {frozenset(re.findall(r"\d+", w)) for w in wrong} & {frozenset(sample.facts)}
        else:
            # They stand in the story, so that being there is no sign of being right.
            assert all(w.strip() in sample.prompt_text for w in wrong)


def test_the_beginning_of_the_answer_is_told_apart(samples, smollm):
    for sample in samples:
        opened = smollm.decode(sample.prompt[-sample.opened :])
        assert sample.prompt_text.endswith(opened)
        assert sample.prompt_text[: -len(opened)].endswith("assistant\n")


def test_the_asked_chapter_lies_at_its_depth(smollm, text):
    for sample in TASKS["story-retrieval"](smollm, text, 1500, COUNT, 1):
        asked = int(re.search(r"in Chapter (\d+)\?", sample.prompt_text)[1])
        assert (asked - 0.5) / len(CHAPTER.findall(sample.prompt_text)) == pytest.approx(
            sample.depth, abs=0.12
        )


def test_kinds_of_question_take_turns(smollm, text):
    asked = [s.prompt_text for s in TASKS["story-retrieval"](smollm, text, 800, 6, 0)]
    assert [("Where is" in t, "Whom does" in t, "What does" in t) for t in asked] == [
        (True, False, False), (False, True, False), (False, False, True),
    ] * 2  # fmt: skip


def test_a_hop_may_skip_chapters_without_purchase(smollm, text):
    import random

    story = write(12, 0.5, random.Random(0))
    assert len(story.empty) == EMPTY
    assert len(story.purchases) == 12 - EMPTY
    assert len({item for _, item in story.purchases}) == 12 - EMPTY
    assert len({c.place for c in story.chapters}) == len({c.person for c in story.chapters}) == 12


def test_longer_prompts_hold_longer_stories(smollm, text):
    counts = [
        len(CHAPTER.findall(TASKS["story-filtering"](smollm, text, n, 1, 0)[0].prompt_text))
        for n in (600, 2400)
    ]
    assert counts[1] > 3 * counts[0]


def test_a_story_longer_than_the_world_has_places_is_refused(smollm, text):
    with pytest.raises(SparselandError, match="at most 400 chapters"):
        TASKS["story-retrieval"](smollm, text, 65536, 1, 0)
