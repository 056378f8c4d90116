"""The configuration of a run, from what is chosen, what the run or its weights say already, and the overrides.

    function in a module  ->  model and tokenizer of the weights it starts from  ->  flags  ->  end of the decay

Imports no torch.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from titan_ckpt.location import place_of
from titan_data.config import DataConfig
from titan_train.config import TrainConfig
from titan_train.config_file import RUN_CONFIG, read_config
from titan_train.origin import OriginError, check_origin, find_origin, tokenizer_in
from titan_train.registry import DEFAULT_CONFIG, DEFAULT_MODULE, load_config

_NO_TOKENIZER = DataConfig.tokenizer  # it is trained on the run's own text

Override = Callable[[TrainConfig, Sequence[str]], TrainConfig]


def configure(module: str | None, config: str | None, flags: Sequence[str], *, override: Override) -> TrainConfig:
    """The configuration that `override` makes of the chosen one, with all that follows from elsewhere filled in.

    Args:
        module: where the configuration is; None: the default.
        config: its name; None: the default, with the model that weights to start from are of.
        flags: of the command line, of which a few are looked at before the rest is understood.
        override: applies the flags.

    Raises:
        OriginError: if the weights to start from are of another model, or of no use to this run.
        ValueError: if there is no such configuration.
    """
    base = load_config(module or DEFAULT_MODULE, config or DEFAULT_CONFIG)
    location = _given(flags, "checkpoint.init-from") or base.checkpoint.init_from
    output = _given(flags, "output") or base.output
    recorded = _recorded_config(Path(output)) if output else None
    if location is None:
        return _with_what_is_fixed(override(base, flags), recorded)
    carries_model = module is None and config is None
    if recorded is not None:  # once a run has begun, its own directory says what it is of
        _check_same_origin(location, recorded, Path(output or ""))
        base = _completed(base, recorded, Path(output or ""), carries_model=carries_model)
        return _with_what_is_fixed(override(base, flags), recorded)
    origin = find_origin(location)
    if carries_model:
        base = dataclasses.replace(base, model=origin.model)
    if base.data.tokenizer == _NO_TOKENIZER and origin.tokenizer:
        base = _with_tokenizer(base, origin.tokenizer)
    result = override(base, flags)
    check_origin(result, origin)
    return _with_what_is_fixed(result, None)


def _completed(base: TrainConfig, recorded: TrainConfig, run: Path, *, carries_model: bool) -> TrainConfig:
    """`base` with the model and the tokenizer of a run that has begun; it has the tokenizer in its checkpoints too."""
    if carries_model:
        base = dataclasses.replace(base, model=recorded.model)
    if base.data.tokenizer not in (_NO_TOKENIZER, recorded.data.tokenizer):
        return base
    tokenizer = recorded.data.tokenizer
    if not Path(tokenizer).exists():
        saved = [tokenizer_in(place_of(folder)) for folder in sorted(run.glob("checkpoints/step-*/files"))]
        tokenizer = next(filter(None, reversed(saved)), tokenizer)
    return _with_tokenizer(base, tokenizer)


def _check_same_origin(location: str, recorded: TrainConfig, run: Path) -> None:
    before = recorded.checkpoint.init_from
    if before is None or str(place_of(before)) != str(place_of(location)):
        began = "from initial weights of its own" if before is None else f"from {before}"
        raise OriginError(
            f"The run in {run} has begun {began}, so --checkpoint.init-from {location} would have no effect; leave it "
            "out to go on, or choose a new directory with --output."
        )


def _with_tokenizer(config: TrainConfig, tokenizer: str) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=tokenizer))


def _with_what_is_fixed(config: TrainConfig, recorded: TrainConfig | None) -> TrainConfig:
    """The end of the decay, and the number of groups that are averaged, are fixed by the run's first start."""
    replica = config.replica
    if replica.averaging.method != "none" and replica.averaging.groups is None:
        groups = (recorded.replica.averaging.groups if recorded else None) or replica.groups
        averaging = dataclasses.replace(replica.averaging, groups=groups)
        config = dataclasses.replace(config, replica=dataclasses.replace(replica, averaging=averaging))
    if config.schedule.total_steps is not None:
        return config
    total = recorded.schedule.total_steps if recorded else config.training.steps
    return dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, total_steps=total))


def _recorded_config(run_directory: Path) -> TrainConfig | None:
    """The configuration that a run left in its directory or, should that be lost, in a checkpoint."""
    places = [run_directory / "config.json", *run_directory.glob(f"checkpoints/step-*/files/{RUN_CONFIG}")]
    path = next((place for place in places if place.is_file()), None)
    return None if path is None else read_config(path)


def _given(arguments: Sequence[str], field: str) -> str | None:
    """What the command line says of a field, before the rest of it is understood."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{field}", f"--{field.replace('-', '_')}", dest="value")
    return parser.parse_known_args(arguments)[0].value
