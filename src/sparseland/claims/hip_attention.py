"""HiP's claim: a tree search finds the keys that matter in O(N log N), without training, at little loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparseland as sl
from sparseland.attention.hip_attention import HipAttention
from sparseland.attention.streaming import Streaming
from sparseland.claims._prefill import CONTEXT, Kept, Window
from sparseland.measure import DECODE_TOKENS, run_window, timed
from sparseland.method import AttentionInputs
from sparseland.models import load_model
from sparseland.models.capture import capture_qkv
from sparseland.ops.attend import attend
from sparseland.ops.tree_search import n_representatives
from sparseland.patterns import BlockColumnPattern, ColumnPattern, Pattern, causal_pairs, cdiv
from sparseland.tasks.loss import cross_entropy
from sparseland.tasks.text import default_text, tokenize

CLAIM = (
    "attention to the top k keys found by hierarchical pruning costs O(N log N) and needs no training, at a "
    "quality near full attention's and above that of a window and of random pruning"
)

# The loss may grow by this share before we call it a change.
TOLERANCE = 0.01
# Time grows with this power of the length or less: N log N is N^1.1 at these lengths, dense N^2.
SUBQUADRATIC = 1.5
LENGTHS = tuple(1 << i for i in range(13, 20))  # 8K to 512K tokens
CPU_LENGTHS = (2048, 4096, 8192, 16_384)


def reproduce(scale: str = "smoke", seed: int = 0) -> dict[str, Any]:
    """HiP on real text against a window and random pruning at its density, while decoding, and its cost.

    Args:
        scale: ``smoke`` (one window of 2048 tokens, CPU) or ``full`` (8192 tokens, and one layer's attention
            timed at 8K to 512K tokens on a GPU, without one at 2K to 16K).
        seed: where in the text the window lies.
    """
    cuda = scale == "full" and torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    length = 2048 if scale == "smoke" else 8192
    window = Window(length, seed, device)
    rows: list[dict[str, Any]] = [{"setting": "dense", "density": 1.0, "loss": window.dense_loss}]
    # The search alone: no dense layers and no dense queries, which would hide it at this length.
    ours = HipAttention(k=length // 8, window=length // 32, dense_layers=0, dense_queries=0, phase="prefill")
    kept = window.keep(ours.pattern)
    density = statistics.fmean(kept.density)
    rivals = {
        "random blocks of keys in place of the found ones": window.keep(partial(random_pruning, ours, seed)),
        "window and sinks": window.keep(Streaming.at_density(density, length).pattern),
    }
    rows.append({"setting": "hip", "spec": ours.spec, **kept.means(), "loss": window.loss_with(ours)})
    rows += [{"setting": name, **other.means()} for name, other in rivals.items()]
    rows[-1]["loss"] = window.loss_with(Streaming.at_density(density, length))
    if scale == "full":
        rows += further_settings(window, ours)
    found = {name: found_mass(other) for name, other in {"hip": kept, **rivals}.items()}
    loss, loss_of_window = (rows[i]["loss"] / window.dense_loss - 1 for i in (1, 3))
    decoding = decoded(
        window, replace(ours, phase="decode"), seed, refreshes=(8,) if scale == "smoke" else (1, 8)
    )
    rows += decoding
    work = {n: work_per_layer(HipAttention(), n) for n in (16_384, 524_288)}
    work_exponent = math.log(work[524_288] / work[16_384]) / math.log(524_288 / 16_384)
    rows.append(
        {"setting": "pairs and representatives of a searched layer (arithmetic)", "exponent": work_exponent}
    )
    result: dict[str, Any] = {
        "slug": "hip-attention",
        "claim": CLAIM,
        "paper": {
            "time": "O(T log T)",
            "mask_memory": "O(T)",
            "defaults": "k 512, b_q 32, b_k 2, refresh 8, 3 or 4 dense layers",
            "measured_on": "WikiText-2, LongBench, passkey, BookSum; Llama 2 and 3.1, Qwen (7B and more)",
        },
        "ours": {
            "length": length,
            "density": density,
            "loss_increase": loss,
            "loss_increase_window": loss_of_window,
            "mass_kept": found["hip"],
            "mass_kept_random_pruning": found["random blocks of keys in place of the found ones"],
            "mass_kept_window": found["window and sinks"],
            "decode_loss_increase": decoding[-1]["loss"] / decoding[0]["loss"] - 1,
            "work_exponent": work_exponent,
        },
        "differs": (
            f"SmolLM2-135M at {length} tokens of Python's documentation; k is an eighth of the prompt, with "
            "neither dense layers nor dense queries (the recipe's would be most of a prompt this short)"
        ),
        "rows": rows,
    }
    holds = loss <= TOLERANCE and loss < loss_of_window
    holds &= found["hip"] > max(value for name, value in found.items() if name != "hip")
    holds &= result["ours"]["decode_loss_increase"] <= TOLERANCE
    if scale == "full":
        times, ours_exponent, dense_exponent = scaling(device, seed)
        rows += times
        result["ours"] |= {"time_exponent": ours_exponent, "dense_time_exponent": dense_exponent}
        result["ours"]["speedup_at_the_longest"] = times[-1]["speedup"]
        holds &= ours_exponent < SUBQUADRATIC
    result["holds"] = bool(holds)
    return result


# ---------------------------------------------------------------- quality


def found_mass(kept: Kept) -> float:
    """Attention mass kept, averaged over layers and heads."""
    return statistics.fmean(kept.recall)


def random_pruning(method: HipAttention, seed: int, x: AttentionInputs) -> Pattern:
    """The method's pattern with as many key blocks drawn at random before the window."""
    pattern = method.pattern(x)
    if not isinstance(pattern, BlockColumnPattern):
        return pattern
    lists = pattern.columns
    size, first = method.block_k, cdiv(method.sinks, method.block_q) * method.block_q
    g = torch.Generator(x.q.device).manual_seed(seed + x.layer)
    near = torch.arange(lists.counts.shape[2], device=x.q.device) * method.block_q + x.offset
    near = (near - method.window + 1).clamp(min=0) // method.block_q * method.block_q
    candidates = torch.arange(first, x.k.shape[2], size, device=x.q.device)
    rank = torch.rand(*lists.counts.shape, len(candidates), generator=g, device=x.q.device)
    rank = rank.masked_fill(candidates >= near[:, None], 2.0)
    keep = lists.indices.shape[-1] // size
    drawn = candidates[rank.topk(min(keep, len(candidates)), dim=-1, largest=False).indices]
    # Rows with fewer candidates than ``keep`` take them all; what they drew besides sorts behind.
    drawn = drawn.masked_fill(drawn >= near[:, None], x.k.shape[2]).sort(dim=-1).values
    keys = (drawn[..., None] + torch.arange(size, device=drawn.device)).flatten(-2).to(torch.int32)
    columns = ColumnPattern(x.q.shape[2], x.k.shape[2], lists.block_size, lists.counts, keys)
    return replace(pattern, columns=columns)


def further_settings(window: Window, ours: HipAttention) -> list[dict[str, Any]]:
    """The paper's recipe, and what single choices do."""
    recipe = HipAttention(phase="prefill")
    settings = {
        "the recipe: k 512, 3 dense layers, dense queries": recipe,
        "the recipe without dense queries": replace(recipe, dense_queries=0),
        "one search per group": replace(ours, group="shared"),
        "every query votes": replace(ours, query_stride=1),
        "half the keys": replace(ours, k=ours.k // 2),
    }
    rows = []
    for name, method in settings.items():
        kept = window.keep(method.pattern)
        rows.append({"setting": name, "spec": method.spec, **kept.means(), "loss": window.loss_with(method)})
    return rows


def decoded(
    window: Window, method: HipAttention, seed: int, refreshes: Sequence[int]
) -> list[dict[str, Any]]:
    """Loss of tokens decoded after a dense prompt, dense and with selections kept for some steps."""
    ids, length = window.ids[0], window.length - DECODE_TOKENS - 1
    settings = {f"decoding, refresh {r}": replace(method, refresh=r) for r in refreshes}
    rows = []
    for name, setting in {"decoding, dense": None, **settings}.items():
        if setting is None:
            run, read = run_window(window.model, ids, length), 1.0
        else:
            with sl.apply(window.model, setting) as handle:
                run = run_window(window.model, ids, length)
                read = handle.stats().decode_density or 1.0
        loss = cross_entropy(run.decode_logits, ids[length : length + len(run.decode_logits)].cpu())
        rows.append({"setting": name, "loss": loss, "decode_density": read, "decode_ms": run.decode_ms})
    return rows


# ---------------------------------------------------------------- cost


def work_per_layer(method: HipAttention, length: int) -> float:
    """Query-key products of one head: those of the search, and the pairs of the found keys and the window."""
    sinks = cdiv(method.sinks, method.block_q) * method.block_q
    votes = cdiv(method.block_q, method.query_stride)
    total = 0.0
    for first in range(0, length, method.block_q):
        near = max(0, first - method.window + 1) // method.block_q * method.block_q
        blocks = max(0, near - sinks) // method.block_k
        total += n_representatives(blocks, method.k // method.block_k) * method.block_k * votes
        found = min(blocks * method.block_k, method.k) + min(sinks, near)
        total += method.block_q * (found + first - near + (method.block_q + 1) / 2)
    return total


@torch.no_grad()
def scaling(device: str, seed: int) -> tuple[list[dict[str, Any]], float, float]:
    """One layer's attention by length, dense and ours; the fitted powers of ours and of dense.

    Queries and keys are those of the embedded model on its text, repeated where it is too short, stretched
    by YaRN to the longest length; a shorter prompt is the beginning of it.
    """
    cuda = device == "cuda"
    lengths = LENGTHS if cuda else CPU_LENGTHS
    x = longest_input(lengths[-1], device)
    method = HipAttention(dense_layers=0, dense_queries=0, phase="prefill")
    rows: list[dict[str, Any]] = []
    for n in lengths:
        at = replace(x, q=x.q[:, :, :n], k=x.k[:, :, :n], v=x.v[:, :, :n])
        row: dict[str, Any] = {"setting": f"one layer, {n} tokens", "spec": method.spec}
        row["dense_ms"], row["dense"] = dense_ms(at)
        for name, variant in (("", method), ("shared_", replace(method, group="shared"))):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            pattern = variant.pattern(at)
            if cuda:
                row[f"{name}select_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
            row[f"{name}select_ms"] = median_ms(partial(variant.pattern, at), at)
            if not name:
                row["density"] = float(pattern.density().mean())
                row["pairs_per_query"] = row["density"] * causal_pairs(n, n) / n
                row["attend_ms"] = median_ms(partial(attend, at.q, at.k, at.v, pattern, scale=at.scale), at)
            row[f"{name}select_of_dense"] = row[f"{name}select_ms"] / row["dense_ms"]
            del pattern
        row["speedup"] = row["dense_ms"] / (row["select_ms"] + row["attend_ms"])
        row["shared_speedup"] = row["dense_ms"] / (row["shared_select_ms"] + row["attend_ms"])
        rows.append(row)
    # Launches weigh at short lengths; the power is that of the longer half.
    far = rows[len(rows) // 2 :]
    ours = [row["select_ms"] + row["attend_ms"] for row in far]
    return rows, power(lengths[-len(far) :], ours), power(lengths[-len(far) :], [r["dense_ms"] for r in far])


def longest_input(length: int, device: str) -> AttentionInputs:
    """One layer's inputs for ``length`` tokens."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    stretch = length / CONTEXT if length > CONTEXT else None
    loaded = load_model(None, dtype=dtype, device=device, rope_scale=stretch, length=length)
    ids = tokenize(loaded.tokenizer, default_text())
    ids = ids.repeat(cdiv(length, ids.numel()))[None, :length].to(device)
    (x,) = capture_qkv(loaded.model, ids, (10,))
    return x


def median_ms(work: Any, x: AttentionInputs, repeats: int = 3) -> float:
    """Milliseconds of a call, warm."""
    work()
    return 1e3 * statistics.median(timed(work, x.q.device)[0] for _ in range(repeats))


def dense_ms(x: AttentionInputs) -> tuple[float, str]:
    """The fastest dense causal attention at hand, and its name."""
    calls: dict[str, Any] = {"sdpa": partial(_sdpa, x)}
    if x.q.is_cuda:
        calls["cudnn"] = partial(_cudnn, x)
        try:
            from flash_attn.cute import interface

            turned = [t.transpose(1, 2) for t in (x.q, x.k, x.v)]
            calls["fa4"] = lambda: interface._flash_attn_fwd(*turned, causal=True)
        except ImportError:
            pass
    times: dict[str, float] = {}
    for name, call in calls.items():
        try:
            times[name] = median_ms(call, x)
        except Exception:  # a rival that can't run this is none
            continue
    best = min(times, key=lambda name: times[name])
    return times[best], best


def _sdpa(x: AttentionInputs) -> Tensor:
    return F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, scale=x.scale, enable_gqa=True)


def _cudnn(x: AttentionInputs) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(x)


def power(lengths: Sequence[int], times: Sequence[float]) -> float:
    """Slope of log time over log length, by least squares."""
    return statistics.linear_regression([math.log(n) for n in lengths], [math.log(t) for t in times]).slope
