"""Initial weights that do not depend on the layout.

Every number is a function of (seed, parameter name, place in the whole parameter). A rank draws only the rows that
it owns, so no large parameter is ever whole in memory, and any layout starts from the same bits.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from titan_core.roles import first_match
from titan_core.shards import local, owned

# Rows are drawn in panels of about this many numbers: large enough that re-keying the generator costs nothing,
# small enough that a rank wastes little where a panel reaches beyond its rows. Changing it changes the weights.
_PANEL_NUMBERS = 65_536
# Normal draws are cut at this many standard deviations, by clamping (redrawing would cost 15 times as much).
_CUT = 3.0


class InitError(ValueError):
    """A parameter or buffer has no initialisation rule, or its rule is unknown."""


def materialize(model: nn.Module, device: torch.device, *, parameters: torch.device | None = None) -> None:
    """Gives meta parameters and buffers uninitialised memory on `device`; shared ones stay shared.

    `parameters`: where these go instead, if it is elsewhere.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*own, *buffers]:
            if not tensor.is_meta:
                continue
            if tensor not in made:
                is_parameter = isinstance(tensor, nn.Parameter)
                empty = torch.empty_like(tensor, device=parameters if is_parameter and parameters else device)
                made[tensor] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
            setattr(module, name, made[tensor])


@torch.no_grad()
def init_parameters(model: nn.Module, rules: Mapping[str, tuple[str, float]], seed: int) -> None:
    """Fills every parameter and buffer by its rule: ("normal", standard deviation) or ("constant", value).

    `rules` maps FQN patterns (`*` stands for one part between dots) to rules; the first that fits counts. Normal
    numbers are cut at three standard deviations. Draws are made in float32 and rounded to the parameter's dtype.

    Raises:
        InitError: if a parameter or buffer has no rule or an unknown one; nothing is changed then.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    chosen = {fqn: _rule(fqn, rules) for fqn in parameters}
    # NumPy's generators release the interpreter's lock; ranks on one machine share its processors.
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with ThreadPoolExecutor(min(threads, 16)) as pool:
        for fqn, parameter in parameters.items():
            kind, value = chosen[fqn]
            if kind == "constant":
                local(parameter).fill_(value)
            else:
                drawn = draw_normal(tuple(parameter.shape), owned(parameter), value, seed, fqn, pool)
                local(parameter).copy_(torch.from_numpy(drawn))


def _rule(fqn: str, rules: Mapping[str, tuple[str, float]]) -> tuple[str, float]:
    pattern = first_match(rules, fqn)
    if pattern is None:
        raise InitError(f"{fqn!r} has no initialisation rule; add a pattern for it to the model's rules.")
    kind, value = rules[pattern]
    if kind not in ("normal", "constant"):
        raise InitError(f"Rule {pattern!r} is of the unknown kind {kind!r}; known are 'normal' and 'constant'.")
    return kind, value


def draw_normal(
    shape: tuple[int, ...], part: tuple[slice, ...], std: float, seed: int, name: str, pool: Executor | None = None
) -> np.ndarray:
    """The numbers at `part` of the float32 tensor of `shape` that belongs to (seed, name), drawn by `pool`'s threads.

    The tensor is seen as rows along its last dimension. Consecutive rows form panels; each panel has its own Philox
    stream (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by a 128-bit hash of seed and
    name, with the panel's number in the upper half of the counter.
    """
    *leading, width = shape if len(shape) > 1 else (1, *shape)
    *leading_part, columns = part if len(part) > 1 else (slice(0, 1), *part)
    rows = np.arange(int(np.prod(leading))).reshape(leading)[tuple(leading_part)].ravel()
    drawn = np.empty((rows.size, columns.stop - columns.start), dtype=np.float32)
    height = max(1, _PANEL_NUMBERS // width)
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "little")

    def draw_panel(panel: int, start: int, stop: int) -> None:
        stream = np.random.Generator(np.random.Philox(key=key, counter=panel << 128))
        numbers = stream.standard_normal((height, width), dtype=np.float32)
        drawn[start:stop] = numbers[rows[start:stop] - panel * height, columns]
        np.clip(drawn[start:stop], -_CUT, _CUT, out=drawn[start:stop])
        drawn[start:stop] *= np.float32(std)

    panels, starts = np.unique(rows // height, return_index=True)
    stops = np.append(starts, rows.size)[1:]
    for _ in (pool.map if pool else map)(draw_panel, panels.tolist(), starts, stops):
        pass  # each call fills its rows; iterating raises what it raised
    return drawn.reshape([s.stop - s.start for s in part])
