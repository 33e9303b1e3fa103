"""Asking in batches: as asking one by one, whatever is on the model, and the cache is left as it was."""

import pytest
import torch

import sparseland as sl
from sparseland.attention.sparse_frontier import DECODE_UNITS, SparseFrontier
from sparseland.models import load_model
from sparseland.study import ask
from sparseland.tasks import TASKS, Answer, Sample, score_sample
from sparseland.tasks.text import default_text

LENGTH = 256
SETTINGS = {
    "snapkv": {"capacity": 64, "window": 16, "probe": 32},
    "ada-snapkv": {"capacity": 64, "window": 16, "probe": 32},
    "quest": {"budget": 48},
}


@pytest.fixture(scope="module")
def loaded(folders):
    return load_model(str(folders[0]), "float32", "cpu")


@pytest.fixture(scope="module")
def samples(loaded):
    return TASKS["needle"](loaded.tokenizer, default_text(), LENGTH, 2, 0)


@pytest.fixture(scope="module")
def ids(loaded, samples):
    return ask.equal_prompts(samples, loaded.tokenizer)


def test_prompts_become_equally_long_by_line_breaks_only(loaded, samples, ids):
    cut = [Sample(**{**vars(s), "prompt": s.prompt[i:]}) for i, s in enumerate(samples)]
    for s, i in zip(cut, range(2), strict=True):
        assert len(s.prompt) == len(samples[i].prompt) - i
    filled = ask.equal_prompts(samples, loaded.tokenizer)
    assert filled.shape == (2, max(len(s.prompt) for s in samples))
    blank = loaded.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for row, s in zip(filled, samples, strict=True):
        kept = row.tolist()
        more = len(kept) - len(s.prompt)
        places = [i for i in range(len(kept)) if kept[i : i + more] == [blank] * more]
        assert any(kept[:i] + kept[i + more :] == s.prompt.tolist() for i in places)
        assert kept[-s.opened :] == s.prompt[-s.opened :].tolist()


def log_likelihood(model, prompt, answer):
    ids = torch.cat([prompt, answer.ids])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    told = logits[len(prompt) - 1 : -1].gather(-1, answer.ids[:, None])[:, 0]
    return float(told[answer.asked].mean()), told


def test_scores_are_those_of_one_sample_at_a_time(loaded, samples, ids):
    model = loaded.model
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
    for stepwise in (False, True):
        scores = ask.answers(model, out.past_key_values, out.logits[:, -1], samples, stepwise=stepwise)
        assert out.past_key_values.get_seq_length() == ids.shape[1]
        for i, sample in enumerate(samples):
            rates = [log_likelihood(model, ids[i], a)[0] for a in (sample.answers[0], *sample.others)]
            assert scores.nats[i] == pytest.approx(-rates[0], abs=1e-4)
            assert scores.chosen[i] == (rates[0] > max(rates[1:]))
            weight = len(sample.answers[0].ids)
            gold = torch.tensor(rates).mul(weight).softmax(0)[0]
            assert scores.gold[i] == pytest.approx(float(gold), abs=1e-3)
            whole = Sample(**{**vars(sample), "prompt": ids[i]})
            assert scores.generated[i] == score_sample(model, whole)


def test_what_the_model_says_itself_is_generated_and_right_in_any_order(loaded, ids):
    model, prompt = loaded.model, ids[:1]
    with torch.no_grad():
        said = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        out = model(input_ids=prompt, use_cache=True)
    own = said[0, -5:]

    def answer(tokens):
        return Answer(torch.tensor(tokens), torch.ones(len(tokens), dtype=torch.bool))

    other = [(int(t) + 1) % 90 for t in own]
    for right, expected in (([own.tolist()], True), ([other, own.tolist()], True), ([other], False)):
        sample = Sample("demo", 1, 0.5, prompt[0], tuple(map(answer, right)), "", (), 1, (answer([3, 4]),))
        scores = ask.answers(model, out.past_key_values, out.logits[:, -1], [sample], stepwise=False)
        assert scores.generated == [expected]
    assert ask.answers(
        model, out.past_key_values, out.logits[:, -1], [sample], stepwise=False, generate=False
    ).generated == []  # fmt: skip


@pytest.mark.parametrize("unit", DECODE_UNITS)
class TestShown:
    def behind(self, model, handle, ids, cut, read):
        """Logits behind the prompt's last tokens, decoded under the method, and the cache."""
        if read is None:
            cache = model(input_ids=ids[:, :cut], use_cache=True).past_key_values
        else:
            cache = ask.shown(model, handle, read)
        for token in ids[:, cut:].split(1, 1):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
        return logits, cache

    def test_a_shown_prompt_is_as_one_that_was_read(self, unit, loaded, ids):
        cut = ids.shape[1] - 8
        read = ask.read(loaded.model, ids[:, :cut])
        found = []
        for prompt in (read, None, read):
            with (
                sl.apply(loaded.model, SparseFrontier(unit=unit, **SETTINGS[unit])) as handle,
                torch.no_grad(),
            ):
                logits, _ = self.behind(loaded.model, handle, ids, cut, prompt)
                found.append((logits, handle.stats().decode_density))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
        assert found[0][1] == found[1][1] < 0.5
        # The prompt can be shown again: nothing was written into it.
        assert torch.equal(found[0][0], found[2][0])

    def test_the_order_of_answers_does_not_matter(self, unit, loaded, samples, ids):
        cut = ids.shape[1] - 8
        read = ask.read(loaded.model, ids[:, :cut])
        with sl.apply(loaded.model, SparseFrontier(unit=unit, **SETTINGS[unit])) as handle, torch.no_grad():
            logits, cache = self.behind(loaded.model, handle, ids, cut, read)
            first, second = (
                ask.answers(loaded.model, cache, logits, samples, stepwise=True, generate=False)
                for _ in range(2)
            )
        assert first == second
