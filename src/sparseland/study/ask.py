"""Asking many samples at once: how likely is the right answer among wrong ones, and what is said greedily?

A batch's prompts have equal length, so that nothing is padded. Methods for prompts act on the prompt; the
answer is read densely from the cache that they left. Methods for decoding act from the beginning of the
answer on, token by token; the prompt before it is dense and so the same for all of them. It is read once, and
shown to each (:class:`Read`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparseland.handle import Handle
from sparseland.method import AttentionInputs
from sparseland.models.attention import switched
from sparseland.models.caches import TrackedLayer, track_cache
from sparseland.models.masks import MaskSpec
from sparseland.models.surgery import attention_layers, decoder_of
from sparseland.ops.attend import attend
from sparseland.patterns import WindowPattern
from sparseland.tasks.sample import Answer, Sample

# The last queries of a prompt that methods may want to see: the longest probe of the study's units.
TAIL = 512


@dataclass
class Scores:
    """One number per sample.

    Args:
        chosen: whether the right answer is likelier than every wrong one (per token that is asked); empty if
            the wrong ones were not asked for.
        gold: its probability among them; as empty.
        nats: its negative log-likelihood per token that is asked.
        generated: whether greedy decoding says a right answer; empty if it was not asked.
    """

    chosen: list[bool] = field(default_factory=list)
    gold: list[float] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)
    generated: list[bool] = field(default_factory=list)

    def extend(self, other: Scores) -> None:
        """Add another batch's samples."""
        for name, values in vars(other).items():
            getattr(self, name).extend(values)


def equal_prompts(samples: Sequence[Sample], tokenizer: Any) -> Int[Tensor, "S N"]:
    """All prompts at the length of the longest (they differ by 1 % at most), by line breaks near the start.

    They are put after the last line break of what all prompts begin with: where the message begins.
    """
    longest = max(len(s.prompt) for s in samples)
    prompts = [s.prompt.tolist() for s in samples]
    shared = 0
    while shared < min(map(len, prompts)) and len({p[shared] for p in prompts}) == 1:
        shared += 1
    at = next((i + 1 for i in reversed(range(shared)) if "\n" in tokenizer.decode([prompts[0][i]])), shared)
    blank = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    filled = [[*p[:at], *[blank] * (longest - len(p)), *p[at:]] for p in prompts]
    return torch.tensor(filled, dtype=torch.long)


# -------------------------------------------------------------- dense prompts


@dataclass(frozen=True)
class Read:
    """A prompt read densely: what a cache has to be told of it, layer by layer."""

    layers: list[AttentionInputs]
    logits: Float[Tensor, "S V"]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for x in self.layers for t in (x.q, x.k, x.v))


class _Reader:
    """Stands where a layer's runtime stands: dense attention, with a note of its inputs."""

    active = False

    def __init__(self, layer: int, n_layers: int) -> None:
        self.layer, self.n_layers = layer, n_layers
        self.seen: AttentionInputs | None = None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, scale: float) -> Tensor:
        tail = q[:, :, -TAIL:].clone()
        self.seen = AttentionInputs(tail, k, v, scale, self.layer, self.n_layers)
        n = k.shape[2]
        return attend(q, k, v, WindowPattern.dense(q.shape[2], n), scale=scale)


def windowed(model: nn.Module) -> bool:
    """Whether some layers keep a window only, which can't be shown from outside."""
    config: Any = model.config
    text = config.get_text_config()
    return bool(getattr(text, "sliding_window", None) or getattr(text, "layer_types", None))


@torch.no_grad()
def read(model: nn.Module, ids: Int[Tensor, "S N"]) -> Read:
    """Read prompts densely with the bare model, once for all methods (not for models with local layers)."""
    modules = attention_layers(model)
    readers = {i: _Reader(i, len(modules)) for i in modules}
    with switched(modules, readers):
        out: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1)  # type: ignore[operator]
    layers = [reader.seen for reader in readers.values()]
    return Read([x for x in layers if x is not None], out.logits[:, -1])


@torch.no_grad()
def shown(model: nn.Module, handle: Handle, prompt: Read) -> Any:
    """A fresh cache that holds the prompt as if the handle's methods had seen it being read."""
    from transformers.cache_utils import DynamicCache

    cache: Any = DynamicCache(config=decoder_of(model).config)
    track_cache(cache, handle.runtimes)
    for layer, x in zip(cache.layers, prompt.layers, strict=True):
        layer.update(x.k, x.v)
        if isinstance(layer, TrackedLayer):
            layer.runtime.tracked = None
            if layer.selector is not None and layer.state is not None:
                layer.selector.observe(layer.state, x)
            if layer.store is not None:
                layer.store.observe(x)
    return cache


# ------------------------------------------------------------------- answers


@torch.no_grad()
def answers(
    model: nn.Module,
    cache: Any,
    logits: Float[Tensor, "S V"],
    samples: Sequence[Sample],
    *,
    stepwise: bool,
    generate: bool = True,
    choose: bool = True,
) -> Scores:
    """Score the samples' answers behind what ``cache`` holds; ``logits`` predict their first token.

    Args:
        stepwise: token by token, for methods that act while decoding; else an answer in one go.
        generate: also decode greedily.
        choose: also ask how likely the wrong answers are.
    """
    rewind = _Rewind(cache)
    offered = [[s.answers[0], *(s.others if choose else ())] for s in samples]
    most = max(map(len, offered))
    rates: list[list[float]] = [[] for _ in samples]
    counts: list[list[int]] = [[] for _ in samples]
    greedy: list[bool] = []
    for j in range(most):
        # A sample with fewer wrong answers than others asks for its right one again, uncounted.
        batch = [answers_[j] if j < len(answers_) else answers_[0] for answers_ in offered]
        told, best, asked = _teach(model, cache, logits, batch, stepwise)
        rewind()
        if j == 0:
            greedy = (best | ~asked).all(1).tolist()
        sums = torch.where(asked, told, 0).sum(1) / asked.sum(1)
        for i, rate in enumerate(sums.tolist()):
            if j < len(offered[i]):
                rates[i].append(rate)
                counts[i].append(int(asked[i].sum()))
    scores = Scores()
    for rate, count in zip(rates, counts, strict=True):
        scores.nats.append(-rate[0])
        if choose:
            # The likelihood itself where all answers have equally many tokens, as numbers do.
            weight = sum(count) / len(count)
            shares = (torch.tensor(rate, dtype=torch.float64) * weight).softmax(0)
            scores.gold.append(float(shares[0]))
            scores.chosen.append(all(rate[0] > other for other in rate[1:]))
    if generate:
        if any(len(s.answers) > 1 for s in samples):
            greedy = _greedy(model, cache, logits, samples)
            rewind()
        scores.generated = greedy
    return scores


def _teach(
    model: Any, cache: Any, logits: Tensor, batch: Sequence[Answer], stepwise: bool
) -> tuple[Float[Tensor, "S T"], Bool[Tensor, "S T"], Bool[Tensor, "S T"]]:
    """Log-probabilities of the answers' tokens, whether each was the likeliest, and whether it is asked."""
    device, longest = logits.device, max(len(a.ids) for a in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    asked = torch.zeros(len(batch), longest, dtype=torch.bool)
    for i, answer in enumerate(batch):
        ids[i, : len(answer.ids)] = answer.ids
        asked[i, : len(answer.ids)] = answer.asked
    ids, asked = ids.to(device), asked.to(device)
    steps = [logits[:, None]]
    fed = ids[:, :-1]
    for part in torch.split(fed, 1, dim=1) if stepwise else ([fed] if longest > 1 else []):
        if part.shape[1]:
            steps.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    # Step by step over the vocabulary, so that no float32 copy of all logits exists.
    told, best = [], []
    for t, step in enumerate(row for part in steps for row in part.unbind(1)):
        told.append(step.float().log_softmax(-1).gather(-1, ids[:, t : t + 1])[:, 0])
        best.append(step.argmax(-1) == ids[:, t])
    return torch.stack(told, 1), torch.stack(best, 1), asked


def _greedy(model: Any, cache: Any, logits: Tensor, samples: Sequence[Sample]) -> list[bool]:
    """As :func:`sparseland.tasks.score_sample`, for a batch."""
    left = [[list(zip(a.ids.tolist(), a.asked.tolist(), strict=True)) for a in s.answers] for s in samples]
    said: list[bool | None] = [None] * len(samples)
    for step in range(max(len(a) for answers_ in left for a in answers_)):
        best, fed = logits.argmax(-1).tolist(), [0] * len(samples)
        for i, answers_ in enumerate(left):
            if said[i] is not None:
                continue
            given, is_asked = answers_[0][step]
            fed[i] = best[i] if is_asked else given
            left[i] = [a for a in answers_ if a[step] == (fed[i], is_asked)]
            if not left[i]:
                said[i] = False
            elif any(len(a) == step + 1 for a in left[i]):
                said[i] = True
        if all(s is not None for s in said):
            break
        ids = torch.tensor(fed, device=logits.device)[:, None]
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1]
    return [bool(s) for s in said]


class _Rewind:
    """Brings a cache back to where it was, selectors' states bit for bit."""

    def __init__(self, cache: Any) -> None:
        self.cache, self.length = cache, int(cache.get_seq_length())
        self.states = [copy.deepcopy(getattr(layer, "state", None)) for layer in cache.layers]

    def __call__(self) -> None:
        more = int(self.cache.get_seq_length()) - self.length
        if more > 0:
            for layer in self.cache.layers:
                layer.crop(-more)
        for layer, state in zip(self.cache.layers, self.states, strict=True):
            if state is not None:
                layer.state = copy.deepcopy(state)
