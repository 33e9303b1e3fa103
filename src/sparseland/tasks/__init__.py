"""What quality is measured on; everything is generated offline from a seed.

``TASKS`` maps a name to ``make_samples(tokenizer, text, length, count, seed) -> list[Sample]``; the
samples' depths are evenly spread. A task that the dense model itself can't do says nothing about a
method: see :func:`countable`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparseland.tasks.multi_query import needle_multi_query
from sparseland.tasks.needles import needle, needle_multi_key, needle_multi_value
from sparseland.tasks.retrieval import retrieval
from sparseland.tasks.runner import countable, score_sample
from sparseland.tasks.sample import Answer, Sample
from sparseland.tasks.story import story_filtering, story_multi_hop, story_retrieval
from sparseland.tasks.variables import variables
from sparseland.tasks.words import common_words

__all__ = ["TASKS", "Answer", "Sample", "countable", "score_sample"]

TASKS: dict[str, Callable[[Any, str, int, int, int], list[Sample]]] = {
    "needle": needle,
    "needle-multi-key": needle_multi_key,
    "needle-multi-value": needle_multi_value,
    "variables": variables,
    "retrieval": retrieval,
    "needle-multi-query": needle_multi_query,
    "common-words": common_words,
    "story-retrieval": story_retrieval,
    "story-multi-hop": story_multi_hop,
    "story-filtering": story_filtering,
}
