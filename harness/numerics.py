"""torch's switches for one trial: fp32 is fp32, and how kernels are chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.config import Backend, BadInput


@contextmanager
def switched(backend: Backend) -> Iterator[None]:
    """Sets them, and afterwards back to what they were: the process may have other trials to run.

    Shapes hardly change, so on a GPU cudnn tries its kernels on each new one and stays with the fastest: another one at another
    time, and one that may sum in any order. With backend.deterministic nothing is tried, cudnn keeps to kernels that give the
    same bits every time, and torch raises RuntimeError, with its name, at an operation that has none.
    """
    # Read once, at cuBLAS's first product, whichever trial that belongs to, so it stays; 24 MiB more at most, and no slower.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "1" and torch.cuda.is_available():
        raise BadInput("NVIDIA_TF32_OVERRIDE: 1 rounds products of fp32 to ten bits, whatever torch says; unset it, or set it to 0")
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    settings: Any = torch.utils.deterministic
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, products.allow_tf32
    mode, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    changes = mode != backend.deterministic or warn_only  # the call imports torch's compiler, which takes seconds
    fill = settings.fill_uninitialized_memory
    try:
        cudnn.allow_tf32 = False  # torch's default rounds convolutions of fp32 to ten bits
        products.allow_tf32 = False  # as it is by default, but NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
        cudnn.benchmark, cudnn.deterministic = not backend.deterministic, backend.deterministic
        if changes:
            torch.use_deterministic_algorithms(backend.deterministic)
        settings.fill_uninitialized_memory = False  # NaN in every new tensor: finds bugs, and costs a pass over each
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic, products.allow_tf32 = before
        if changes:
            torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
