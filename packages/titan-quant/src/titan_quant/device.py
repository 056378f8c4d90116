"""What the recipes need to know of the device."""

import torch


def nvidia_capability(device_type: str) -> tuple[int, int] | None:
    """Compute capability of the current GPU; None for a CPU, and for AMD, whose numbers mean other things."""
    if device_type != "cuda" or not torch.version.cuda:
        return None
    return torch.cuda.get_device_capability()
