"""One switch for bitwise reproducible runs."""

import os

import torch


def set_deterministic(enabled: bool) -> None:
    """Lets only kernels run that give the same bits for the same input; others raise and name themselves."""
    if enabled:
        # cuBLAS reads this when it creates its handle (CUDA documentation, "cuBLAS reproducibility").
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(enabled)
