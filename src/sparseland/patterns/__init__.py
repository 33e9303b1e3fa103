"""Patterns: which query-key pairs to compute. Methods make them, ops consume them, neither knows the other.

All patterns speak of the last ``n_queries`` of ``n_keys`` tokens and are causal: a pair (i, j) counts
only if ``j <= offset + i`` with ``offset = n_keys - n_queries``, whatever the lists say.
"""

from sparseland.patterns.base import (
    Pattern,
    causal_pairs,
    cdiv,
    next_power_of_2,
    pairs_from,
    pairs_per_block,
    unexpanded,
    visible_blocks,
)
from sparseland.patterns.blocks import BlockColumnPattern, BlockPattern, ColumnPattern
from sparseland.patterns.intervals import BlockLocalPattern, IntervalPattern
from sparseland.patterns.parts import Part, PartsPattern, PiecedPattern, in_pieces
from sparseland.patterns.permuted import PermutedPattern
from sparseland.patterns.shapes import per_shape
from sparseland.patterns.tokens import TokenBlockPattern, token_words, word_lists
from sparseland.patterns.window import WindowPattern

__all__ = [
    "BlockColumnPattern",
    "BlockLocalPattern",
    "BlockPattern",
    "ColumnPattern",
    "IntervalPattern",
    "Part",
    "PartsPattern",
    "Pattern",
    "PermutedPattern",
    "PiecedPattern",
    "TokenBlockPattern",
    "WindowPattern",
    "causal_pairs",
    "cdiv",
    "in_pieces",
    "next_power_of_2",
    "pairs_from",
    "pairs_per_block",
    "per_shape",
    "token_words",
    "unexpanded",
    "visible_blocks",
    "word_lists",
]
