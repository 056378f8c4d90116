"""`titan-doctor`: what each rank of a layout finds and can do, and which ranks are far from the others.

Assumes that every rank calls `examine` alike. Ranks measure at the same time, as they would work in a run; only clocks
are compared one after another.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from titan_ckpt.location import place_of
from titan_ckpt.place import Place
from titan_core.mesh import Meshes, build_meshes
from titan_metrics.probes.clocks import ClockOffset, clock_offsets
from titan_metrics.probes.compute import copy_bandwidth, matmul_rate
from titan_metrics.probes.disk import DiskSpeed, disk_speed
from titan_metrics.probes.host import describe_host, differences
from titan_metrics.probes.links import OPERATIONS, bus_bandwidth
from titan_metrics.probes.outliers import Outlier, Reading, find_apart, find_slow
from titan_train.config import TrainConfig
from titan_train.doctor_options import Options
from titan_train.environment import Environment, environment

T = TypeVar("T")

_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_CLOCK = "clock ahead of rank 0"


class ProbeError(RuntimeError):
    """Something could not be measured."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What rank 0 knows in the end."""

    layout: str
    host: Mapping[str, Any]
    """What rank 0 has found around itself."""
    differences: list[str]
    """What ranks have found that most ranks have not."""
    rates: list[Reading]
    """Of every rank; more is better."""
    clocks: Reading | None
    clock_error: float
    """Clocks are right within so many seconds."""
    outliers: list[Outlier]
    """The ranks that are far from the median."""


def examine(config: TrainConfig, options: Options) -> Findings:
    """Measures the devices, the axes of the mesh and the checkpoint folder of a run with this configuration.

    Raises:
        ProbeError: if a rank cannot use the checkpoint folder.
        LayoutError: if the configuration's degrees do not fit the ranks.
    """
    if config.device == "auto":
        config = dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")
    with environment(config) as env:
        hosts = _gather(env, describe_host())
        rates: list[Reading] = []
        clocks: list[ClockOffset] = []
        if "matmul" in options.probes:
            rates += _arithmetic(env, options)
        if "memory" in options.probes:
            rates.append(_memory(env, options))
        if "links" in options.probes:
            rates += _links(env, options)
        if "clocks" in options.probes and env.meshes is not None:
            clocks = clock_offsets()
        if "disk" in options.probes:
            rates += _disk(env, checkpoint_folder(config), options)
    reading = Reading(probe=_CLOCK, unit="s", values=tuple(clock.seconds for clock in clocks)) if clocks else None
    apart = find_apart(reading, bound=options.clock_seconds) if reading else []
    return Findings(
        layout=f"{env.degrees.world_size} {_layout(env)} on {env.device_name()}",
        host=hosts[0],
        differences=differences(hosts),
        rates=rates,
        clocks=reading,
        clock_error=max((clock.error for clock in clocks), default=0.0),
        outliers=[*find_slow(rates, share=options.slower_than), *apart],
    )


def checkpoint_folder(config: TrainConfig) -> Place:
    """Where a run with this configuration would save, or the nearest folder above that is there."""
    place = place_of(config.checkpoint.directory or config.output or "runs")
    if place.path is None:
        return place
    path = place.path.absolute()
    return place_of(next(folder for folder in (path, *path.parents) if folder.is_dir()))


def _layout(env: Environment) -> str:
    degrees = dataclasses.asdict(env.degrees)
    spelt = ", ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1)
    return f"ranks: {spelt}" if spelt else "rank"


def _gather(env: Environment, value: T) -> list[T]:
    """The `value` of every rank, which must be picklable, in rank order."""
    if env.meshes is None:
        return [value]
    values: list[Any] = [None] * env.degrees.world_size
    dist.all_gather_object(values, value)
    return values


def _together(env: Environment) -> None:
    if env.meshes is not None:
        env.agree([0])


def _reading(env: Environment, probe: str, unit: str, value: float) -> Reading:
    return Reading(probe=probe, unit=unit, values=tuple(_gather(env, value)))


def _arithmetic(env: Environment, options: Options) -> Iterator[Reading]:
    kind = env.device.type
    for name in _DTYPES[kind]:
        _together(env)
        dtype: torch.dtype = getattr(torch, name)
        rate = matmul_rate(env.device, dtype, size=_MATRIX_SIZE[kind], repetitions=options.repetitions)
        yield _reading(env, f"matmul {name}", "FLOP/s", rate)


def _memory(env: Environment, options: Options) -> Reading:
    _together(env)
    rate = copy_bandwidth(env.device, num_bytes=options.megabytes * 2**20, repetitions=options.repetitions)
    return _reading(env, "memory copy", "B/s", rate)


def _links(env: Environment, options: Options) -> Iterator[Reading]:
    for axis, group in _axes(env).items():
        for operation in OPERATIONS:
            _together(env)
            rate = bus_bandwidth(
                operation,
                group,
                env.device,
                num_bytes=options.megabytes * 2**20,
                repetitions=options.repetitions,
            )
            yield _reading(env, f"{operation} over {axis}", "B/s", rate)


def _axes(env: Environment) -> dict[str, ProcessGroup]:
    """The groups of this rank that a run would send to, by axis; those that are the same ranks stand once."""
    if env.meshes is None:
        return {}
    meshes: Meshes = env.meshes
    if meshes.experts is None and env.degrees.ep > 1:
        meshes = build_meshes(env.degrees, env.device.type, experts=True)
    found: dict[str, ProcessGroup] = {}
    for mesh in (meshes.data, meshes.dense, *filter(None, [meshes.experts])):
        for axis in mesh.mesh_dim_names or ():
            if mesh[axis].size() > 1 and axis not in found:
                found[axis] = mesh.get_group(axis)
    if env.degrees.cp == 1:  # then fsdp is dp_shard
        found.pop("fsdp", None)
    if len(found) > 1 and dist.group.WORLD is not None:
        found["all ranks"] = dist.group.WORLD
    return found


def _disk(env: Environment, place: Place, options: Options) -> list[Reading]:
    num_bytes = options.megabytes * 2**20
    failure, speed = "", DiskSpeed(0.0, 0.0)
    _together(env)
    try:
        speed = disk_speed(place.path, num_bytes) if place.path else _remote_speed(place, num_bytes, env.rank)
    except OSError as error:
        failure = f"{error.strerror or error}"
    failures = {rank: reason for rank, reason in enumerate(_gather(env, failure)) if reason}
    if failures:
        rank, reason = next(iter(failures.items()))
        raise ProbeError(
            f"Rank {rank} cannot write {options.megabytes} MiB to the checkpoint folder {place} and read them "
            f"({reason}), and a run could not save there; choose another with --checkpoint.directory or --output, or "
            "leave the disk out of --probes."
        )
    return [
        _reading(env, f"write to {place}", "B/s", speed.write),
        _reading(env, f"read from {place}", "B/s", speed.read),
    ]


def _remote_speed(place: Place, num_bytes: int, rank: int) -> DiskSpeed:
    """That of an object store, as a checkpoint is written there: hashed on the way."""
    name = f".probe-{rank}-{os.getpid()}"
    content = os.urandom(num_bytes)
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(place.remove, name)
        write = _seconds(lambda: place.write(name, content))
        read = _seconds(lambda: place.read(name))
    return DiskSpeed(num_bytes / write, num_bytes / read)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started
