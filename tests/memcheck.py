"""``make gpu-memcheck``: NVIDIA's compute-sanitizer over tests that launch every compiled kernel.

The sanitizer slows a process down so much that the tests are split among many of them, a few tests each,
spread over the GPUs. Prints what went wrong, and how many tests are done (skipped ones count); exits with 1
if anything did.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
CHOICE = (
    "first or compiled_kernels or (channel_labels and triton) or top_indices or several_programs "
    "or (lowbit and bits and gluon)"
)
FILES = ("tests/test_gpu_devices.py", "tests/ops")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(filter(None, ("src", "tests", os.environ.get("PYTHONPATH")))),
    # Each tensor has memory of its own, so that nothing is read beyond its end unseen.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
}
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def collect(choice: str) -> list[str]:
    """Names of the tests to run."""
    found = subprocess.run(
        [*PYTEST, "--collect-only", "-k", choice, *FILES],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    tests = [line for line in found.stdout.splitlines() if "::" in line]
    if not tests:
        sys.exit(f"no tests found:\n{found.stdout[-2000:]}{found.stderr[-2000:]}")
    return tests


def check(tests: tuple[str, ...], gpu: int, limit: float) -> tuple[int, str]:
    """Run tests under the sanitizer: how many passed or were skipped; what went wrong (empty: nothing)."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *PYTEST, *tests]
    environment = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": str(gpu)}
    try:
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return 0, f"not done within {limit:.0f} s: {' '.join(tests)}"
    done = sum(map(int, re.findall(r"(\d+) (?:passed|skipped)", ran.stdout)))
    clean = ran.returncode == 0 and "ERROR SUMMARY: 0 errors" in ran.stdout
    return done, "" if clean else f"{' '.join(tests)}\n{ran.stdout[-3000:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=min(24, os.cpu_count() or 1))
    parser.add_argument("--tests", type=int, default=5, help="tests of a process")
    parser.add_argument("--limit", type=float, default=600, help="seconds of a process")
    parser.add_argument("--choice", default=CHOICE, help="which tests, as pytest's -k takes it")
    options = parser.parse_args()
    tests, gpus = collect(options.choice), itertools.cycle(range(torch.cuda.device_count()))
    # Long tests lie side by side: dealing them out like cards gives each process some.
    count = -(-len(tests) // options.tests)
    hands = [tuple(tests[i::count]) for i in range(count)]
    started, finished, wrong = time.time(), 0, 0
    with ThreadPoolExecutor(options.processes) as pool:
        for done, problem in pool.map(lambda hand: check(hand, next(gpus), options.limit), hands):
            finished, wrong = finished + done, wrong + bool(problem)
            print(f"[{time.time() - started:4.0f} s] {finished} of {len(tests)} done", flush=True)
            if problem:
                print(problem, flush=True)
    sys.exit(int(wrong > 0 or finished < len(tests)))


if __name__ == "__main__":
    main()
