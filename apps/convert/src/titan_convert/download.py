"""Fetches a repository of the Hugging Face hub, or just what a login node wants of it."""

import argparse
import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from titan_ckpt.errors import CheckpointError
from titan_ckpt.location import place_of
from titan_convert.progress import ProgressLine, size_text

ASSETS: Mapping[str, tuple[str, ...]] = {
    "tokenizer": (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template*",
        "original/tokenizer.model",
    ),
    "config": ("config.json", "generation_config.json", "original/params.json"),
    "weights": ("*.safetensors", "model.safetensors.index.json"),
}
"""What is meant by each word, as patterns of file names."""

_ATTEMPTS = 5


def command(options: argparse.Namespace, progress: ProgressLine) -> int:
    """Carries the command out and says what there is now; huggingface-hub shows its own progress."""
    folder = Path(options.dst or options.repo.rpartition("/")[2])
    download(options.repo, folder, assets=options.assets, revision=options.revision, token=options.token)
    files = {name: size for name, size in place_of(folder).files().items() if not name.startswith(".cache/")}
    print(f"fetched {options.repo} into {folder}: {len(files)} files, {size_text(sum(files.values()))}")
    return 0


def download(
    repo: str,
    folder: Path,
    *,
    assets: Sequence[str] = tuple(ASSETS),
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """Fetches files of `repo` into `folder`; what is there already, whole, stays, and what was cut off is continued.

    The token is `token`, or HF_TOKEN, or that of `hf auth login`; the address is that of HF_ENDPOINT if it is set.

    Raises:
        CheckpointError: saying what to do: the repository is gated or private, does not exist, or cannot be reached.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = [pattern for asset in assets for pattern in ASSETS[asset]]

    def fetch() -> str:
        return snapshot_download(repo, revision=revision, local_dir=folder, allow_patterns=patterns, token=token)

    try:
        for _ in range(_ATTEMPTS - 1):
            # A line that breaks within a file: not every huggingface-hub goes on by itself.
            with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                return Path(fetch())
        return Path(fetch())
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: its owner wants to know who downloads it. Accept its terms at "
            f"https://huggingface.co/{repo}, and log in with `hf auth login` or set HF_TOKEN to that account's token."
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"There is no repository {repo} that you may see. Check its name (OWNER/NAME); if it is private, log in "
            "with `hf auth login` or set HF_TOKEN."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}.") from error
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is no name of a repository: {error}.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, httpx.HTTPError, OSError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{repo} could not be fetched: {said} Run again: what is whole in {folder} is kept."
        ) from error
