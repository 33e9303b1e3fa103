"""Loss and agreement: by hand, and against the definitions written out in float64."""

import math

import pytest
import torch

from sparseland.tasks.agreement import agreement
from sparseland.tasks.loss import cross_entropy


def random_logits(tokens=700, vocab=50, seed=0):
    return torch.randn(tokens, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_cross_entropy_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0]])
    # Probabilities (1/4, 3/4) and (1/2, 1/2).
    assert cross_entropy(logits, torch.tensor([1, 0])) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert cross_entropy(logits, torch.tensor([0, 0])) == pytest.approx((math.log(4) + math.log(2)) / 2)


@pytest.mark.parametrize("chunk", [1, 256, 700, 1000])
def test_cross_entropy_is_the_definition_however_it_is_cut(chunk):
    logits = random_logits()
    targets = torch.randint(0, 50, (700,), generator=torch.Generator().manual_seed(1))
    p = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
    expected = -sum(math.log(p[t, targets[t]]) for t in range(700)) / 700
    assert cross_entropy(logits, targets, chunk) == pytest.approx(expected, rel=1e-6)


def test_half_precision_logits_are_summed_in_fp32():
    logits = random_logits().bfloat16()
    targets = logits.argmax(1)
    assert cross_entropy(logits, targets) == cross_entropy(logits.float(), targets)


def test_agreement_by_hand():
    dense = torch.tensor([[math.log(3), 0.0]])  # (3/4, 1/4)
    sparse = torch.tensor([[0.0, 0.0]])  # (1/2, 1/2)
    found = agreement(sparse, dense)
    assert found.kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    back = agreement(dense, sparse)
    assert back.kl == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert back.kl != pytest.approx(found.kl)


def test_top1_is_the_share_of_equal_first_choices():
    dense = torch.eye(4)
    sparse = torch.eye(4)[[0, 1, 3, 2]]
    assert agreement(sparse, dense).top1 == 0.5
    assert agreement(dense, dense).top1 == 1.0
    assert agreement(-dense[:, :2] * 9, dense[:, :2]).top1 == 0.5  # ties go to the first word


@pytest.mark.parametrize("chunk", [1, 256, 1000])
def test_agreement_is_the_definition_however_it_is_cut(chunk):
    sparse, dense = random_logits(seed=1), random_logits(seed=2)
    p, q = dense.double().softmax(1), sparse.double().softmax(1)
    found = agreement(sparse, dense, chunk)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert found.top1 == float((sparse.argmax(1) == dense.argmax(1)).double().mean())
    assert 0 < found.top1 < 0.5


def test_equal_models_agree_and_a_shift_of_all_logits_is_nothing():
    logits = random_logits()
    assert agreement(logits, logits).kl == 0
    assert agreement(logits + 5, logits).kl == pytest.approx(0, abs=1e-6)
