"""Time to first token of whole models on a GPU: sparse prefill against dense FlashAttention-4.

    PYTHONPATH=src python benchmarks/gpu_model.py --out FILE.json [--models smollm2,llama-8b,qwen-7b-1m]

SmolLM2-135M reads real text with its own weights. Models of the shapes of Llama-3.1-8B and Qwen2.5-7B-1M have
random weights, whose attention would be noise; so their layers compute block patterns that FlexPrefill
selected on real inputs of the same length and shape (benchmarks/inputs.py; 7 query heads a key head are the
first 7 patterns of 8), and still run the selection itself on their own queries and keys, so that its time is
in the number. ``--layers`` cuts those models to their first layers: a layer's time does not depend on its
number, and the ratio is that of the whole model but for embedding and head. MLPs run in pieces of 64K
tokens, for dense and sparse alike, so that a million tokens fit.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from inputs import load_inputs, text
from torch import Tensor, nn

import sparseland as sl
from sparseland.attention.flexprefill import FlexPrefill
from sparseland.machine import circumstances
from sparseland.method import AttentionInputs, Calibration
from sparseland.models.surgery import decoder_of
from sparseland.patterns import BlockPattern, Pattern, PiecedPattern

MLP_PIECE = 65_536
SHAPES: dict[str, dict[str, Any]] = {
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    },
    "qwen-7b-1m": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 152064,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Recorded(FlexPrefill):
    """FlexPrefill that selects on what it is given, and computes what it selected on real inputs."""

    def pattern(self, x: AttentionInputs, calibration: Calibration | None = None) -> Pattern:
        made = super().pattern(x)
        if isinstance(made, PiecedPattern):
            for _ in made.pieces():  # its lists are made when they are needed: now
                pass
        return RECORDED[x.q.shape[2]]


RECORDED: dict[int, Pattern] = {}


def selected(length: int, method: FlexPrefill) -> BlockPattern:
    """What the method selects on real inputs of this length, 32 heads."""
    # Reading a million tokens densely takes minutes: the first half of the layers then.
    layers = (1, 15, 28) if length <= 524_288 else (1, 8, 15)
    with torch.no_grad():
        x = load_inputs(length, "llama-8b", layers)[0]
        found = method.pattern(x)
        if isinstance(found, PiecedPattern):
            found = joined(found)
    assert isinstance(found, BlockPattern)
    return found


def joined(pieces: PiecedPattern) -> BlockPattern:
    """Lists made in pieces as one."""
    parts = [part for _, part in pieces.pieces()]
    assert all(isinstance(p, BlockPattern) for p in parts)
    longest = max(int(p.counts.max()) for p in parts)
    cut = [p.indices[..., :longest] for p in parts]
    indices = torch.cat([F.pad(i, (0, longest - i.shape[-1])) for i in cut], 2)
    counts = torch.cat([p.counts for p in parts], 2)
    return BlockPattern(pieces.n_queries, pieces.n_keys, parts[0].block_size, counts, indices)


def record(found: BlockPattern, heads: int) -> None:
    """Keep a pattern for models with that many heads."""
    length, own = found.n_queries, torch.arange(heads, device=found.counts.device)
    if heads != 32:  # 4 key heads with 7 query heads each
        own = (own // 7) * 8 + own % 7
    longest = int(found.counts[:, own].max())
    RECORDED[length] = BlockPattern(
        found.n_queries, found.n_keys, found.block_size,
        found.counts[:, own].contiguous(), found.indices[:, own, :, :longest].contiguous(),
    )  # fmt: skip


@contextmanager
def dense_fa4(model: nn.Module) -> Iterator[None]:
    """The model on dense FlashAttention-4."""
    from flash_attn.cute import interface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
    ) -> tuple[Tensor, None]:
        turned = [t.transpose(1, 2) for t in (q, k, v)]
        return interface._flash_attn_fwd(*turned, causal=True, softmax_scale=options.get("scaling"))[0], None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("fa4_benchmark", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("fa4_benchmark", lambda **_: None)
    before = model.config._attn_implementation
    model.config._attn_implementation = "fa4_benchmark"
    try:
        yield
    finally:
        model.config._attn_implementation = before


def in_pieces(mlp: nn.Module) -> None:
    """Run an MLP over pieces of the prompt."""
    whole = mlp.forward

    def forward(x: Tensor) -> Tensor:
        if x.shape[1] <= MLP_PIECE:
            return whole(x)
        out = torch.empty_like(x)
        for i in range(0, x.shape[1], MLP_PIECE):
            out[:, i : i + MLP_PIECE] = whole(x[:, i : i + MLP_PIECE])
        return out

    mlp.forward = forward  # type: ignore[method-assign]


def shaped(name: str, layers: int, length: int) -> nn.Module:
    """A random model of this shape and depth, on the GPU in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**SHAPES[name], "num_hidden_layers": layers}, max_position_embeddings=2 * length)
    with torch.device("cuda"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(before)
    return model.eval()


@torch.no_grad()
def first_token(model: nn.Module, ids: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds to the first token (fastest after one to warm up), and peak GB above the weights."""
    base = torch.cuda.memory_allocated()
    times = []
    for turn in range(repeats + 1):
        if turn == 1:
            torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        out.logits[0, -1].argmax().item()
        times.append(time.perf_counter() - start)
        del out
    return min(times[1:]), (torch.cuda.max_memory_allocated() - base) / 1e9


def compare(name: str, model: nn.Module, ids: Tensor, method: FlexPrefill, repeats: int) -> dict[str, Any]:
    """Dense FA4 and the sparse recipe on the same model and prompt."""
    with dense_fa4(model):
        dense_s, dense_gb = first_token(model, ids, repeats)
    torch.cuda.empty_cache()
    with sl.apply(model, method) as handle:
        sparse_s, sparse_gb = first_token(model, ids, repeats)
        density = handle.stats().density
    return {
        "model": name, "length": ids.shape[1], "layers": model.config.num_hidden_layers,
        "method": method.spec,
        "density": density, "dense_fa4_s": dense_s, "sparse_s": sparse_s, "speedup": dense_s / sparse_s,
        "dense_peak_gb": dense_gb, "sparse_peak_gb": sparse_gb,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default="smollm2,llama-8b,qwen-7b-1m")
    parser.add_argument("--lengths", default="32768,131072,524288")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--gamma", type=float, default=0.9)
    options = parser.parse_args()
    result: dict[str, Any] = {**circumstances("python " + " ".join(sys.argv)), "rows": []}

    def add(make: Callable[[], dict[str, Any]]) -> None:
        try:
            row = make()
        except Exception as problem:
            row = {"failed": f"{type(problem).__name__}: {str(problem)[:300]}"}
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        result["rows"].append(row)
        options.out.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()

    lengths = [int(n) for n in options.lengths.split(",")]
    for name in options.models.split(","):
        if name == "smollm2":
            from sparseland.models import load_model
            from sparseland.tasks.text import tokenize

            for n in (n for n in lengths if n <= 131_072):
                loaded = load_model(None, "bfloat16", "cuda", n / 8192, n)
                ids = tokenize(loaded.tokenizer, text(n))[None, :n].cuda()
                method = FlexPrefill(gamma=options.gamma)
                add(lambda m=loaded.model, i=ids, p=method: compare("smollm2", m, i, p, 2))
    names = [name for name in options.models.split(",") if name != "smollm2"]
    for n in lengths if names else []:
        try:
            found = selected(n, FlexPrefill(gamma=options.gamma))
        except Exception as problem:
            print(f"no pattern of {n} tokens: {problem}", flush=True)
            continue
        for name in names:
            if n > 524_288 and name == "llama-8b":
                continue  # its cache and queries would not fit

            def run(n: int = n, name: str = name, found: BlockPattern = found) -> dict[str, Any]:
                record(found, SHAPES[name]["num_attention_heads"])
                model = shaped(name, options.layers, n)
                for layer in decoder_of(model).layers:
                    in_pieces(layer.mlp)
                ids = torch.randint(1000, (1, n), device="cuda")
                return compare(name, model, ids, Recorded(gamma=options.gamma), 3 if n <= 524_288 else 2)

            torch.cuda.empty_cache()
            add(run)
            RECORDED.clear()


if __name__ == "__main__":
    main()
