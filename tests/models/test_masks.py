"""Masks as a few numbers: the same pairs as transformers' own tensor, or refused."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from sparseland.errors import SparselandError
from sparseland.models.masks import MaskSpec, build_mask_spec


def visible(spec, n_queries):
    """``[B, Nq, n_keys]``: what the numbers mean, the newest query at the end."""
    j = torch.arange(spec.n_keys)
    i = torch.arange(spec.n_keys - n_queries, spec.n_keys)[:, None]
    seen = j <= i
    if spec.window is not None:
        seen &= i - j < spec.window
    seen = seen[None]
    return seen if spec.valid is None else seen & spec.valid[:, None]


def padding(*rows, n=12):
    mask = torch.zeros(len(rows), n, dtype=torch.long)
    for row, (start, end) in zip(mask, rows, strict=True):
        row[start:end] = 1
    return mask


MASKS = {
    "none": None,
    "nothing padded": padding((0, 12), (0, 12)),
    "left": padding((0, 12), (5, 12)),
    "right": padding((0, 12), (0, 7)),
    "both": padding((2, 9), (1, 12)),
}


@pytest.mark.parametrize("window", [None, 1, 4, 50])
@pytest.mark.parametrize("n_queries", [12, 5, 1])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("slots", [12, 20])  # a static cache has slots that are empty
def test_the_pairs_are_those_of_transformers(name, n_queries, window, slots):
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    given = {
        "batch_size": 2, "q_length": n_queries, "kv_length": slots, "q_offset": 12 - n_queries,
        "kv_offset": 0, "mask_function": function, "attention_mask": MASKS[name], "local_size": window,
    }  # fmt: skip
    spec = build_mask_spec(**given)
    padded = None if MASKS[name] is None else torch.nn.functional.pad(MASKS[name], (0, slots - 12)).bool()
    expected = sdpa_mask(**given | {"attention_mask": padded}, allow_is_causal_skip=False)
    assert spec.n_keys == 12
    assert not expected[..., 12:].any()
    assert torch.equal(visible(spec, n_queries).expand(2, -1, -1), expected[:, 0, :, :12])


def test_padding_is_told_by_where_it_ends():
    spec = build_mask_spec(2, 12, 12, attention_mask=MASKS["left"])
    assert spec.first_key.tolist() == [0, 5]
    assert spec.one_run
    assert build_mask_spec(2, 12, 12, attention_mask=MASKS["right"]).first_key.tolist() == [0, 0]
    assert build_mask_spec(2, 12, 12, attention_mask=MASKS["nothing padded"]).valid is None


def test_a_hole_in_a_row_is_noticed():
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4] = 0
    spec = build_mask_spec(1, 12, 12, attention_mask=mask)
    assert not spec.one_run
    assert spec.valid.tolist() == mask.bool().tolist()


def test_a_sliding_cache_begins_later():
    """Keys 5 … 11 are held; padding of the first 7 tokens covers two of them."""
    mask = padding((7, 12))
    spec = build_mask_spec(1, 1, 7, q_offset=11, kv_offset=5, attention_mask=mask, local_size=8)
    assert spec.n_keys == 7
    assert spec.first_key.tolist() == [2]
    assert spec.valid[0].tolist() == [False, False, True, True, True, True, True]


def test_a_mask_of_fewer_tokens_says_nothing_of_the_rest():
    spec = build_mask_spec(1, 1, 12, q_offset=11, attention_mask=padding((3, 10), n=10))
    assert spec.valid[0].tolist() == [False] * 3 + [True] * 9


def test_a_mask_that_was_made_before_is_kept():
    spec = MaskSpec(7, 3)
    assert build_mask_spec(1, 1, 99, attention_mask=spec) is spec
    assert spec.contiguous() is spec


TWO_ROWS = torch.tensor([[0] * 6 + [1] * 6])
OVERLAYS = {
    "both directions": (bidirectional_mask_function, None),
    "both directions in a window": (sliding_window_bidirectional_mask_function(4), 4),
    "packed rows": (and_masks(causal_mask_function, packed_sequence_mask_function(TWO_ROWS)), None),
    "chunks": (chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)), 4),
    "image tokens": (or_masks(causal_mask_function, lambda b, h, q, k: (q < 4) & (k < 4)), None),
    "a window nobody told of": (sliding_window_causal_mask_function(4), None),
    "another window than told": (sliding_window_causal_mask_function(4), 6),
    "nobody sees itself": (lambda b, h, q, k: k < q, None),
}  # fmt: skip


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_not_plainly_causal_is_refused(name):
    function, window = OVERLAYS[name]
    with pytest.raises(SparselandError, match="an attention mask that is not plainly causal"):
        build_mask_spec(1, 12, 12, mask_function=function, local_size=window)


def test_a_causal_mask_by_another_name_is_accepted():
    function = and_masks(causal_mask_function, lambda b, h, q, k: q >= 0)
    assert build_mask_spec(1, 12, 12, mask_function=function) == MaskSpec(12)
