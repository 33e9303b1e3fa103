"""A run's measurements on disk."""

from sparseland.rowfile import RowFile


class RunLog(RowFile):
    """``results.jsonl`` of ``sparseland frontier``."""

    KIND = "run"
    OTHER = "results of another model, text or setting"
