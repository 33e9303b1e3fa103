"""Fitted laws and cost models: what papers say about how quality, size, length and sparsity hang together."""
