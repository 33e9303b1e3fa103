"""Record `sparseland bench` of every op: python benchmarks/cpu_ops.py --out FILE.json [--ops a,b]"""

import argparse
import json
import sys
from pathlib import Path

from sparseland.bench import BENCHMARKS, run
from sparseland.files import write_atomically
from sparseland.machine import circumstances

LENGTH = 8192

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--ops", default=",".join(BENCHMARKS))
options = parser.parse_args()

result = {
    **circumstances("python " + " ".join(sys.argv)),
    "inputs": "q, k, v of SmolLM2-135M-Instruct on the Python documentation; weights of sparse_gemv random",
    "rows": [],
}
for op in options.ops.split(","):
    for row in run(op, LENGTH if "length" in BENCHMARKS[op].options else None):
        result["rows"].append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
write_atomically(options.out, json.dumps(result, indent=1).encode())
