"""Prefill of the whole embedded model, sparse against dense: python benchmarks/cpu_prefill.py --out FILE.json

Dense is timed before and after every sparse configuration; the faster of the two is the rival. Losses are
those of the last 512 tokens of each window of the default text. ``--all`` measures the cheapest setting that
each method's grid has for this length instead of the settings that keep 1 % loss; methods that add trained
parts to a model run untrained, which costs them loss, not time; a gate that is meaningless untrained is
left out.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from sparseland.files import write_atomically
from sparseland.handle import apply
from sparseland.machine import circumstances
from sparseland.measure import TAIL_TOKENS, timed
from sparseland.method import PrefillMethod, method_class, method_slugs, parse_spec
from sparseland.models import load_model
from sparseland.tasks.loss import cross_entropy
from sparseland.tasks.text import default_text, tokenize, windows

SPECS = ["flexprefill:gamma=0.95,tau=1,block_size=64,min_budget=1024"]
CALIBRATION_TOKENS = 2048
CPU = torch.device("cpu")

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--length", type=int, default=8192)
parser.add_argument("--windows", type=int, default=4)
parser.add_argument("--dtypes", default="float32,bfloat16")
parser.add_argument("--specs", nargs="*", default=SPECS)
parser.add_argument("--all", action="store_true", help="the cheapest setting of every prompt method")
options = parser.parse_args()


def every_method(length: int) -> list[str]:
    """The first setting of each method's grid."""
    classes = [method_class(slug) for slug in method_slugs()]
    return [
        cls.grid(length)[0].spec
        for cls in classes
        if issubclass(cls, PrefillMethod)
        and not cls.card.control
        and not (cls.card.training == "training" and cls.calibrates())
    ]


@torch.no_grad()
def prefill(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of the prompt, and the loss of its last tokens."""
    seconds, out = timed(
        lambda: model(input_ids=ids[None], use_cache=True, logits_to_keep=TAIL_TOKENS + 1), CPU
    )
    return seconds, cross_entropy(out.logits[0, :-1], ids[-TAIL_TOKENS:])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


result = {
    **circumstances("python " + " ".join(sys.argv)),
    "inputs": "SmolLM2-135M-Instruct on the Python documentation",
    "rows": [],
}
for dtype in options.dtypes.split(","):
    loaded = load_model(None, dtype, "cpu", None, options.length)
    ids = tokenize(loaded.tokenizer, default_text())
    texts = windows(ids[CALIBRATION_TOKENS:], options.length, options.windows)
    prefill(loaded.model, texts[0])  # the first call allocates
    dense = [prefill(loaded.model, text) for text in texts]
    specs = every_method(options.length) if options.all else options.specs
    for i, spec in enumerate(specs):
        method = parse_spec(spec)
        with apply(loaded.model, method, calibration_ids=ids[None, :CALIBRATION_TOKENS]) as handle:
            sparse = [prefill(loaded.model, text) for text in texts]
            density = handle.stats().density
        # Many settings in a row share a dense run between them.
        again = not options.all or i % 4 == 3 or i == len(specs) - 1
        after = [prefill(loaded.model, text) for text in texts] if again else dense
        dense_s = min(mean([s for s, _ in dense]), mean([s for s, _ in after]))
        dense_loss = mean([loss for _, loss in dense])
        row = {
            "slug": method.card.slug, "recipe": spec, "dtype": dtype, "length": options.length,
            "windows": options.windows, "density": density,
            "loss_change": mean([loss for _, loss in sparse]) / dense_loss - 1, "dense_loss": dense_loss,
            "dense_s": dense_s, "ours_s": mean([s for s, _ in sparse]),
        }  # fmt: skip
        row["speedup"] = row["dense_s"] / row["ours_s"]
        row["within_1_percent"] = row["loss_change"] <= 0.01
        dense = after
        result["rows"].append(row)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
write_atomically(options.out, json.dumps(result, indent=1).encode())
