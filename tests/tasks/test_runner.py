"""Scoring: models that say what they are told to, and a real one with transformers' cache."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparseland.models.tiny import tiny_model
from sparseland.tasks import TASKS, Answer, Sample, countable, score_sample

NONSENSE = 7


class Parrot(nn.Module):
    """Says ``words`` after ``prompt``, whatever it is fed; its cache is the list of tokens it was fed."""

    def __init__(self, prompt, words):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.prompt, self.words, self.fed, self.calls = prompt.tolist(), list(words), [], []

    def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
        assert use_cache
        assert logits_to_keep == 1
        assert not torch.is_grad_enabled()
        self.fed = [*(past_key_values or ()), *input_ids[0].tolist()]
        self.calls.append(input_ids.shape)
        logits = torch.zeros(1, 1, 60_000)
        logits[0, 0, self.words[len(self.fed) - len(self.prompt)]] = 1
        return SimpleNamespace(logits=logits, past_key_values=self.fed)


def sample_of(*answers, prompt=(3, 4, 5)):
    """A sample from lists of (token, asked)."""
    made = [Answer(torch.tensor([t for t, _ in a]), torch.tensor([k for _, k in a])) for a in answers]
    return Sample("demo", 3, 0.5, torch.tensor(prompt), tuple(made), "", ())


def says(sample, words):
    model = Parrot(sample.prompt, words)
    return score_sample(model, sample), len(model.calls)


@pytest.fixture(scope="module", params=sorted(TASKS))
def sample(request, smollm, text):
    return TASKS[request.param](smollm, text, 640, 1, 0)[0]


def test_every_answer_of_every_task_is_right_when_a_model_says_it(sample):
    # Four facts have 24 orders; every fourth of them begins with another fact or goes on with another.
    for answer in sample.answers[:: 1 + len(sample.answers) // 7]:
        # What is given is not asked of the model: it may want to go on with anything there.
        words = torch.where(answer.asked, answer.ids, NONSENSE).tolist()
        model = Parrot(sample.prompt, words)
        assert score_sample(model, sample) is True
        assert model.fed == [*sample.prompt.tolist(), *answer.ids[:-1].tolist()]
        # The prompt goes in once; everything after it token by token.
        assert model.calls == [(1, len(sample.prompt)), *[(1, 1)] * (len(answer.ids) - 1)]


def test_one_wrong_token_anywhere_is_wrong_and_ends_it_there(sample):
    answer = sample.answers[0]
    asked = answer.asked.nonzero().flatten().tolist()
    assert len(asked) >= 2
    for at in asked:
        words = answer.ids.tolist()
        words[at] = NONSENSE
        assert says(sample, words) == (False, at + 1)


@pytest.mark.parametrize("task", ["needle-multi-value", "variables"])
def test_naming_one_fact_twice_is_wrong(task, smollm, text):
    (sample,) = TASKS[task](smollm, text, 640, 1, 0)
    first = sample.answers[0]
    given = (~first.asked).nonzero().flatten().tolist()
    end = given[0]
    joint = [given[0]]
    while joint[-1] + 1 in given:
        joint.append(joint[-1] + 1)
    twice = [*first.ids[: joint[-1] + 1].tolist(), *first.ids[:end].tolist(), *[NONSENSE] * 99]
    assert says(sample, twice)[0] is False


def test_answers_of_other_lengths_end_where_they_end():
    sample = sample_of([(1, True), (2, True)], [(1, True), (3, True), (4, True)])
    assert says(sample, [1, 2]) == (True, 2)
    assert says(sample, [1, 3, 4]) == (True, 3)
    assert says(sample, [1, 3, 5]) == (False, 3)
    assert says(sample, [1, 4]) == (False, 2)
    assert says(sample, [2]) == (False, 1)


def test_given_tokens_are_fed_and_not_scored():
    sample = sample_of([(1, True), (8, False), (2, True)])
    model = Parrot(sample.prompt, [1, 9, 2])
    assert score_sample(model, sample)
    assert model.fed == [3, 4, 5, 1, 8]
    assert says(sample, [1, 8, 9]) == (False, 3)


def test_a_real_model_continues_with_its_own_cache():
    model = tiny_model("llama")
    prompt = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))
    ids, answer = prompt.tolist(), []
    with torch.no_grad():
        for step in range(6):
            # The third token is given: one that the model would not say.
            best = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            answer.append(((best + 1) % 128, False) if step == 2 else (best, True))
            ids.append(answer[-1][0])
    assert score_sample(model, sample_of(answer, prompt=prompt.tolist()))
    for wrong in (0, 1, 3, 5):
        changed = [(t + 1, k) if i == wrong else (t, k) for i, (t, k) in enumerate(answer)]
        assert not score_sample(model, sample_of(changed, prompt=prompt.tolist()))


@pytest.mark.parametrize(
    ("correct", "minimum", "counts"),
    [
        ([], 0.5, False),
        ([True], 0.5, True),
        ([False], 0.5, False),
        ([True, False], 0.5, True),
        ([True, False, False], 0.5, False),
        ([True, False, False], 1 / 3, True),
        ([True, True, False], 0.7, False),
        ([], 0.0, False),
    ],
)
def test_a_task_counts_where_the_dense_model_can_do_it(correct, minimum, counts):
    assert countable(correct, minimum) is counts


def test_half_is_enough_unless_told_otherwise():
    assert countable([True, False])
    assert not countable([True, False, False])
