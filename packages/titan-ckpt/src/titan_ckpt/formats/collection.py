"""What a reader of any format gives: tensors by name, and all that is wrong with where they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from titan_ckpt.formats.lazy import LazyTensor
from titan_ckpt.place import Place

Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The tensors of a folder or file; only what describes them has been read."""

    place: Place
    """The folder."""

    format: str
    """In the words of `titan-convert inspect`."""

    tensors: Tensors
    """By the names that the format gives them."""

    others: tuple[str, ...] = ()
    """Keys of what is no tensor."""

    files: Mapping[str, int]
    """The files that hold them, with their bytes."""

    problems: tuple[str, ...] = ()
    """Each as one sentence that names the file; empty if what describes the tensors fits together."""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def listed(names: Iterable[str], limit: int = 8, separator: str = ", ") -> str:
    """Names or sentences as text, the first few of many."""
    names = list(names)
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return separator.join(names[:limit]) + more
