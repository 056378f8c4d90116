"""A device's arithmetic and the bandwidth of its memory."""

import torch

from titan_metrics.probes.timing import median_seconds


def matmul_rate(device: torch.device, dtype: torch.dtype, *, size: int, repetitions: int) -> float:
    """FLOP/s of the product of two [N, N] matrices, N = `size`: 2 N^3 for each, by the median time.

    Float32 products are computed as `torch.get_float32_matmul_precision()` says. An N of a few thousand is needed to
    keep a GPU busy.
    """
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    seconds = median_seconds(lambda: torch.mm(left, right, out=result), device, repetitions=repetitions)
    return 2 * size**3 / seconds


def copy_bandwidth(device: torch.device, *, num_bytes: int, repetitions: int) -> float:
    """Bytes a second that a copy of `num_bytes` within the device's memory moves: each byte is read once, written once.

    The convention of STREAM's Copy (McCalpin, "Memory Bandwidth and Machine Balance in Current High Performance
    Computers", 1995). To measure memory and not caches, `num_bytes` must be several times as large as they are.
    """
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / median_seconds(lambda: target.copy_(source), device, repetitions=repetitions)
