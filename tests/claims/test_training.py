"""The small-model training that claims share: data are what they say, methods train and come off again."""

from __future__ import annotations

import itertools

import pytest
import torch

import sparseland as sl
from sparseland.claims._training import (
    IGNORE,
    Batch,
    copy_batches,
    evaluate,
    recall_batches,
    small_model,
    stdlib_texts,
    text_data,
    train,
)
from sparseland.errors import SparselandError


class Letters:
    """A tokenizer of bytes."""

    name_or_path = "letters"
    eos_token_id = 0

    def __len__(self) -> int:
        return 256

    def __call__(self, texts, **_):
        return {"input_ids": [list(t.encode()) for t in texts]}


def test_text_is_real_bounded_and_split_by_file():
    texts = list(stdlib_texts(200_000))
    assert texts == list(stdlib_texts(200_000))
    assert 150_000 < sum(map(len, texts)) < 1_300_000
    assert any("def " in t for t in texts)
    data = text_data(Letters(), max_bytes=200_000)
    assert data is text_data(Letters(), max_bytes=200_000)
    assert 0 < data.valid.numel() < data.train.numel()
    one, two = (next(data.batches(3, 50, seed=s)) for s in (0, 1))
    assert one.ids.shape == (3, 50)
    assert torch.equal(one.ids[:, 1:], one.targets[:, :-1])
    assert not torch.equal(one.ids, two.ids)
    assert torch.equal(one.ids, next(data.batches(3, 50, seed=0)).ids)
    assert len(data.validation(2, 40, count=3)) == 3


def test_rare_tokens_become_one():
    whole, small = (text_data(Letters(), max_bytes=200_000, vocab=v) for v in (None, 32))
    assert (whole.vocab, small.vocab) == (256, 32)
    assert small.train.max() == 31
    # The most frequent token is 1, the next 2, and so on: a renumbering, no new text.
    counts = torch.bincount(whole.train)
    assert torch.equal(small.train == 1, whole.train == counts.argmax())
    assert (small.train == 0).sum() == counts.sort(descending=True).values[31:].sum()


def test_recall_targets_are_the_values_behind_the_keys():
    batch = next(recall_batches(4, 64, 6, vocab=64, queries=9, seed=1))
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        asked = [i for i, t in enumerate(targets) if t != IGNORE]
        assert len(asked) == 9
        assert min(asked) >= 32
        for i in asked:
            (place,) = [j for j in range(32) if ids[j] == ids[i]]
            assert ids[place + 1] == targets[i]
            assert 32 <= ids[i] < 48 <= targets[i]


def test_copies_are_copies():
    batch = next(copy_batches(20, 60, 8, 20, vocab=1000, seed=2))
    distances = set()
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        scored = [i for i, t in enumerate(targets) if t != IGNORE]
        assert len(scored) == 7
        assert scored == list(range(scored[0], scored[0] + 7))
        (far,) = {
            scored[0] - i for i in range(scored[0] - 19) if ids[i : i + 8] == ids[scored[0] : scored[0] + 8]
        }
        assert [targets[i] for i in scored] == [ids[i + 1 - far] for i in scored]
        distances.add(far)
    assert min(distances) >= 20
    assert len(distances) > 5


@pytest.mark.parametrize("arguments", [(1, 10, 9), (1, 64, 0)])
def test_tasks_that_do_not_fit_are_refused(arguments):
    with pytest.raises(SparselandError, match="do not fit"):
        next(recall_batches(*arguments))
    with pytest.raises(SparselandError, match="does not fit"):
        next(copy_batches(1, 30, 10, 25))


def test_models_have_the_sizes_they_say():
    full = small_model(layers=1)
    assert 20e6 < sum(p.numel() for p in full.parameters()) < 60e6
    assert full.lm_head.weight is full.model.embed_tokens.weight
    tiny = small_model("smoke", vocab=50, layers=3, heads=8, kv_heads=4, head_dim=8, seed=3)
    again = small_model("smoke", vocab=50, layers=3, heads=8, kv_heads=4, head_dim=8, seed=3)
    assert tiny.config.num_key_value_heads == 4
    assert torch.equal(tiny.lm_head.weight, again.lm_head.weight)


def test_training_learns_with_a_method_and_takes_it_off(capsys):
    model = small_model("smoke", vocab=32, length=32)
    ids = torch.arange(32).repeat(4, 1)
    batch = Batch(ids[:, :-1], ids[:, 1:])
    spec = "streaming:sinks=1,window=8"
    run = train(model, spec, itertools.repeat(batch), 12, lr=1e-2, evaluate_on=[batch])
    first, last = run.curve[0], run.last
    assert last["loss"] < first["loss"] / 2
    assert last["step"] == 12
    assert last["tokens"] == 12 * batch.ids.numel()
    assert len(last["loss_by_position"]) == 4
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert evaluate(model, [batch])["loss"] != pytest.approx(last["loss"], rel=1e-6)  # dense now
    with sl.apply(model, spec):
        assert evaluate(model, [batch])["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert "streaming:sinks=1,window=8: step 12/12" in capsys.readouterr().err


def test_an_interrupted_training_leaves_a_plain_model():
    model = small_model("smoke", vocab=32, length=32)

    def two_then_stop():
        for _ in range(2):
            yield Batch(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, "streaming", two_then_stop(), 5)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(SparselandError, match="ended after 0 of 1 steps"):
        train(model, None, [], 1)


def test_evaluation_counts_scored_positions_only():
    model = small_model("smoke", vocab=16, length=16)
    ids = torch.randint(16, (2, 8), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(ids, IGNORE)
    targets[0, 5] = 3
    found = evaluate(model, [Batch(ids, targets)], buckets=2)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 5]
    assert found["loss"] == pytest.approx(-logits.log_softmax(-1)[3].item(), rel=1e-5)
    assert found["accuracy"] == float(logits.argmax() == 3)
    assert found["loss_by_position"] == [None, pytest.approx(found["loss"])]
