"""Timing one configuration: how often a prompt is read, and which of the times counts."""

from __future__ import annotations

import torch

from sparseland import measure
from sparseland.models.tiny import tiny_model


def test_on_a_gpu_the_run_that_compiles_is_never_the_only_one() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [measure.prefills(n, cuda) for n in (1, 2, 5)] == [3, 3, 5]
    assert [measure.prefills(n, cpu) for n in (1, 2)] == [1, 2]


def test_the_fastest_prompt_and_the_median_step_count(monkeypatch) -> None:
    model, ids = tiny_model("llama").eval(), torch.arange(1, 41)
    seconds = iter([5.0, 3.0, 4.0, 0.1, 0.3, 0.2])
    monkeypatch.setattr(measure, "timed", lambda work, device: (next(seconds), work()))
    run = measure.run_window(model, ids, 32, repeats=3, decode_tokens=3)
    assert run.prefill_s == 3.0
    assert run.decode_ms == 200.0
    assert run.tail_logits.shape[0] == 31
    assert run.decode_logits.shape[0] == 4
    assert not list(seconds)
