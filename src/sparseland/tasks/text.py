"""Text to measure on: the user's own, or the Python documentation that every Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sparseland.errors import SparselandError

MAX_BYTES = 256 * 2**20


def default_text() -> str:
    """The English Python documentation inside ``pydoc_data.topics``, in the order of its topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def load_text(path: str | Path) -> str:
    """A UTF-8 file, or all files of a folder (sorted, hidden ones left out) joined by blank lines.

    Raises:
        SparselandError: missing, empty, too large, or not UTF-8 text.
    """
    path = Path(path)
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if p.is_file() and not _hidden(p, path)]
        if not files:
            raise SparselandError(f"text {path}: the folder holds no files")
    elif path.is_file():
        files = [path]
    else:
        problem = "neither a file nor a folder" if path.exists() else "no such file or folder"
        raise SparselandError(f"text {path}: {problem}")
    total = sum(p.stat().st_size for p in files)
    if total > MAX_BYTES:
        raise SparselandError(f"text {path} has {total >> 20} MiB; at most {MAX_BYTES >> 20} are read")
    text = "\n\n".join(_read(p) for p in files)
    if not text.strip():
        raise SparselandError(f"text {path} is empty")
    return text


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise SparselandError(f"text {path}: {cause.strerror}") from cause
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise SparselandError(f"text {path} is not UTF-8 (byte {cause.start})") from cause
    if "\0" in text:
        raise SparselandError(f"text {path} is binary")
    return text


def tokenize(tokenizer: Any, text: str) -> Int[Tensor, " N"]:
    """Token ids of a text, without special tokens."""
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long
    )


def windows(ids: Int[Tensor, " N"], length: int, count: int) -> Int[Tensor, "W N"]:
    """``count`` windows of ``length`` tokens, evenly spread over the text (they may overlap).

    Raises:
        SparselandError: the text is shorter than one window.
    """
    if ids.numel() < length:
        raise SparselandError(f"the text has {ids.numel()} tokens; {length} are needed")
    room = ids.numel() - length
    starts = [i * room // max(count - 1, 1) for i in range(count)]
    return torch.stack([ids[s : s + length] for s in starts])
