"""Kernel tests run in Triton's interpreter where there is no GPU; this must be set before triton loads."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
