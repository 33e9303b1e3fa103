"""The one exception that means "the user can mend this": the command line prints it as a single line."""

from __future__ import annotations


class SparselandError(ValueError):
    """A mistake in what was asked: says what, which value, and what is allowed (exit code 2 on the CLI)."""
