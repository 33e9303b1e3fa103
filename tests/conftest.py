"""What must be set before the tests: each worker's share of the cores; Triton's interpreter without a GPU."""

import os
from typing import Any

# Workers that each use all cores wait for one another: small tensors then take many times as long.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import torch  # noqa: E402  # it reads the environment


def _reduce_slices(ops: Any, tensors: Any) -> list[Any]:
    """Triton's interpreter combines numbers one at a time; whole slices give the same, far faster."""
    arrays = [t.handle.data for t in tensors]

    def part(i: int) -> tuple[Any, ...]:
        return tuple(
            ops.to_tensor(a.take(i, ops.axis), t.dtype) for a, t in zip(arrays, tensors, strict=True)
        )

    total = part(0)
    for i in range(1, arrays[0].shape[ops.axis]):
        total = ops.combine_fn.fn(*total, *part(i))
        total = total if isinstance(total, tuple) else (total,)
    return list(total)


if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    def _reduce(ops: Any, tensors: Any, slowly: Any = interpreter.ReduceOps.generic_reduce) -> Any:
        plain = ops.axis is not None and not ops.keep_dims
        return _reduce_slices(ops, tensors) if plain else slowly(ops, tensors)

    interpreter.ReduceOps.generic_reduce = _reduce  # as it is in Triton 3.9; tests/ops/test_interpreter.py
