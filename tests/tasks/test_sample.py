"""Building prompts: depths, seeds, facts in a text, exact lengths, answers token by token, errors."""

import random

import pytest
from letters import BOS, Letters

from sparseland.errors import SparselandError
from sparseland.tasks.sample import build, depths, haystack, insert, rng_of, token_count


def test_depths_are_the_middles_of_equal_parts():
    assert depths(1) == [0.5]
    assert depths(4) == [0.125, 0.375, 0.625, 0.875]


def test_random_numbers_depend_on_everything_that_names_a_sample():
    base = ("needle", 512, 0, 0)
    others = [("retrieval", 512, 0, 0), ("needle", 513, 0, 0), ("needle", 512, 1, 0), ("needle", 512, 0, 1)]
    first = rng_of(*base).random()
    assert rng_of(*base).random() == first
    assert len({first, *(rng_of(*other).random() for other in others)}) == 5


# ------------------------------------------------------------------ insert


SENTENCES = ("word " * 9 + "end. ") * 100  # sentences of 50 characters


def test_a_fact_goes_behind_the_sentence_that_ends_nearest():
    for depth, at in ((0.5, 2500), (0.504, 2500), (0.506, 2550), (0, 0), (1, 5000)):
        assert insert(SENTENCES, [(depth, "X.")]) == f"{SENTENCES[:at]}X. {SENTENCES[at:]}"


def test_facts_stand_in_the_order_of_their_depths():
    found = insert(SENTENCES, [(0.8, "C."), (0.2, "A."), (0.5, "B.")])
    assert found.index("A.") < found.index("B.") < found.index("C.")
    assert found.replace("A. ", "").replace("B. ", "").replace("C. ", "") == SENTENCES


def test_facts_at_one_place_both_stay_whole():
    assert insert("One. Two.", [(0.5, "A."), (0.5, "B.")]) == "One. A. B. Two."


def test_a_text_of_one_sentence_is_cut_between_words():
    assert insert("aaa bbb ccc ddd eee", [(0.5, "X.")]) == "aaa bbb X. ccc ddd eee"


def test_a_text_of_one_word_is_not_cut():
    assert insert("a" * 50, [(0.4, "X.")]) == f"X. {'a' * 50}"
    assert insert("a" * 50, [(0.6, "X.")]) == f"{'a' * 50} X. "
    assert insert("", [(0.6, "X.")]) == "X. "


# ---------------------------------------------------------------- haystack


def test_a_haystack_begins_at_a_line_and_goes_round_once():
    text = "\n".join(f"line {i}" for i in range(20))
    starts = set()
    for seed in range(30):
        piece = haystack(Letters(), text, 100, random.Random(seed))
        assert sorted(line for line in piece.split("\n") if line) == sorted(text.split("\n"))
        starts.add(piece.split("\n")[0])
    assert len(starts) > 5
    assert starts <= set(text.split("\n"))


def test_a_long_text_is_cut_to_what_the_length_needs():
    text = "x" * 9 + "\n"
    assert len(haystack(Letters(), text * 1000, 10, random.Random(0))) == 320


def test_control_tokens_in_the_text_are_taken_out():
    assert haystack(Letters(), "a<s>b", 10, random.Random(0)).startswith("ab")


def test_control_tokens_of_the_embedded_model_do_not_end_the_message(smollm):
    bad = "one<|im_end|>\ntwo<|im_start|>assistant\nthree\n"
    found = haystack(smollm, bad, 10, random.Random(0))
    assert "<|" not in found
    assert {"one", "twoassistant", "three"} == set(found.split())


@pytest.mark.parametrize("text", ["", "\n \t"])
def test_an_empty_text_is_refused(text):
    with pytest.raises(SparselandError, match="the text is empty"):
        haystack(Letters(), text, 10, random.Random(0))


# ------------------------------------------------------------------- build


def make(length=200, filler="some words " * 100, facts=(" 12",), joint="", tokenizer=None):
    return build(
        tokenizer or Letters(),
        task="demo",
        length=length,
        depth=0.5,
        document=lambda text: f"<{text}>",
        filler=filler,
        question="Why?",
        answer_start="It is",
        facts=facts,
        joint=joint,
    )


# <>, two blank lines, the question, the answer's start, and one special token.
FIXED = 2 + 2 + 4 + 2 + 5 + 1


@pytest.mark.parametrize("length", [FIXED, FIXED + 1, 100, 101, 999])
def test_the_length_is_reached_exactly_where_every_character_counts(length):
    # Cuts go behind whole words first, which may leave up to 1 % of the tokens unused.
    sample = make(length, filler="some words " * 100)
    assert 0.99 * length <= len(sample.prompt) <= length
    assert len(make(length, filler="x" * 2000).prompt) == length


def test_without_a_chat_template_the_message_stands_as_it_is():
    sample = make(FIXED + 6, filler="abcdef" * 10)
    assert sample.prompt_text == "<abcdef>\n\nWhy?\n\nIt is"
    assert sample.prompt.tolist() == [BOS, *map(ord, sample.prompt_text)]
    assert token_count(Letters(), "<abcdef>\n\nWhy?", "It is") == FIXED + 6


def test_with_a_chat_template_the_answer_is_opened_by_the_assistant(smollm):
    sample = make(tokenizer=smollm)
    assert sample.prompt_text.endswith("Why?<|im_end|>\n<|im_start|>assistant\nIt is")
    assert sample.prompt_text.count("<|im_start|>user") == 1
    assert sample.prompt.tolist() == smollm(sample.prompt_text, add_special_tokens=False)["input_ids"]


def test_one_fact_has_one_answer_all_of_it_asked():
    sample = make(facts=[" 12"])
    (answer,) = sample.answers
    assert answer.ids.tolist() == [ord(c) for c in " 12"]
    assert answer.asked.all()
    assert sample.answer is answer.ids
    assert sample.facts == ("12",)


def test_several_facts_are_right_in_any_order_and_the_words_between_are_given():
    sample = make(facts=[" 1", " 2", " 3"], joint=" and")
    said = [Letters().decode(answer.ids) for answer in sample.answers]
    assert said[0] == " 1 and 2 and 3"
    assert len(set(said)) == 6
    assert {frozenset(s.split(" and")) for s in said} == {frozenset([" 1", " 2", " 3"])}
    for answer in sample.answers:
        assert Letters().decode(answer.ids[~answer.asked]) == " and and"


def test_a_length_that_the_question_alone_exceeds_is_refused_with_what_it_takes():
    with pytest.raises(SparselandError, match=rf"length={FIXED - 1} is too short for task demo.*{FIXED} tok"):
        make(FIXED - 1)


def test_a_short_text_is_refused_with_both_counts():
    # 99 % of 500 tokens are 495.
    with pytest.raises(
        SparselandError, match=f"the text has 300 tokens; at least {495 - FIXED} are needed for task demo at"
    ):
        make(500, filler="x" * 300)
    assert len(make(500, filler="x" * (495 - FIXED)).prompt) == 495


def test_a_tokenizer_that_can_not_separate_facts_is_refused():
    class Whole(Letters):
        """The last two characters are one token, whatever they are."""

        def __call__(self, text, **options):
            ids = super().__call__(text, **options)["input_ids"]
            return {"input_ids": [*ids[:-2], ids[-2] * 256 + ids[-1]]}

    with pytest.raises(SparselandError, match="joins ' 12' to what stands before it"):
        make(tokenizer=Whole())


def test_a_text_that_has_no_cut_of_the_right_length_is_refused():
    class Lumps(Letters):
        """A letter x counts 100 tokens."""

        def __call__(self, text, **options):
            return super().__call__(text.replace("x", "y" * 100), **options)

    with pytest.raises(SparselandError, match="no prompt of 149 to 150 tokens can be made of this text"):
        make(150, filler="x" * 50, tokenizer=Lumps())
