"""The private parts of torch that this package uses; checked with torch 2.13.

`fake_tensors` makes `torch.load` describe tensors instead of reading them; `storage_offset` is where in the file the
bytes of such a tensor begin (torch documents both in its notes on serialization, but keeps the names private).
"""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo

StorageInfo = _StorageInfo


def fake_tensors() -> contextlib.AbstractContextManager[object]:
    """While it is entered, `torch.load` reads no tensor's bytes."""
    return FakeTensorMode()


def storage_offset(tensor: torch.Tensor) -> int:
    """Where in its file the storage of a tensor begins that was loaded under `fake_tensors`, in bytes."""
    offset = tensor.untyped_storage()._checkpoint_offset
    if offset is None:
        raise ValueError("the tensor was not loaded from a file while `fake_tensors` was entered")
    return offset
