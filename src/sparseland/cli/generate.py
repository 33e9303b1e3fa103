"""``sparseland generate``: stream an answer with a recipe on the model, and say how fast it was."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseland.errors import SparselandError

if TYPE_CHECKING:
    from sparseland.recipe import Recipe

MAX_PROMPT_BYTES = 64 * 2**20


def run_generate(
    name: str | None,
    *,
    recipe: Path | None,
    prompt_file: Path | None,
    prompt: str | None,
    max_new_tokens: int,
    dtype: str,
    device: str | None,
    rope_scale: float | None,
) -> None:
    """Answer a prompt; see ``sparseland generate --help``.

    Raises:
        SparselandError: no prompt, an unreadable file, a recipe that is malformed or for another model,
            or a prompt longer than the model's context.
    """
    text = read_prompt(prompt_file, prompt)
    from sparseland.recipe import Recipe

    loaded_recipe = None if recipe is None else Recipe.load(recipe)
    # Its remarks about generation settings would stand between the words of the answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from sparseland.models import load_model

    loaded = load_model(name, dtype, device, rope_scale)
    ids = encode(loaded.tokenizer, text)
    check_context(loaded.model, ids.shape[1] + max_new_tokens)
    if loaded_recipe is None:
        _stream(loaded, ids, max_new_tokens, "dense")
    else:
        if missing := uncalibrated(loaded_recipe):
            print(
                f"sparseland: calibrating {', '.join(missing)} on the default text, as {recipe} holds no "
                "calibration; recipes of `sparseland frontier` or handle.recipe().save() keep it",
                file=sys.stderr,
                flush=True,
            )
        with loaded_recipe.apply(loaded.model):
            specs = " + ".join(m.spec for m in loaded_recipe.methods)
            _stream(loaded, ids, max_new_tokens, specs or "dense")


def uncalibrated(recipe: Recipe) -> list[str]:
    """Slugs of a recipe's methods that have to read text before they can be used, at every call anew."""
    methods = [m for m in recipe.methods if m.calibrates() and m.learns_from_text]
    return [m.card.slug for m in methods if m.card.slug not in recipe.calibrations]


def read_prompt(path: Path | None, text: str | None) -> str:
    """The prompt: a file's text, the text, or both in this order.

    Raises:
        SparselandError: neither was given, or the file can't be read as UTF-8 text.
    """
    parts = [] if path is None else [_read(path)]
    parts += [] if text is None else [text]
    whole = "\n\n".join(parts)
    if not whole.strip():
        raise SparselandError("the prompt is empty; give --prompt-file FILE or --prompt TEXT")
    return whole


def _read(path: Path) -> str:
    try:
        if str(path) == "-":
            data = sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        else:
            with path.open("rb") as file:
                data = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as cause:
        raise SparselandError(f"can't read --prompt-file {path}: {cause.strerror or cause}") from cause
    if len(data) > MAX_PROMPT_BYTES:
        raise SparselandError(f"--prompt-file {path} has over {MAX_PROMPT_BYTES >> 20} MiB")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise SparselandError(f"--prompt-file {path} is not UTF-8 text (byte {cause.start})") from cause
    if "\0" in text:
        raise SparselandError(f"--prompt-file {path} is not text: it has zero bytes")
    return text


def encode(tokenizer: Any, text: str) -> Any:
    """Token ids ``[1, N]``, in the model's chat form if it has one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": text}]
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(text, return_tensors="pt")
    return encoded["input_ids"]


def check_context(model: Any, tokens: int) -> None:
    """Refuse a prompt whose answer would run over the model's context."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise SparselandError(
            f"prompt and answer take {tokens} tokens, the model's context is {limit}; "
            f"shorten the prompt or give --rope-scale {-(-tokens // limit)}"
        )


def _stream(loaded: Any, ids: Any, max_new_tokens: int, recipe: str) -> None:
    import torch
    from transformers import TextStreamer

    class Timed(TextStreamer):  # type: ignore[misc]
        """Prints words as they come and notes when tokens came (the first put() is the prompt)."""

        def __init__(self) -> None:
            super().__init__(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())
            super().put(value)

    streamer = Timed()
    device = next(loaded.model.parameters()).device
    start = time.perf_counter()
    try:
        with torch.inference_mode():
            loaded.model.generate(
                ids.to(device),
                attention_mask=torch.ones_like(ids).to(device),
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
            )
    except KeyboardInterrupt:
        print()  # the message must not stand behind half a sentence
        raise
    tokens = streamer.times[1:]
    if not tokens:
        return
    line = f"{recipe}: prompt {ids.shape[1]} tokens, first token after {tokens[0] - start:.2f} s"
    if len(tokens) > 1:
        speed = (len(tokens) - 1) / (tokens[-1] - tokens[0])
        line += f", then {speed:.1f} tokens/s over {len(tokens) - 1} tokens"
    print(line, file=sys.stderr)
