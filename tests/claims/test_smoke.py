"""Every claim program runs at smoke scale on a CPU and says what it measured."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path

import pytest

import sparseland.claims
from sparseland.method import method_class

SLUGS = sorted(p.stem for p in Path(sparseland.claims.__file__).parent.glob("[a-z]*.py"))


@pytest.mark.parametrize("slug", SLUGS)
def test_smoke(slug: str) -> None:
    result = importlib.import_module(f"sparseland.claims.{slug}").reproduce("smoke")
    assert method_class(result["slug"]).card.slug == slug.replace("_", "-")
    assert isinstance(result["holds"], bool)
    assert all(result[name] for name in ("claim", "paper", "ours", "differs", "rows"))
    losses = [row["loss"] for row in result["rows"] if isinstance(row.get("loss"), float)]
    assert all(map(math.isfinite, losses))
    json.dumps(result)
