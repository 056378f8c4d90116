"""Datasets of Hugging Face: folders that `Dataset.save_to_disk` wrote, and datasets of the hub by name.

Both are Arrow streams on disk, which are read as such. The `datasets` library is imported only to download and prepare
what the hub has.
"""

import json
import re
from pathlib import Path

from titan_data.cache import Progress
from titan_data.errors import DataError, import_extra

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[^:]+)(:(?P<config>[^:]*)(:(?P<split>[^:]*))?)?")


def saved_dataset(folder: Path) -> list[Path] | None:
    """Returns the Arrow files, in order, of a folder that `Dataset.save_to_disk` wrote; None if it is no such folder.

    Raises:
        DataError: if it holds several splits, or something that this package cannot read.
    """
    folder = folder.expanduser()
    if (splits := folder / "dataset_dict.json").is_file():
        names = _json(splits).get("splits") or ["?"]
        raise DataError(
            f"{folder} holds a saved dataset of several splits: {', '.join(names)}. Name one, e.g. "
            f"{str(folder / names[0])!r}."
        )
    state_file = folder / "state.json"
    if not (state_file.is_file() and (folder / "dataset_info.json").is_file()):
        return None
    state = _json(state_file)
    if any("indices" in key and value for key, value in state.items()):
        raise DataError(
            f"{folder} was saved by an old release of `datasets`, with its rows out of order. Save it again."
        )
    try:
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{state_file} does not name its data files; was the dataset saved whole?") from error
    if missing := [path for path in files if not path.is_file()]:
        raise DataError(f"{state_file} names {missing[0].name}, which is not there. Save the dataset again.")
    return [path.absolute() for path in files]


def hub_dataset(source: str, *, progress: Progress) -> list[Path]:
    """Downloads and prepares a dataset of the hub, if that has not been done, and returns its Arrow files.

    Args:
        source: "hf:OWNER/NAME", with ":CONFIG" and ":SPLIT" after it; the split is "train" if none is named. What
            `datasets.load_dataset` takes for a name may stand there, so also a local folder.
        progress: is told what takes time.

    Raises:
        DataError: if there is no such dataset, config or split, or it cannot be had.
    """
    match = _NAME.fullmatch(source)
    if match is None:
        raise DataError(
            f"the source {source!r} is not of the form hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or :CONFIG:SPLIT."
        )
    repo, config, split = match["repo"], match["config"] or None, match["split"] or "train"
    if not re.fullmatch(r"\w[\w.]*", split):
        raise DataError(f"the source {source!r}: {split!r} is not the name of a whole split; slices are not supported.")
    datasets = import_extra("datasets", extra="hf", purpose="reading datasets of the Hugging Face hub")
    progress(f"opening {repo} with Hugging Face datasets")
    try:
        dataset = datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # the library and its network clients have no common class of errors
        raise DataError(
            f"cannot open the source {source!r}: {type(error).__name__}: {error}. Check the name, the config, the "
            "split and the network; a private or gated dataset takes HF_TOKEN."
        ) from error
    return [Path(file["filename"]).absolute() for file in dataset.cache_files]


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). Save the dataset again.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object. Save the dataset again.")
    return content
