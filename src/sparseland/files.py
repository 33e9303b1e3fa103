"""Reading and writing files that others may have made, or may be reading: whole, bounded, checked."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from sparseland.errors import SparselandError

MAX_JSON_BYTES = 64 * 2**20


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part.

    The new one has a new file's permissions; where the path is a link, the link is replaced.

    Raises:
        OSError: it can't be written; the old one is untouched.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; give this one the permissions a plain open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file of at most ``MAX_JSON_BYTES``; messages call it a ``what`` ("recipe").

    Raises:
        SparselandError: not there, too large, not JSON, or not an object.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
    except OSError as cause:
        raise SparselandError(f"can't read the {what} {path}: {cause.strerror or cause}") from cause
    if len(content) > MAX_JSON_BYTES:
        raise SparselandError(f"{path} has over {MAX_JSON_BYTES >> 20} MiB; a {what} is small")
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as cause:
        raise SparselandError(f"{path} is not a {what}: it is no valid JSON") from cause
    if not isinstance(data, dict):
        raise SparselandError(f"{path} is not a {what}: a JSON object was expected")
    return data
