"""One file a paper: its headline result as a program (``sparseland reproduce SLUG``)."""
