"""Mustafar: what is kept, when, in how many bytes; and reading it equals attention over what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparseland.cache.mustafar import GROW_TOKENS, BitmapStore, Mustafar, kept_elements
from sparseland.errors import SparselandError
from sparseland.method import parse_spec

B, HQ, HKV, D = 2, 6, 2, 64


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_kv(n: int, seed: int = 0, dtype: torch.dtype = torch.float32, dim: int = D) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(B, HKV, n, dim, generator=g).to(dtype) for _ in range(2))
    return k, v


def prune(x: Tensor, sparsity: float) -> Tensor:
    """The paper's rule, vector by vector."""
    out = torch.zeros_like(x)
    for vector, kept in zip(x.flatten(0, -2), out.flatten(0, -2), strict=True):
        dropped = int(sparsity * len(vector) + 1e-6)
        largest = sorted(range(len(vector)), key=lambda i: -abs(vector[i].item()))[: len(vector) - dropped]
        kept[largest] = vector[largest]
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None = None) -> Tensor:
    group = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(group, 1).transpose(-1, -2) * scale
    if first is not None:
        padded = torch.arange(k.shape[2]) < first[:, None]
        logits = logits.masked_fill(padded[:, None, None], -torch.inf)
    return logits.softmax(-1) @ v.repeat_interleave(group, 1)


def filled(n: int, *, steps: int = 0, seed: int = 0, **params) -> tuple[BitmapStore, Tensor, Tensor]:
    """A store after a prompt of ``n - steps`` tokens and ``steps`` single tokens, and what went in."""
    k, v = make_kv(n, seed)
    store = Mustafar(**params).new_store(0)
    store.append(k[:, :, : n - steps], v[:, :, : n - steps])
    for i in range(n - steps, n):
        store.append(k[:, :, i : i + 1], v[:, :, i : i + 1])
    store.settle()  # as after a step's attention
    assert len(store) == n
    return store, k, v


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_old_tokens_are_pruned_as_the_paper_says_and_new_ones_untouched(sparsity: float, dim: int) -> None:
    k, v = make_kv(70, dim=dim)
    store = Mustafar(sparsity=sparsity, window=8, group=1).new_store(0)
    store.append(k, v)
    store.settle()
    for got, given in zip(store.dense(), (k, v), strict=True):
        assert torch.equal(got[:, :, :62], prune(given[:, :, :62], sparsity))
        assert torch.equal(got[:, :, 62:], given[:, :, 62:])
        assert ((got[:, :, :62] != 0).sum(-1) == dim - int(sparsity * dim + 1e-6)).all()


def test_keys_and_values_have_their_own_sparsity() -> None:
    store, k, v = filled(50, key_sparsity=0.5, value_sparsity=0.75, window=0, group=1)
    got_k, got_v = store.dense()
    assert torch.equal(got_k, prune(k, 0.5))
    assert torch.equal(got_v, prune(v, 0.75))
    only_values, k, v = filled(50, sparsity=0.0, value_sparsity=0.75, window=0, group=1)
    assert torch.equal(only_values.dense()[0], k)
    assert torch.equal(only_values.dense()[1], prune(v, 0.75))


@pytest.mark.parametrize("group", [1, 16, 256])
@pytest.mark.parametrize("steps", [0, 45])
def test_pruning_follows_the_schedule(group: int, steps: int) -> None:
    """After any history the oldest ``floor((T - window) / group) * group`` tokens are pruned."""
    for n in (50, 81, 300):
        store, k, _ = filled(n, steps=steps, window=10, group=group)
        pruned = (n - 10) // group * group
        keys = store.dense()[0]
        assert torch.equal(keys[:, :, pruned:], k[:, :, pruned:])
        assert ((keys[:, :, :pruned] != 0).sum(-1) == kept_elements(D, 0.7)).all()


def test_a_step_sees_the_token_that_leaves_the_window_dense_and_prunes_it_then() -> None:
    store, k, v = filled(50, steps=3, window=10)
    new_k, new_v = make_kv(1, seed=1)
    store.append(new_k, new_v)
    assert torch.equal(store.dense()[0][:, :, 40:50], k[:, :, 40:])  # ten before it, and the new one
    assert torch.equal(store.dense()[0][:, :, 50:], new_k)
    q = torch.randn(B, HQ, 1, D)
    want = attention(q, *store.dense(), 0.1)
    torch.testing.assert_close(store.attend(q, 0.1), want, atol=2e-5, rtol=1e-4)
    assert torch.equal(store.dense()[1][:, :, 40:41], prune(v[:, :, 40:41], 0.7))
    assert torch.equal(store.dense()[1][:, :, 41:50], v[:, :, 41:])


def test_a_prompt_in_pieces_is_dense_until_the_first_step() -> None:
    k, v = make_kv(60)
    store = Mustafar(window=10).new_store(0)
    for part in (slice(0, 25), slice(25, 59)):
        store.append(k[:, :, part], v[:, :, part])
        assert torch.equal(store.dense()[0], k[:, :, : part.stop])
    store.append(k[:, :, 59:], v[:, :, 59:])
    assert torch.equal(store.dense()[0][:, :, :49], prune(k[:, :, :49], 0.7))


def test_with_groups_a_padded_row_prunes_at_other_steps_than_alone() -> None:
    """What the card admits."""
    k, v = make_kv(60)
    padded, alone = (Mustafar(window=10, group=16).new_store(0) for _ in range(2))
    padded.append(k[1:], v[1:])
    alone.append(k[1:, :, 7:], v[1:, :, 7:])
    for store in (padded, alone):
        store.settle()
    dense = [(s.dense()[0] == 0).any(-1).logical_not().all((0, 1)).sum().item() for s in (padded, alone)]
    assert dense == [12, 21]  # 50 - 3 * 16 and 43 - 2 * 16, and the window of 10


@pytest.mark.parametrize("first", [None, [0, 13], [60, 113]])
@pytest.mark.parametrize(("n", "window"), [(120, 16), (120, 0), (9, 16)])
def test_attention_reads_what_the_store_gives_back(n: int, window: int, first: list[int] | None) -> None:
    store, _, _ = filled(n, window=window, group=4)
    q = torch.randn(B, HQ, 1, D)
    start = None if first is None else torch.tensor(first).clamp(max=n - 1)
    want = attention(q, *store.dense(), D**-0.5, start)
    torch.testing.assert_close(store.attend(q, D**-0.5, start), want, atol=2e-5, rtol=1e-4)


def test_no_sparsity_is_dense_attention() -> None:
    store, k, v = filled(100, steps=20, sparsity=0.0)
    q = torch.randn(B, HQ, 1, D)
    assert torch.equal(store.dense()[0], k)
    torch.testing.assert_close(store.attend(q, 0.2), attention(q, k, v, 0.2), atol=2e-5, rtol=1e-4)


def test_pruning_changes_the_output() -> None:
    store, k, v = filled(100)
    q = torch.randn(B, HQ, 1, D)
    assert (store.attend(q, D**-0.5) - attention(q, k, v, D**-0.5)).abs().max() > 1e-2


@pytest.mark.parametrize(("n", "window"), [(90, 16), (90, 0), (12, 16)])
def test_gather_gives_the_chosen_tokens(n: int, window: int) -> None:
    store, _, _ = filled(n, window=window, group=1)
    index = torch.stack([torch.randperm(n)[:7] for _ in range(B * HKV)]).view(B, HKV, 7)
    index[0, 0, 3] = n - 1
    for got, everything in zip(store.gather(index), store.dense(), strict=True):
        assert torch.equal(got, everything.gather(2, index[..., None].expand(-1, -1, -1, D)))
    store.gather(torch.full_like(index, -1))  # padding: any value, but no error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_bytes_are_saved_and_follow_the_formula(sparsity: float, dtype: torch.dtype) -> None:
    n, window = 1032, 32
    k, v = make_kv(n, dtype=dtype)
    store = Mustafar(sparsity=sparsity, window=window, group=1).new_store(0)
    store.append(k, v)
    assert store.nbytes() == 2 * k.nbytes  # a prompt is dense until the first token after it
    store.settle()
    per_vector = kept_elements(D, sparsity) * k.element_size() + D // 8
    assert store.nbytes() == 2 * B * HKV * ((n - window) * per_vector + window * D * k.element_size())
    assert store.nbytes() < {0.5: 0.67, 0.7: 0.48}[sparsity] * 2 * k.nbytes
    # What is held is what is counted: no view that keeps the whole prompt alive.
    held = [t for part in store._packed for t in (part._room.bitmap, part._room.values)] + list(store._recent)
    assert sum(t.untyped_storage().nbytes() for t in held) == store.nbytes()


def test_growth_does_not_give_the_saved_memory_back() -> None:
    store, k, _ = filled(1600, steps=100, window=8, group=1)
    held = [t for part in store._packed for t in (part._room.bitmap, part._room.values)]
    assert all(t.shape[2] <= 1600 + GROW_TOKENS for t in held)
    assert store.nbytes() < 0.52 * 2 * k.nbytes


def test_beams_and_crops() -> None:
    store, k, v = filled(80, window=8, group=1)
    store.reorder(torch.tensor([1, 1]))
    assert torch.equal(store.dense()[0][:, :, :72], prune(k[[1, 1], :, :72], 0.7))
    assert torch.equal(store.dense()[1][:, :, 72:], v[[1, 1], :, 72:])
    before = store.dense()[0]
    store.crop(75)
    assert len(store) == 75
    assert torch.equal(store.dense()[0], before[:, :, :75])
    store.crop(40)
    assert len(store) == 40
    assert torch.equal(store.dense()[0], before[:, :, :40])
    new_k, new_v = make_kv(30, seed=5)
    store.append(new_k, new_v)
    store.settle()
    assert len(store) == 70
    assert torch.equal(
        store.dense()[0], torch.cat([before[:, :, :40], prune(new_k[:, :, :22], 0.7), new_k[:, :, 22:]], 2)
    )
    q = torch.randn(B, HQ, 1, D)
    torch.testing.assert_close(store.attend(q, 0.1), attention(q, *store.dense(), 0.1), atol=2e-5, rtol=1e-4)


def test_magnitude_beats_whole_channels_and_chance() -> None:
    """The paper's comparison on one attention output, at equal sparsity."""
    n, sparsity = 200, 0.7
    k, v = make_kv(n)
    outliers = torch.ones(D)
    outliers[::9] = 4.0  # the heavy channels that real keys have
    k = k * outliers
    q = torch.randn(B, HQ, 1, D)
    want = attention(q, k, v, D**-0.5)

    def error(new_k: Tensor, new_v: Tensor) -> float:
        return (attention(q, new_k, new_v, D**-0.5) - want).square().mean().item()

    store = Mustafar(sparsity=sparsity, window=0, group=1).new_store(0)
    store.append(k, v)
    ours = error(*store.dense())
    kept = kept_elements(D, sparsity)

    def whole_channels(x: Tensor) -> Tensor:
        best = x.square().mean(2, keepdim=True).topk(kept, dim=-1).indices
        return x * torch.zeros(B, HKV, 1, D).scatter(-1, best, 1.0)

    def chance(x: Tensor) -> Tensor:
        best = torch.rand_like(x).topk(kept, dim=-1).indices
        return torch.zeros_like(x).scatter(-1, best, x.gather(-1, best))

    assert ours < 0.5 * error(whole_channels(k), whole_channels(v))
    assert ours < 0.4 * error(chance(k), chance(v))


def test_half_precision_keeps_values_exactly() -> None:
    k, v = make_kv(60, dtype=torch.bfloat16)
    store = Mustafar(window=8, group=1).new_store(0)
    store.append(k, v)
    store.settle()
    old, given = store.dense()[0][:, :, :52], k[:, :, :52]
    assert ((old == 0) | (old == given)).all()
    # Few bits make ties: which of two equal elements stays is free, their size is not.
    assert torch.equal(old.abs().sort().values, prune(given, 0.7).abs().sort().values)
    q = torch.randn(B, HQ, 1, D, dtype=torch.bfloat16)
    want = attention(q.float(), *(t.float() for t in store.dense()), D**-0.5)
    got = store.attend(q, D**-0.5)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=2e-2, rtol=2e-2)


def test_spec_round_trip_grid_and_errors() -> None:
    method = parse_spec("mustafar:sparsity=0.5,key_sparsity=0.8,group=256")
    assert method == Mustafar(sparsity=0.5, key_sparsity=0.8, group=256)
    assert parse_spec(method.spec) == method
    assert len(set(Mustafar.grid(4096))) >= 2
    with pytest.raises(SparselandError, match=r"sparsity=1\.0 is not allowed"):
        Mustafar(sparsity=1.0)
    with pytest.raises(SparselandError, match="group=0"):
        Mustafar(group=0)
