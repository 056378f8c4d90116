"""Where a process finds itself: its device, its rank, the meshes, and how ranks agree with each other."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist

from titan_core.degrees import Degrees, resolve_degrees
from titan_core.determinism import set_deterministic
from titan_core.mesh import Meshes, build_meshes, data_rank, sum_over
from titan_metrics.collectives import leave_nccl_dumps
from titan_train.config import TrainConfig
from titan_train.run_directory import own_folder
from titan_train.validate import validate

T = TypeVar("T")


class MainRankError(RuntimeError):
    """Rank 0 raised an error, and says so itself; the other ranks only stop."""


class DeviceError(RuntimeError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class Environment:
    """One process among `degrees.world_size`; `meshes` is None if it is the only one."""

    device: torch.device
    rank: int
    degrees: Degrees
    meshes: Meshes | None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes what is written once."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different rows."""
        return 0 if self.meshes is None else data_rank(self.meshes.data)

    @property
    def reads_first(self) -> bool:
        """Whether this process is the first of those that read the same rows (ranks along pp, cp and tp do)."""
        return self.meshes is None or all(self.meshes.data.get_local_rank(axis) == 0 for axis in ("pp", "cp", "tp"))

    @property
    def counts_rows(self) -> bool:
        """Whether what this process knows of its rows counts, where ranks with the same rows are added up."""
        return self.meshes is None or all(self.meshes.data.get_local_rank(axis) == 0 for axis in ("pp", "cp"))

    @property
    def stages(self) -> dist.ProcessGroup | None:
        """The ranks that hold other stages of the same pipeline, with this one; None without a pipeline."""
        return self.meshes.group("pp") if self.meshes is not None and self.degrees.pp > 1 else None

    def sum_loss(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums `tensor` in place over the ranks whose losses are of different tokens."""
        return tensor if self.meshes is None else sum_over(tensor, self.meshes.data)

    def gather_stages(self, values: dict[str, T]) -> dict[str, T]:
        """The `values`, which must be picklable, of all stages of this rank's pipeline."""
        if self.stages is None:
            return values
        parts: list[Any] = [None] * self.degrees.pp
        dist.all_gather_object(parts, values, group=self.stages)
        return {name: value for part in parts for name, value in part.items()}

    def gather(self, value: T) -> list[T]:
        """The `value`, which must be picklable, of every rank, in their order."""
        if self.meshes is None:
            return [value]
        values: list[Any] = [None] * self.degrees.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The sums of `numbers` over all ranks, on the CPU, so that no GPU waits; every rank gets the same."""
        if self.meshes is None:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums)
        return sums.tolist()

    def on_main(self, action: Callable[[], T]) -> T:
        """Calls `action` on rank 0 and returns its result, which must be picklable, on every rank.

        Raises:
            MainRankError: on the other ranks, if `action` raised on rank 0, which raises as it is.
        """
        return self._share(self.main_only(action))

    def main_only(self, action: Callable[[], T]) -> T | None:
        """Calls `action` on rank 0 and returns its result there, None elsewhere; raises as `on_main` does."""
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except Exception as raised:
                error = raised
        failed = self.agree([int(error is not None)])[0]
        if error is not None:
            raise error
        if failed:
            raise MainRankError("Rank 0 failed; its message says why.")
        return result

    def _share(self, value: Any) -> Any:
        if self.meshes is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def say(self, text: str) -> None:
        """Prints `text` once, on rank 0; a closed pipe or a full disk behind standard output never stops training."""
        if self.is_main:
            try:
                print(text, flush=True)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def device_name(self) -> str:
        """What the vendor calls the device, or `cpu`."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type


@contextlib.contextmanager
def environment(config: TrainConfig) -> Iterator[Environment]:
    """Picks the device and joins the other ranks, to leave them at the end; a group that is already there is used.

    Raises:
        DeviceError: if a GPU is asked for and there is none.
        ConfigError: if the device that was picked cannot do what is asked for.
    """
    set_deterministic(config.parallel.deterministic)
    device = _pick_device(config.device)
    if device.type == "cpu":
        # Torch reads it at its first allocation: large tensors then lie in huge pages where the system has them, which
        # saves tens of thousands of page faults a step.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if config.device == "auto":  # what was checked for any device may have no effect on this one
        validate(dataclasses.replace(config, device=cast(Literal["cpu", "cuda"], device.type)), world_size)
    degrees = resolve_degrees(config.parallel, world_size)
    if world_size == 1:
        yield Environment(device, 0, degrees, None)
        return
    joined = not dist.is_initialized()
    if joined:
        if config.watchdog.enabled and config.output:  # read when the group is made
            leave_nccl_dumps(own_folder(config) / "dumps")
        # Gloo beside nccl: the small numbers that ranks agree on stay on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        meshes = build_meshes(degrees, device.type, experts=config.model.moe is not None)
        yield Environment(device, dist.get_rank(), degrees, meshes)
    finally:
        if joined:
            dist.destroy_process_group()


def _pick_device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            "--device cuda: PyTorch sees no GPU here (torch.cuda.is_available() is False); use --device cpu, or "
            "install a driver and a CUDA or ROCm build of torch."
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"Local rank {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible; start at most as "
            "many processes on a machine as it has GPUs."
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
