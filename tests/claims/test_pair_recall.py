"""One-hop recall: each key's pair stands once, queries ask for what is there, nothing else is scored."""

from __future__ import annotations

from itertools import islice

import torch

from sparseland.claims._pair_recall import pair_batches, pair_vocab
from sparseland.claims._training import IGNORE, small_model, train


def test_targets_are_the_values_of_the_pairs():
    keys, values = 5, 3
    batch = next(pair_batches(4, 40, keys, values, queries=7, seed=1))
    for ids, targets in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
        pairs = [t - 1 - keys for t in ids if t > keys]
        held = {pair // values: pair % values for pair in pairs}
        assert len(pairs) == len(held) == keys
        asked = [i for i, t in enumerate(targets) if t != IGNORE]
        assert len(asked) == 7
        assert min(asked) >= 20
        assert max(i for i, t in enumerate(ids) if t > keys) < 20
        for i in asked:
            assert 1 <= ids[i] <= keys
            assert targets[i] == held[ids[i] - 1]
        assert all(ids[i] == 0 for i in range(20, 40) if i not in asked)
        assert max(ids) < pair_vocab(keys, values)


def test_equal_seeds_give_equal_batches():
    a, b, c = (list(islice(pair_batches(2, 40, 5, 3, queries=4, seed=s), 2)) for s in (0, 0, 1))
    assert all(torch.equal(x.ids, y.ids) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0].ids, c[0].ids)
    assert not torch.equal(a[0].ids, a[1].ids)


def test_one_layer_learns_it():
    model = small_model("smoke", vocab=pair_vocab(4, 2), length=32, layers=1, initializer_range=0.15)
    held_out = list(islice(pair_batches(16, 32, 4, 2, queries=8, seed=9), 2))
    run = train(model, None, pair_batches(16, 32, 4, 2, queries=8), 80, lr=1e-2, evaluate_on=held_out)
    assert run.last["accuracy"] > 0.8 > run.curve[0]["accuracy"] + 0.2
