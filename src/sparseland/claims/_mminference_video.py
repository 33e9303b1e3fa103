"""A tiny decoder that really watches videos: it must remember what each place of the picture showed.

A video has ``places`` tokens a frame. Every place has one of ``contents`` colours, the same in all frames,
but every other time it is hidden. At every token the model must name the place's colour, and after the
video it is asked for the colours of places by text tokens. So vision tokens look for their own place in
earlier frames, and text tokens for a place they name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor, nn

from sparseland.models.tiny import tiny_model

HIDDEN = 1 / 2  # part of the tokens that show nothing
RATE = 6e-3  # learning rate at its peak


@dataclass(frozen=True)
class Videos:
    """The task's sizes; token ids are ``place * (contents + 1) + colour``, then one question per place."""

    places: int = 80
    contents: int = 8

    @property
    def vocabulary(self) -> int:
        """Token ids in use."""
        return self.places * (self.contents + 2)

    def sample(
        self, batch: int, frames: int, questions: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Token ids, and each token's colour to be named (-100: it has not been shown yet)."""
        p, c = self.places, self.contents
        colour = torch.randint(c, (batch, 1, p), generator=generator).expand(-1, frames, -1)
        hidden = torch.rand(batch, frames, p, generator=generator) < HIDDEN
        ids = torch.arange(p) * (c + 1) + torch.where(hidden, c, colour)
        shown = (~hidden).cumsum(1) > 0
        labels = torch.where(shown, colour, -100)
        asked = torch.randint(p, (batch, questions), generator=generator)
        answers = torch.where(shown[:, -1], colour[:, -1], -100).gather(1, asked)
        text = p * (c + 1) + asked
        return torch.cat([ids.flatten(1), text], 1), torch.cat([labels.flatten(1), answers], 1)

    def vision(self, frames: int, questions: int) -> Bool[Tensor, " N"]:
        """Which tokens are vision."""
        n = frames * self.places
        return torch.arange(n + questions) < n


def new_model(videos: Videos, seed: int) -> nn.Module:
    """An untrained decoder; a token's embedding is that of its place plus that of its colour or question."""
    model: Any = tiny_model(
        "llama", seed=seed, vocab_size=videos.vocabulary, num_hidden_layers=2, hidden_size=128,
        intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=8192, initializer_range=0.05, rope_theta=1e6, pad_token_id=None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    place = torch.randn(videos.places, 128, generator=generator)
    kind = torch.randn(videos.contents + 2, 128, generator=generator)
    with torch.no_grad():
        tokens = place[:, None] + kind[None, : videos.contents + 1]
        asked = place + kind[-1]
        model.get_input_embeddings().weight.copy_(torch.cat([tokens.flatten(0, 1), asked]))
    return model  # type: ignore[no-any-return]


def loss_of(model: nn.Module, ids: Int[Tensor, "B N"], labels: Int[Tensor, "B N"], videos: Videos) -> Tensor:
    """Cross-entropy of the colours, in nats per token that has one."""
    logits = model(input_ids=ids, use_cache=False).logits[..., : videos.contents]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)


def train(
    videos: Videos, steps: int, frames: int, batch: int, seed: int, device: str
) -> tuple[nn.Module, float]:
    """A trained model, and its loss at the end."""
    model = new_model(videos, seed).to(device).train()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    last = 0.0
    with torch.enable_grad():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
            ids, labels = videos.sample(batch, frames, 16, generator)
            loss = loss_of(model, ids.to(device), labels.to(device), videos)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            last = float(loss.detach()) if step == steps - 1 or step % 50 == 0 else last
    return model.eval(), last
