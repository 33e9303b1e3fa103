"""A study's measurements on disk."""

from sparseland.rowfile import RowFile


class Journal(RowFile):
    """``results.jsonl`` of one study."""

    KIND = "study"
    OTHER = "another study (seed, samples, dtype or text differ)"
