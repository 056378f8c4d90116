"""What a folder or file is, and whether it is whole, whichever format it has."""

import contextlib
import dataclasses
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, TypeAlias

from titan_ckpt.conversion.layouts import SEAL_NAME, sealed_hashes
from titan_ckpt.conversion.plan import Counter, Progress, no_progress
from titan_ckpt.errors import CheckpointError, DamagedCheckpointError
from titan_ckpt.formats.collection import Collection
from titan_ckpt.formats.hugging_face import read_hugging_face
from titan_ckpt.formats.safetensors import read_safetensors
from titan_ckpt.formats.streams import file_hash
from titan_ckpt.manifest import MANIFEST_NAME, Manifest
from titan_ckpt.place import Place

Format: TypeAlias = Literal["checkpoint", "dcp", "hf", "llama", "safetensors", "torch"]

DESCRIPTIONS: Mapping[Format, str] = {
    "checkpoint": "titan checkpoint (DCP with a manifest)",
    "dcp": "PyTorch DCP folder",
    "hf": "Hugging Face safetensors folder",
    "llama": "Meta Llama folder",
    "safetensors": "safetensors file",
    "torch": "torch.save file",
}
_HUB_NOTES = ".cache/huggingface/download/"
_META_SUMS = "checklist.chk"


def detect(place: Place) -> Format:
    """The format of what is there.

    Raises:
        CheckpointError: if nothing is there, or nothing that any reader knows.
    """
    if not place.exists():
        raise CheckpointError(f"{place} does not exist.")
    names = place.files() if place.path is None or place.path.is_dir() else {}
    if MANIFEST_NAME in names:
        return "checkpoint"
    if ".metadata" in names:
        return "dcp"
    if any(name.endswith(".safetensors") for name in names if "/" not in name):
        return "hf"
    if any(name.startswith("consolidated.") and name.endswith(".pth") for name in names):
        return "llama"
    if not names and place.name.endswith(".safetensors"):
        return "safetensors"
    if not names and (place.path is None or place.path.is_file()):
        return "torch"
    inside = ", ".join(place.folders()[:8])
    hint = f" It has the folders {inside}: name one of them." if inside else ""
    raise CheckpointError(f"{place} holds no weights in a format that can be read.{hint}")


def read_any(place: Place, split: Mapping[str, int | None]) -> Collection:
    """The tensors there, under the names of their format; `split` is for Meta's shards (see `formats.meta`)."""
    kind = detect(place)
    if kind in ("checkpoint", "dcp"):
        from titan_ckpt.formats.dcp_folder import read_dcp  # 0.8 s

        found = read_dcp(place)
        problems = _manifest_problems(place) if kind == "checkpoint" else ()
        return dataclasses.replace(found, problems=tuple(dict.fromkeys((*problems, *found.problems))))
    if kind == "hf":
        return read_hugging_face(place)
    if kind == "safetensors":
        size = place.parent.size(place.name)
        tensors = read_safetensors(place.parent, place.name)
        return Collection(place=place, format=DESCRIPTIONS[kind], tensors=tensors, files={place.name: size})
    if kind == "llama":
        from titan_ckpt.formats.meta import read_meta

        return read_meta(place, split)
    from titan_ckpt.formats.torch_file import read_torch_file

    return read_torch_file(place.parent, place.name)[0]


def _manifest_problems(place: Place) -> tuple[str, ...]:
    """All but the hashes."""
    try:
        return tuple(Manifest.read(place).damage(place, hashes=False))
    except DamagedCheckpointError as damaged:
        return damaged.problems


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The size of what is there."""

    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    """Dtype -> bytes of the tensors that have it."""

    others: int
    """Things that are no tensors."""

    files: Mapping[str, int]
    """File -> bytes."""

    problems: tuple[str, ...]


def survey(collection: Collection) -> Survey:
    """Counts; reads nothing."""
    dtypes: Tally[str] = Tally()
    parameters = 0
    for tensor in collection.tensors.values():
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
        parameters += tensor.nbytes // tensor.dtype.itemsize
    return Survey(
        tensors=len(collection.tensors),
        parameters=parameters,
        nbytes=collection.nbytes,
        dtypes=dict(dtypes.most_common()),
        others=len(collection.others),
        files=collection.files,
        problems=collection.problems,
    )


def verify(place: Place, progress: Progress = no_progress) -> tuple[list[str], str]:
    """Examines all that can be examined.

    Returns:
        What is wrong, one sentence each; and what was compared, for a reader to know how much that says.
    """
    kind = detect(place)
    sums = noted_sums(place, kind)
    if kind == "checkpoint":
        manifest = Manifest.read(place)
        with Counter(progress, "verifying", sum(record.size for record in manifest.files.values())) as count:
            problems = manifest.damage(place, hashes=True, progress=count)
        return problems, f"sizes and SHA-256 of {len(manifest.files)} files, by the manifest"
    try:
        problems = list(read_any(place, {}).problems)
    except DamagedCheckpointError as damaged:
        problems = list(damaged.problems)
    if not sums:
        return problems, "headers, index and sizes; no hashes are known, so that changed numbers would not be seen"
    sizes = place.files()
    problems += [f"{name} is missing" for name in sums if name not in sizes]
    present = {name: expected for name, expected in sums.items() if name in sizes}
    with Counter(progress, "verifying", sum(sizes[name] for name in present)) as count:
        for name, (algorithm, digest) in present.items():
            if file_hash(place, name, algorithm) != digest:
                problems.append(f"{name} has other bytes than were written (its {algorithm.upper()} differs)")
            count(sizes[name])
    return problems, f"headers, index and sizes, and hashes of {len(present)} files"


@contextlib.contextmanager
def verifying(place: Place) -> Iterator[Callable[[], bool]]:
    """Compares all hashes that are known of a folder while the block does something else, on another core.

    What it yields is to be called before the block's result counts: it waits for the comparison, raises
    DamagedCheckpointError naming the files that are not what was written, and returns whether any hashes are known.
    """
    kind = detect(place)
    if kind != "checkpoint" and not noted_sums(place, kind):
        yield lambda: False
        return
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(verify, place)

        def confirm() -> bool:
            problems, _ = found.result()
            if problems:
                raise DamagedCheckpointError(place, problems)
            return True

        yield confirm


def noted_sums(place: Place, kind: Format) -> dict[str, tuple[str, str]]:
    """File -> algorithm and digest, as whoever wrote or fetched the folder has noted them."""
    if kind not in ("hf", "llama"):
        return {}
    names = place.files()
    try:
        if SEAL_NAME in names:
            return {name: ("sha256", digest) for name, digest in sealed_hashes(place).items()}
        if _META_SUMS in names:
            pairs = (line.split() for line in place.read(_META_SUMS).decode().splitlines() if line.strip())
            return {name: ("md5", digest) for digest, name in pairs if name != _META_SUMS}
        notes = [name for name in names if name.startswith(_HUB_NOTES) and name.endswith(".safetensors.metadata")]
        # The hub's notes have a commit, an etag and a time; the etag of a large file is its SHA-256.
        etags = {name: place.read(name).decode().splitlines()[1].strip('"') for name in notes}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"The hashes that {place} came with cannot be read ({error}).") from error
    return {
        name.removeprefix(_HUB_NOTES).removesuffix(".metadata"): ("sha256", etag)
        for name, etag in etags.items()
        if len(etag) == 64
    }
