"""A tokenizer of single characters, without a chat template: token counts can be told by looking."""

from __future__ import annotations

from typing import Any

BOS = 1


class Letters:
    chat_template = None
    all_special_tokens = ("<s>",)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [BOS] * add_special_tokens + [ord(c) for c in text]}

    def decode(self, ids: Any) -> str:
        return "".join(chr(int(i)) for i in ids if int(i) != BOS)
