"""Hooks from outside of titan: `--hooks MODULE:NAME` names what makes one, as `--data.source` names a source.

What is named is called as `make(trainer, log)`, on every rank, once the run is built or resumed, and again when the
loss guard has gone back to a checkpoint. `trainer` is the `titan_train.trainer.Trainer`: its model, optimizer, layout,
configuration and environment; numbers that go to `log.attach` on rank 0 are in the next line of the metrics.
"""

import importlib
from collections.abc import Callable, Sequence

from titan_train.hooks import Hook


class HookError(ValueError):
    """A name in `hooks` stands for nothing, or for something that is no hook."""


def find_hooks(names: Sequence[str]) -> list[Callable[..., object]]:
    """What the names stand for, in their order.

    Raises:
        HookError: if there is no such module, or nothing of that name in it that can be called.
    """
    found = []
    for given in names:
        module_name, _, name = given.partition(":")
        if not module_name or not name:
            raise HookError(f"hooks: {given!r} is no MODULE:NAME, such as my_hooks:Alarm.")
        try:
            make = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError) as error:
            raise HookError(
                f"hooks: {given!r} cannot be imported ({error}). Install the module, or add its folder to PYTHONPATH."
            ) from error
        if not callable(make):
            raise HookError(f"hooks: {given!r} is a {type(make).__name__}, which cannot be called to make a hook.")
        found.append(make)
    return found


def open_hooks(names: Sequence[str], *given: object) -> list[Hook]:
    """What the names make of what is `given`, in their order.

    Raises:
        HookError: if something else than a `titan_train.hooks.Hook` is made.
    """
    hooks = []
    for name, make in zip(names, find_hooks(names), strict=True):
        hook = make(*given)
        if not isinstance(hook, Hook):
            raise HookError(f"hooks: {name!r} makes a {type(hook).__name__}; derive it from titan_train.hooks.Hook.")
        hooks.append(hook)
    return hooks
