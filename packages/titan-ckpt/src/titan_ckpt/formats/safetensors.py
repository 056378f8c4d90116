"""Files in the safetensors format: eight bytes of length, that many bytes of JSON, and the tensors one after another.

Written here rather than by the safetensors package, which saves only what is in memory all at once and reads only what
is on a disk. The format: https://huggingface.co/docs/safetensors.
"""

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch

from titan_ckpt.errors import DamagedCheckpointError
from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.formats.stored import StoredFile
from titan_ckpt.formats.streams import write_rows
from titan_ckpt.place import Place
from titan_ckpt.storage import HashingFile

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HEADER_LIMIT = 100_000_000  # the format's own


def read_safetensors(place: Place, name: str) -> dict[str, LazyTensor]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        DamagedCheckpointError: if the header is not what the format demands, or the file is longer or shorter than it
            says.
    """
    file = StoredFile(place, name)
    try:
        header, data_at = _header(file)
        found, end = {}, 0
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            start, stop = entry["data_offsets"]
            if start != end or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes of {key} are not where its dtype and shape put them")
            found[key], end = file.tensor(dtype, shape, data_at + start), stop
        if data_at + end != file.size:
            raise ValueError(f"it has {file.size:,} bytes, and its header describes {data_at + end:,}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedCheckpointError(place, [f"{name} is no whole safetensors file ({error})"]) from error
    return found


def _header(file: StoredFile) -> tuple[dict[str, Any], int]:
    if file.size < 8:
        raise ValueError("it is shorter than a header")
    (size,) = struct.unpack("<Q", bytes(file.read(0, 8)))
    if size > _HEADER_LIMIT:
        raise ValueError("its header would be longer than the format allows")
    header = json.loads(bytes(file.read(8, size)))
    header.pop("__metadata__", None)
    return header, 8 + size


def write_safetensors(file: HashingFile, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a whole file; the memory it needs is that of one piece of a tensor."""
    file.write(_described(tensors))
    for tensor in tensors.values():
        write_rows(file, tensor)


def safetensors_size(tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes of the file that `write_safetensors` makes."""
    return len(_described(tensors)) + sum(tensor.nbytes for tensor in tensors.values())


def has_name(dtype: torch.dtype) -> bool:
    """Whether the format knows a dtype."""
    return dtype in _NAMES


def _described(tensors: Mapping[str, LazyTensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files that don't say so
    offset = 0
    for name, tensor in tensors.items():
        stop = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned, so that readers may map the numbers
    return struct.pack("<Q", len(text)) + text
