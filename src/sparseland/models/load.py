"""Loading the model that the user names: an id, a folder, or the embedded default."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from sparseland.errors import SparselandError
from sparseland.models.embedded import NAME as EMBEDDED
from sparseland.models.embedded import embedded_folder
from sparseland.models.folder import LoadedModel, as_dtype, quiet, read_model
from sparseland.models.probe import probe

MAX_LAYERS = 1000
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def load_model(
    name: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    rope_scale: float | Literal["fit"] | None = None,
    length: int | None = None,
) -> LoadedModel:
    """A decoder in eval mode with its tokenizer, from safetensors only; a model's own code is never run.

    Args:
        name: Hugging Face id or folder; None = the embedded default.
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: bfloat16 where the device multiplies
            matrices in it natively (CUDA; CPUs with AVX512-BF16 or AMX), else float32.
        device: torch device; None = CUDA if there is one, else the CPU.
        rope_scale: stretch the model's context by this factor with YaRN (Peng et al., 2023); ``fit``: as far
            as ``length`` needs.
        length: the longest prompt in tokens that will be used.

    Raises:
        SparselandError: one line on what can't be used: the dtype or device, a folder without
            configuration, weights or tokenizer, an id that can't be fetched, an architecture that is no
            decoder, attention that has no SDPA and can't be made sparse either, a length beyond the model's
            context, a context that can't be stretched.
    """
    target = _device(device)
    kind = _auto_dtype(target) if dtype == "auto" else as_dtype(dtype)
    if name is None:
        source, offline, label = str(embedded_folder()), True, EMBEDDED
    else:
        (source, offline), label = _source(name), name
    with _reading(label), quiet():
        config = _config(source, label, offline)
        _check_decoder(config, label)
        _fit_length(config, label, rope_scale, length)
        tokenizer = _tokenizer(source, label, offline)
        model: Any = read_model(source, kind, config=config, local_files_only=offline)
        if model.config.get_text_config()._attn_implementation != "sdpa":
            _check_eager(model, label)
    return LoadedModel(model.to(target), tokenizer, label)


def native_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (else bfloat16 is slower than float32)."""
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        if getattr(torch.cpu, check, bool)():
            return True
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    # "flags" on x86, "Features" on ARM.
    flags = {word for line in lines if line.startswith(("flags", "Features")) for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _auto_dtype(device: torch.device) -> torch.dtype:
    native = native_bf16() if device.type == "cpu" else device.type == "cuda"
    return torch.bfloat16 if native else torch.float32


def _device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise SparselandError(f"device={device!r} can't be used here: {_first_line(cause)}") from cause
    if target.type == "meta":
        raise SparselandError(f"device={device!r} can't be used here: its tensors have no values")
    return target


@contextmanager
def _reading(label: str) -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise about a model into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except SparselandError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, RuntimeError) as cause:
        if isinstance(cause, torch.OutOfMemoryError):
            raise
        raise SparselandError(f"model {label!r} can't be read: {_first_line(cause)}") from cause


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------ source


def _source(name: str) -> tuple[str, bool]:
    """Where to read from, and whether without the network; a folder is checked for what must be in it."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_folder(folder, name)
        return str(folder), True
    if folder.exists():
        raise SparselandError(f"model {name!r} is a file; a folder or a Hugging Face id is needed")
    if name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise SparselandError(f"model {name!r}: there is no such folder")
    return name, _offline()


def _check_folder(folder: Path, name: str) -> None:
    if not (folder / "config.json").is_file():
        raise SparselandError(f"model folder {name!r} has no config.json")
    if not any(folder.glob("*.safetensors")):
        others = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".gguf"))
        found = f" (found {others[0]}; only safetensors files are read)" if others else ""
        raise SparselandError(f"model folder {name!r} has no weights: no *.safetensors file{found}")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise SparselandError(
            f"model folder {name!r} has no tokenizer: none of {', '.join(_TOKENIZER_FILES)}"
        )


def _offline() -> bool:
    """Whether the hub can't be reached, found out at once instead of after half a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    if getproxies():  # a proxy resolves names for us
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def _config(source: str, name: str, offline: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=offline)
    except OSError as cause:
        if Path(source).is_dir():
            raise
        why = "the hub can't be reached and it is not in the local cache" if offline else _first_line(cause)
        raise SparselandError(f"model {name!r} is no folder here and can't be fetched: {why}") from cause
    except ValueError as cause:
        if "trust_remote_code" not in str(cause):
            raise
        raise SparselandError(f"model {name!r} needs Python code of its own, which is never run") from cause
    except Exception as cause:  # a field of the wrong kind raises whatever it happens to break
        raise SparselandError(f"model {name!r}: bad config.json: {_first_line(cause)}") from cause


def _tokenizer(source: str, name: str, offline: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=offline)
    except Exception as cause:  # tokenizers raises bare Exception for a malformed file
        raise SparselandError(f"model {name!r}: its tokenizer can't be read: {_first_line(cause)}") from cause


# ------------------------------------------------------------------ checks


def _check_decoder(config: Any, name: str) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > MAX_LAYERS:  # each is built before a missing weight is noticed
        raise SparselandError(f"model {name!r} has {layers} layers; at most {MAX_LAYERS} are read")
    from transformers.models.auto import modeling_auto as known

    # Encoders of BERT's kind can be turned into decoders, which their configuration then says; GPT-NeoX's
    # never does.
    encodes = (
        getattr(config, "is_decoder", True) is False
        and config.model_type in known.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    if (
        config.model_type not in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or config.is_encoder_decoder
        or encodes
    ):
        raise SparselandError(
            f"model {name!r}: architecture {config.model_type!r} is no decoder-only language model"
        )


def _check_eager(model: Any, name: str) -> None:
    """Attention without SDPA is mostly nothing that sparse ops compute: said now, not after dense runs."""
    try:
        probe(model)
    except SparselandError as cause:
        raise SparselandError(f"model {name!r} can't be made sparse: {cause}") from cause


def _fit_length(
    config: Any, name: str, rope_scale: float | Literal["fit"] | None, length: int | None
) -> None:
    """Refuse lengths beyond the context, or stretch it with YaRN."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if rope_scale == "fit":
        rope_scale = _needed(length, limit) if length and limit and length > limit else None
    if rope_scale is not None:
        limit = _stretch(text, name, rope_scale)
    if length is None or limit is None or length <= limit:
        return
    own = limit if rope_scale is None else limit / rope_scale
    given = "" if rope_scale is None else f" with --rope-scale {rope_scale:g}"
    raise SparselandError(
        f"length={length} is beyond the context of {name}, {limit} tokens{given}; "
        f"give --rope-scale {_needed(length, own):g} to stretch it (quality may fall)"
    )


def _needed(length: int, context: float) -> float:
    """The factor that makes room for ``length`` tokens, to one decimal."""
    return math.ceil(10 * length / context) / 10


def _stretch(text: Any, name: str, factor: float) -> int:
    """Set YaRN with ``factor`` in a text configuration; returns the new context in tokens.

    Layers with a sliding window keep their positions: they never look further than in training.
    """
    if not (math.isfinite(factor) and factor >= 1):
        raise SparselandError(f"rope-scale={factor:g} is not allowed; it must be a number >= 1")
    rope, limit = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not rope or not limit:
        raise SparselandError(f"rope-scale: {name} has no rotary positions to stretch")
    by_layer_type = "rope_type" not in rope
    global_rope = rope.get("full_attention") if by_layer_type else rope
    if not global_rope or global_rope.get("rope_type", "default") != "default":
        kind = (global_rope or {}).get("rope_type")
        raise SparselandError(
            f"rope-scale: the positions of {name} are already scaled ({kind}), to {limit} tokens"
        )
    if factor == 1:
        return int(limit)
    yarn = {
        **global_rope,
        "rope_type": "yarn",
        "factor": float(factor),
        "original_max_position_embeddings": limit,
    }
    text.rope_parameters = {**rope, "full_attention": yarn} if by_layer_type else yarn
    text.max_position_embeddings = int(limit * factor)
    return int(text.max_position_embeddings)
