"""Keep a run of `sparseland frontier`: python benchmarks/frontier_rows.py RESULTS.jsonl --out FILE.json"""

import argparse
import json
from pathlib import Path

from sparseland.files import write_atomically
from sparseland.report.results import read_results, with_fastest_dense, with_shared_decoding

SHOWN = (
    "label", "role", "stage", "length", "status", "density", "decode_density", "loss", "dense_loss",
    "decode_loss", "dense_decode_loss", "kl", "top1", "prefill_s", "dense_prefill_s",
    "decode_ms", "dense_decode_ms", "dense_decoding", "cache_bytes", "dense_cache_bytes", "reason",
)  # fmt: skip

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("results", type=Path)
parser.add_argument("--out", type=Path, required=True)
options = parser.parse_args()
rows = [json.loads(line) for line in options.results.read_text(encoding="utf-8").splitlines()]
run = [row for row in rows if row["kind"] == "run"][-1]
drifts = [row for row in rows if row["kind"] == "drift"]
measured = with_shared_decoding([row for row in rows if row["kind"] == "measurement"])
kept = {
    **{name: run[name] for name in ("command", "date", "machine", "versions", "threads", "model", "text")},
    "choice": [row for row in rows if row["kind"] == "choice"][-1],
    "drift": drifts,
    "tasks": [row for row in rows if row["kind"] == "task"],
    "left_out": read_results(options.results).left_out,
    "rows": [{n: r[n] for n in SHOWN if n in r} for r in with_fastest_dense(measured, drifts)],
}
write_atomically(options.out, json.dumps(kept, indent=1).encode())
