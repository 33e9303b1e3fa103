"""Numerical primitives. Each is a folder: a plain PyTorch reference, fast backends, one public function."""
