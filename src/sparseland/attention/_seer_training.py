"""Self-distillation of SeerAttention's gates: the dense model shows where each block's attention lies.

Per layer, on the model's own queries and keys, with ``P`` its attention probabilities::

    G[I, J] = max P_ij over the tile, each row divided by its sum        (block_max_probability)
    loss    = KL(G || softmax(gate)), over the key blocks of a row

averaged over rows, heads and batch, summed over layers. The model stays as it is: what it computes is a
constant, and only gates are in the optimiser.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sparseland.attention._seer_gate import Gates, Turns
from sparseland.errors import SparselandError
from sparseland.method import AttentionInputs, Calibration, Rope
from sparseland.ops.block_gate import unrotated_pool
from sparseland.ops.block_max_probability import block_max_probability
from sparseland.ops.rotary import turn_back

if TYPE_CHECKING:
    from sparseland.attention.seer_attention import SeerAttention

LOSS_SCALE = 10.0  # the authors'; AdamW steps hardly depend on it
WARM_UP = 20
# A text's last half has thousands of queries; the decode gate looks at this many, evenly spread.
_POSITIONS = 512
# What is kept of batches that come again; more is computed anew each time.
_CACHE_BYTES = 2 * 2**30
_NEVER = -1e30  # a logit that leaves nothing, and unlike -inf no NaN where the target is 0


@dataclass
class Lesson:
    """What a gate is shown of one layer and batch: its inputs, and the right answer.

    Args:
        q, k: the gate's inputs: queries pooled or as they are, keys pooled, before RoPE.
        q_turns, k_turns: RoPE of the queries and of the key blocks.
        target: what each row's attention says of the key blocks; sums to 1 over the seen.
        seen: which key blocks a row may choose from.
    """

    q: Float[Tensor, "B Hq m D"]
    k: Float[Tensor, "B Hkv Mk 3D"]
    q_turns: Turns
    k_turns: Turns
    target: Float[Tensor, "B H m Mk"]
    seen: Bool[Tensor, "m Mk"]

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.q, self.k, self.target))


Lessons = dict[str, Lesson]  # by phase: "prefill", "decode"


def train_gates(
    model: nn.Module,
    ids_batches: Iterable[Int[Tensor, "B N"]],
    method: SeerAttention,
    *,
    steps: int | None = None,
    lr: float | None = None,
    loss_scale: float = LOSS_SCALE,
    on_step: Callable[[int, float], None] | None = None,
) -> Calibration:
    """Train the gates of every attention layer to tell where the dense ``model`` attends.

    Args:
        model: any decoder that ``apply`` takes, without methods on it; it is not changed.
        ids_batches: token ids, one batch a step; from the start again when they end.
        method: which gates, for which blocks.
        steps, lr: the method's own unless given. AdamW without weight decay, 20 steps of warm-up, then a
            cosine to 0.
        loss_scale: factor on the loss.
        on_step: called with each step's number (from 1) and its loss: nats a row, a mean over layers.

    Returns:
        Tensors ``<layer>.prefill.key``, …; ``meta["curve"]`` holds the loss of every step, by phase.

    Raises:
        SparselandError: no text, too short a text, or a loss that is not a number.
    """
    from sparseland.handle import learner_tensors
    from sparseland.models.probe import probe

    steps = method.steps if steps is None else steps
    lr = method.lr if lr is None else lr
    batches = list(ids_batches)
    least = 2 * method.block_size + 1
    if not batches or any(b.dim() != 2 or b.shape[1] < least for b in batches):
        shapes = [list(b.shape) for b in batches]
        raise SparselandError(
            f"{method.card.slug}: training needs batches of token ids [B, N] with N >= {least}, got {shapes}"
        )
    device = next(model.parameters()).device
    gates: dict[int, nn.Module] = {}
    for i, shape in probe(model).items():
        gate = method.new_learner(shape)
        assert gate is not None
        gates[i] = gate.to(device)
    parameters = [p for gate in gates.values() for p in gate.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    school = _School(model, batches, method, keep=steps > len(batches))
    curve: dict[str, list[float]] = {}
    started = time.perf_counter()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        sums: dict[str, Tensor | float] = {}
        with torch.enable_grad():
            optimiser.zero_grad(set_to_none=True)
            for i, lessons in school.lessons(step):
                for phase, lesson in lessons.items():
                    loss = divergence(gates[i], phase, lesson)
                    # Layers share nothing: their graphs need not wait for each other.
                    torch.autograd.backward(loss * loss_scale)
                    sums[phase] = sums.get(phase, 0.0) + loss.detach()
        means = {phase: float(total) / len(gates) for phase, total in sums.items()}
        if not all(math.isfinite(v) for v in means.values()):
            raise SparselandError(
                f"{method.card.slug}: the loss of step {step + 1} is not a number; the model's attention "
                "on this text is not finite, or the learning rate is too high"
            )
        optimiser.step()
        for phase, value in means.items():
            curve.setdefault(phase, []).append(value)
        if on_step is not None:
            on_step(step + 1, sum(means.values()) / len(means))
    meta: dict[str, Any] = {
        "steps": steps,
        "lr": lr,
        "loss_scale": loss_scale,
        "tokens": sum(batches[s % len(batches)].numel() for s in range(steps)),
        "block_size": method.block_size,
        "seconds": time.perf_counter() - started,
        "curve": curve,
    }
    return Calibration(meta, learner_tensors(gates))


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0; short trainings warm up for a tenth."""
    warm = min(WARM_UP, max(1, steps // 10))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _School:
    """Lessons by step and layer; those of batches that come again are kept while they fit."""

    def __init__(
        self, model: nn.Module, batches: list[Int[Tensor, "B N"]], method: SeerAttention, *, keep: bool
    ) -> None:
        self.model, self.batches, self.method, self.keep = model, batches, method, keep
        self._known: dict[int, dict[int, Lessons]] = {}
        self._room = _CACHE_BYTES
        self._ropes: Mapping[int, Rope] | None = None

    def lessons(self, step: int) -> Iterator[tuple[int, Lessons]]:
        """Layer by layer, those of the step's batch."""
        number = step % len(self.batches)
        if number in self._known:
            yield from self._known[number].items()
            return
        made: dict[int, Lessons] = {}
        for x in self._capture(self.batches[number]):
            lessons = make_lessons(x, self.method)
            self._room -= sum(lesson.nbytes() for lesson in lessons.values()) if self.keep else 0
            if self.keep and self._room > 0:
                made[x.layer] = lessons
            yield x.layer, lessons
        if self.keep and self._room > 0:
            self._known[number] = made

    def _capture(self, ids: Int[Tensor, "B N"]) -> Iterator[AttentionInputs]:
        # transformers stays unloaded until a model is really trained.
        from sparseland.models.capture import capture_qkv
        from sparseland.models.rope import find_ropes

        if self._ropes is None:
            self._ropes = find_ropes(self.model)
        return capture_qkv(self.model, ids, ropes=self._ropes)


@torch.no_grad()
def make_lessons(x: AttentionInputs, method: SeerAttention) -> Lessons:
    """What the gates of one layer can learn from its queries and keys on one batch."""
    size, n = method.block_size, x.k.shape[2]
    turns = None if x.rope is None else x.rope.tables(n, x.k)
    k = unrotated_pool(x.k, size, turns, extremes=True)
    starts = None if turns is None else (turns[0][::size], turns[1][::size])
    column = torch.arange(k.shape[2], device=k.device)
    lessons: Lessons = {}
    if method.phase != "decode":
        q = unrotated_pool(x.q, size, turns, extremes=False)
        target = block_max_probability(x.q, x.k, size, x.scale)
        first = q.shape[2] // 4  # the first quarter has too few blocks to choose from
        lessons["prefill"] = Lesson(
            q[:, :, first:],
            k,
            None if starts is None else (starts[0][first:], starts[1][first:]),
            starts,
            _normalised(target[:, :, first:]),
            column <= column[first:, None],
        )
    if method.phase != "prefill":
        half, at = decode_positions(n, size, k.device)
        q_turns = None if turns is None else (turns[0][at], turns[1][at])
        queries = x.q[:, :, at].float()
        target = block_max_probability(x.q[:, :, half:], x.k, size, x.scale, per_query=True)[:, :, at - half]
        target = torch.unflatten(target, 1, (x.k.shape[1], -1)).amax(2)
        # A token's own block is always read, so the gate tells only those before it apart.
        seen = column < (at // size)[:, None]
        lessons["decode"] = Lesson(
            queries if q_turns is None else turn_back(queries, *q_turns),
            k,
            q_turns,
            starts,
            _normalised(target.masked_fill(~seen, 0.0)),
            seen,
        )
    return lessons


def decode_positions(n: int, block_size: int, device: torch.device) -> tuple[int, Int[Tensor, " m"]]:
    """Where a text's last half begins, and its queries that a decode gate is shown, evenly spread."""
    half = max(n // 2, block_size)  # a first block has none to choose from
    return half, torch.linspace(half, n - 1, min(_POSITIONS, n - half), device=device).round().long()


def _normalised(target: Float[Tensor, "B H m n"]) -> Float[Tensor, "B H m n"]:
    """Rows that sum to 1; a row whose own block holds all but nothing is left at 0 and teaches nothing."""
    return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)


def divergence(gate: nn.Module, phase: str, lesson: Lesson) -> Float[Tensor, ""]:
    """KL(target || softmax of the gate's scores) in nats: a sum over key blocks, a mean over the rest."""
    assert isinstance(gate, Gates)
    scores = gate_scores(gate, phase, lesson).masked_fill(~lesson.seen, _NEVER)
    terms = F.kl_div(scores.log_softmax(-1), lesson.target, reduction="none")
    return terms.sum(-1).mean()


def gate_scores(gate: Gates, phase: str, lesson: Lesson) -> Float[Tensor, "B H m Mk"]:
    """The gate's logits for a lesson's rows."""
    if phase == "prefill":
        assert gate.prefill is not None
        q, k = gate.prefill(lesson.q, lesson.k, lesson.q_turns, lesson.k_turns)
    else:
        assert gate.decode is not None
        q = gate.decode.queries(lesson.q, lesson.q_turns)
        k = gate.decode.keys(lesson.k, lesson.k_turns)
    scores: Tensor = q @ k.mT / math.sqrt(q.shape[3])
    return scores
