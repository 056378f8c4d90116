"""From files to a tokenizer: which kind they are, and the library that reads it."""

from collections.abc import Mapping
from pathlib import Path

from titan_data.errors import DataError, NotFoundError
from titan_data.tokenizer import COMPANIONS, TOKENIZER_FILE, Tokenizer

RANK_FILE = "tokenizer.model"
_RANK_SUFFIX = ".tiktoken"


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer from a file, or from the folder that holds it, with what stands beside it.

    Args:
        path: a `tokenizer.json`; a tiktoken file of ranks, such as Llama 3's `tokenizer.model` (any other has a
            `tiktoken.json` beside it, see `tiktoken_file.py`); or a folder, in which they are looked for in this order.

    Raises:
        NotFoundError: if there is none.
        DataError: if it cannot be used.
    """
    path = path.expanduser()
    if not path.exists():
        raise NotFoundError(
            f"data.tokenizer {str(path)!r} does not exist (looked from the folder {Path.cwd()}). Name a tokenizer.json "
            "or a tiktoken file, or the folder of one, or 'bpe' to train one on the corpus."
        )
    file = _file_in(path) if path.is_dir() else path
    name = TOKENIZER_FILE if file.suffix == ".json" else file.name
    beside = {name: file.with_name(name) for name in COMPANIONS}
    try:
        files = {name: file.read_bytes()} | {
            name: companion.read_bytes() for name, companion in beside.items() if companion.is_file()
        }
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {file}: {error}. Check its permissions.") from error
    return tokenizer_from_files(files, name=str(path))


def tokenizer_from_files(files: Mapping[str, bytes], *, name: str) -> Tokenizer:
    """Makes a tokenizer from the content of its files.

    Args:
        files: `tokenizer.json` or a file of ranks, and what was found beside it.
        name: where they come from, for messages.

    Raises:
        DataError: if it cannot be used.
    """
    # Each loads a library of its own.
    if TOKENIZER_FILE in files:
        from titan_data.hugging_face_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(files, name=name)
    from titan_data.tiktoken_file import TiktokenTokenizer

    return TiktokenTokenizer(files, name=name)


def _file_in(folder: Path) -> Path:
    ranks = sorted(folder.glob(f"*{_RANK_SUFFIX}"))
    for file in (folder / TOKENIZER_FILE, folder / RANK_FILE, *ranks[:1]):
        if file.is_file():
            if file in ranks and len(ranks) > 1:
                raise DataError(
                    f"the folder {folder} holds {len(ranks)} {_RANK_SUFFIX} files. Name one with data.tokenizer."
                )
            return file
    raise NotFoundError(
        f"the folder {folder}, named by data.tokenizer, holds no {TOKENIZER_FILE}, {RANK_FILE} or *{_RANK_SUFFIX}"
    )
