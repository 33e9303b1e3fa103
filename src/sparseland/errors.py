"""What can go wrong: a mistake that the user can mend, printed as a single line; and too little memory."""

from __future__ import annotations


class SparselandError(ValueError):
    """A mistake in what was asked: says what, which value, and what is allowed (exit code 2 on the CLI)."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: PyTorch has a type of its own for this on GPUs only."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "memory" in str(error).lower()
    )
