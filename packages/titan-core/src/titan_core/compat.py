"""Every private torch import of this package, in one place; checked on torch 2.13."""

from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["compute_local_shape_and_global_offset"]
