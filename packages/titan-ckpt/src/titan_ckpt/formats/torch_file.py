"""Files of `torch.save`, read and written a piece at a time.

Reading: `torch.load` describes the tensors without their bytes, and says where in the file these are. Writing: torch
writes a *skeleton*, the whole file with holes (which take no room on the disk) where the numbers go; what is between
the holes is copied, and the holes are filled as they come. So torch alone decides what the format looks like.
"""

import contextlib
import io
import pickle
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch import Tensor

from titan_ckpt import compat
from titan_ckpt.errors import CheckpointError
from titan_ckpt.formats.collection import Collection
from titan_ckpt.formats.lazy import LazyTensor, in_memory
from titan_ckpt.formats.stored import StoredFile
from titan_ckpt.formats.streams import write_rows
from titan_ckpt.manifest import Json
from titan_ckpt.place import Place
from titan_ckpt.state import Flat, flatten
from titan_ckpt.storage import HashingFile

_OLD_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)  # with which files began before version 1.6


def read_torch_file(place: Place, name: str) -> tuple[Collection, Mapping[str, Json]]:
    """The tensors of a file, nested dicts flattened with dots between the keys, and the JSON values beside them.

    A file in torch's format from before version 1.6 has to be read into memory.

    Raises:
        CheckpointError: if it cannot be read without running what it brings, is damaged, or holds more than that.
    """
    shown = f"{place}/{name}"
    file = StoredFile(place, name)
    if zipfile.is_zipfile(cast(IO[bytes], file.open())):
        with compat.fake_tensors():
            flat = _flat(shown, _loaded(shown, file))
            tensors = {key: placed(file, tensor, 0) for key, tensor in flat.tensors.items()}
    else:
        flat = _flat(shown, _loaded(shown, file))
        tensors = {key: in_memory(tensor, name) for key, tensor in flat.tensors.items()}
    collection = Collection(
        place=place, format="torch.save file", tensors=tensors, others=tuple(flat.values), files={name: file.size}
    )
    return collection, flat.values


def is_torch_file(place: Place, name: str) -> bool:
    """Whether `torch.save` has written a file, now or before version 1.6; looks at its form and unpickles nothing."""
    file = StoredFile(place, name)
    if bytes(file.read(0, min(len(_OLD_MAGIC), file.size))) == _OLD_MAGIC:
        return True
    try:
        with zipfile.ZipFile(cast(IO[bytes], file.open())) as archive:
            return any(PurePosixPath(entry).name == "data.pkl" for entry in archive.namelist())
    except zipfile.BadZipFile:
        return False


def placed(file: StoredFile, tensor: Tensor, offset: int) -> LazyTensor:
    """A tensor that was loaded without its bytes from an archive that begins at `offset` of a file."""
    start = offset + compat.storage_offset(tensor)
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if tensor.is_contiguous():
        return file.tensor(dtype, shape, start + int(tensor.storage_offset()) * dtype.itemsize)
    size = tensor.untyped_storage().nbytes() // dtype.itemsize
    whole, stride, first = file.tensor(dtype, (size,), start), tensor.stride(), tensor.storage_offset()

    def read(begin: int, end: int) -> Tensor:
        return whole.all().as_strided(shape, stride, first)[begin:end]

    return LazyTensor(dtype, shape, (file.name,), read)


def write_torch_file(
    file: HashingFile, tensors: Mapping[str, LazyTensor], shared: Mapping[str, str] | None = None
) -> None:
    """Writes `{name: tensor}` as `torch.save` would; `shared` are further names of the same tensors."""
    with _skeleton(tensors, shared or {}) as (skeleton, offsets):
        at = 0
        for name in sorted(offsets, key=lambda name: offsets[name]):
            file.write(skeleton.read(offsets[name] - at))
            write_rows(file, tensors[name])
            at = offsets[name] + tensors[name].nbytes
            skeleton.seek(at)
        file.write(skeleton.read())


@contextlib.contextmanager
def _skeleton(tensors: Mapping[str, LazyTensor], shared: Mapping[str, str]) -> Iterator[tuple[Any, dict[str, int]]]:
    """The file with holes, and where these begin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive")
        with compat.fake_tensors():
            tree = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
            tree |= {name: tree[other] for name, other in shared.items()}
            try:
                with torch.serialization.skip_data(materialize_fake_tensors=True):
                    torch.save(tree, path)
            except RuntimeError as error:  # what torch makes of an error of the system
                raise OSError(
                    f"a file of that size, mostly holes, cannot be made in {folder}: {first_line(error)}"
                ) from error
            found = torch.load(path, weights_only=True)
            offsets = {name: compat.storage_offset(found[name]) for name, tensor in tensors.items() if tensor.nbytes}
        with path.open("rb") as file:
            yield file, offsets


def _flat(shown: str, tree: Any) -> Flat:
    if not isinstance(tree, Mapping):
        raise CheckpointError(f"{shown} holds a {type(tree).__name__}, and a dict of tensors is wanted.")
    try:
        return flatten(tree)
    except ValueError as error:
        raise CheckpointError(f"{shown} cannot be converted. {error}.") from error


def _loaded(shown: str, file: StoredFile) -> Any:
    try:
        return torch.load(io.BufferedReader(file.open()), map_location="cpu", weights_only=True)
    except Exception as error:  # what a damaged file makes torch raise is anybody's guess
        if isinstance(error, pickle.UnpicklingError) and (found := re.search(r"GLOBAL (\S+)", str(error))):
            raise CheckpointError(
                f"{shown} holds more than tensors: loading it would run {found[1]}. Save the state_dict() alone, in "
                "the program it comes from, and convert that."
            ) from error
        raise CheckpointError(
            f"{shown} cannot be read as a torch.save file; it is damaged or of another kind ({first_line(error)})."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, without what torch adds below."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
