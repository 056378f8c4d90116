"""A function of whole matrices, such as an orthogonalisation, applied to parameters that are spread over ranks.

The work is shared out: each matrix has one *owner* among the ranks that have parts of it, or copies. In a *round* every
owner gets the parts of its matrices, applies the function, and sends each rank its part of the result. A matrix that
only one rank has, such as those of its own experts, moves nowhere. So results do not depend on the layout, and no rank
repeats another's work.

Words: a parameter [rows, columns] is a stack of one matrix, [1, rows, columns]; one of experts is a stack of E. A *box*
is a rank's part of a stack, a *place* a rank's number within its group. A *job* is a run of a stack's matrices with one
owner.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from titan_core.shards import is_dtensor, local

# How many elements of a stack the function sees at once, and how many a rank works on in a round; more only where one
# matrix has more.
_JOB_ELEMENTS = 2**23
_ROUND_ELEMENTS = 2**24

_Box = tuple[range, ...]
_Shape = tuple[int, ...]


def own_stack(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor` as a stack of matrices [n, rows, columns]."""
    part = local(tensor)
    return part if part.ndim == 3 else part[None]


class WholeMatrices:
    """Who computes what for `parameters` [rows, columns] or [E, rows, columns], in any order of sizes and layouts.

    Every rank that has parts of one of them makes this object with the same parameters in the same order.
    """

    def __init__(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> None:
        """`dtype`: that of the matrices which the function gets; ranks exchange it or the parameter's, the smaller."""
        self._dtype = dtype
        self._rounds: list[_Round] = []
        groups: dict[_Shape, ProcessGroup | None] = {}
        spreads: dict[tuple[Any, ...], _Spread] = {}
        teams: dict[tuple[Any, ...], list[tuple[int, _Spread]]] = {}
        for index, parameter in enumerate(parameters):
            ranks, device, kind = (0,), parameter.device, (parameter.shape,)
            if is_dtensor(parameter):
                # Not where the parameter is, since an offloaded one is neither sent nor multiplied there.
                mesh, device = parameter.device_mesh, torch.device(parameter.device_mesh.device_type)
                ranks = tuple(sorted(_coordinates(mesh)))
                if ranks not in groups:
                    groups[ranks] = _group(mesh, ranks)
                kind = (parameter.shape, mesh, parameter.placements)
            wire = min(dtype, parameter.dtype, key=lambda d: d.itemsize)
            if kind not in spreads:
                spreads[kind] = _Spread(parameter, ranks)
            teams.setdefault((ranks, wire, device), []).append((index, spreads[kind]))
        for (ranks, wire, device), members in teams.items():
            place = ranks.index(dist.get_rank()) if len(ranks) > 1 else 0
            for index, spread in members:
                spread.check(parameters[index], place)
            for jobs, shared in _rounds(members, place, len(ranks)):
                group = groups[ranks] if shared else None
                self._rounds.append(_Round(jobs, place, len(ranks), group, wire, device))

    def apply(
        self,
        function: Callable[[Tensor], Tensor],
        read: Callable[[int, slice], Tensor],
        write: Callable[[int, slice, Tensor], None],
    ) -> None:
        """Replaces matrices by `function` of them, which keeps shapes: [n, rows, columns], whole.

        `read(i, matrices)` gives this rank's part of matrices of the i-th stack, and `write(i, matrices, result)` takes
        its part of the result; `matrices` counts within the rank's part (see `own_stack`). Every part is written once,
        and read at most once. All ranks must call together.
        """
        for work in self._rounds:
            work.run(lambda whole: function(whole.to(self._dtype)), read, write)


class _Spread:
    """The box of each place, of one parameter."""

    def __init__(self, parameter: Tensor, ranks: Sequence[int]) -> None:
        self.shape: _Shape = (1,) * (3 - parameter.ndim) + tuple(parameter.shape)
        whole = tuple(range(size) for size in self.shape)
        self.boxes: list[_Box] = [whole]
        # Ranks with equal coordinates along the axes that copy have one copy of the parameter between them.
        self.copies: list[_Shape] = [()]
        if is_dtensor(parameter):
            shape, placements = parameter.device_mesh.shape, parameter.placements
            coordinates = _coordinates(parameter.device_mesh)
            first = 3 - parameter.ndim
            self.boxes = [whole[:first] + _box(whole[first:], shape, placements, coordinates[rank]) for rank in ranks]
            axes = [i for i, placement in enumerate(placements) if placement.is_replicate()]
            self.copies = [tuple(coordinates[rank][i] for i in axes) for rank in ranks]

    def check(self, parameter: Tensor, place: int) -> None:
        """Raises `RuntimeError` if the rank at `place` has another part of the parameter than its box says."""
        expected, found = [len(side) for side in self.boxes[place]], list(own_stack(parameter).shape)
        if expected != found:
            raise RuntimeError(
                f"A parameter of shape {tuple(parameter.shape)} is cut in an unknown way: this rank has {found} of it, "
                f"but {expected} follows from {getattr(parameter, 'placements', None)}. Cut each dimension with Shard "
                "in the order of the mesh's axes, or with FSDP after the others."
            )

    def runs(self) -> dict[range, list[int]]:
        """The runs of matrices into which the stack is cut -> the places that have parts of them."""
        found: dict[range, list[int]] = {}
        for place, (matrices, _, _) in enumerate(self.boxes):
            if matrices:
                found.setdefault(matrices, []).append(place)
        return found


def _coordinates(mesh: DeviceMesh) -> dict[int, _Shape]:
    """The ranks of `mesh` and where they are in it.

    Assumes that ranks are numbered evenly along each axis, as init_device_mesh does. The mesh's own tensor of ranks
    cannot be read while tensors are fake.
    """
    here = dist.get_rank()
    lines = [dist.get_process_group_ranks(mesh.get_group(axis)) for axis in range(mesh.ndim)]
    everywhere = itertools.product(*(range(len(line)) for line in lines))
    return {here + sum(line[c] - here for line, c in zip(lines, at, strict=True)): at for at in everywhere}


def _box(whole: _Box, mesh_shape: _Shape, placements: Sequence[Any], coordinate: _Shape) -> _Box:
    """The part of a tensor that the rank at `coordinate` has."""
    box = list(whole)
    axes = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    # Where FSDP cuts along a dimension that an inner axis has cut before, its placement denies to be a Shard.
    last = [i for i in axes if not placements[i].is_shard()]
    for i in [*(i for i in axes if i not in last), *last]:
        side = box[placements[i].dim]
        size = -(-len(side) // mesh_shape[i])
        box[placements[i].dim] = side[coordinate[i] * size : (coordinate[i] + 1) * size]
    return tuple(box)


def _group(mesh: DeviceMesh, ranks: _Shape) -> ProcessGroup | None:
    """A group of all ranks of `mesh`, sorted; None if there is one only."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    for axis in range(mesh.ndim):
        if mesh.size(axis) == len(ranks):
            return mesh.get_group(axis)
    # Only the mesh's ranks call; a pipeline's other stages have no part in it.
    return cast(ProcessGroup, dist.new_group(list(ranks), use_local_synchronization=True))


@dataclass(frozen=True)
class _Job:
    index: int
    """Of the parameter."""
    spread: _Spread
    matrices: range
    owner: int
    """Its place."""

    def held_by(self, place: int) -> bool:
        """Whether that rank has a part of the matrices, be it empty."""
        return self.matrices.start in self.spread.boxes[place][0]

    def sent_by(self, place: int) -> bool:
        """Whether the owner gets the part of that rank; if there are copies, those of its own."""
        return self.held_by(place) and self.spread.copies[place] == self.spread.copies[self.owner]

    def whole(self) -> _Shape:
        """The shape of the matrices."""
        return (len(self.matrices), *self.spread.shape[1:])

    def part(self, place: int) -> _Shape:
        """The shape of that rank's part of them."""
        _, rows, columns = self.spread.boxes[place]
        return len(self.matrices), len(rows), len(columns)

    def within(self, place: int) -> slice:
        """Which matrices they are in that rank's part of the stack."""
        start = self.matrices.start - self.spread.boxes[place][0].start
        return slice(start, start + len(self.matrices))

    def cut(self, whole: Tensor, place: int) -> Tensor:
        """That rank's part of the `whole` matrices, as a view."""
        _, rows, columns = self.spread.boxes[place]
        return whole[:, rows.start : rows.stop, columns.start : columns.stop]


def _rounds(members: Sequence[tuple[int, _Spread]], place: int, size: int) -> Iterator[tuple[list[_Job], bool]]:
    """The jobs of each round in which the rank at `place`, of `size`, takes part, and whether others do."""
    shared: list[tuple[int, int, _Spread, range, list[int]]] = []
    for index, spread in members:
        one = spread.shape[1] * spread.shape[2]
        for run, holders in spread.runs().items():
            pieces = min(len(run), -(-len(run) * one // _JOB_ELEMENTS))
            for i in range(pieces):
                matrices = run[len(run) * i // pieces : len(run) * (i + 1) // pieces]
                if len(holders) > 1:
                    shared.append((len(matrices) * one, index, spread, matrices, holders))
                elif place in holders:
                    yield [_Job(index, spread, matrices, place)], False
    shared.sort(key=lambda job: -job[0])
    while shared:
        # The first is the largest: a round of this size gives each rank about one such.
        limit, total, count = size * max(shared[0][0], _ROUND_ELEMENTS), 0, 0
        loads, jobs = [0.0] * size, []
        for elements, index, spread, matrices, holders in shared:
            total += elements
            if total > limit:
                break
            owner = min(holders, key=loads.__getitem__)
            loads[owner] += elements * min(spread.shape[1:])  # a matrix product's cost
            jobs.append(_Job(index, spread, matrices, owner))
            count += 1
        del shared[:count]
        yield [job for job in jobs if job.held_by(place)], True


@dataclass(frozen=True)
class _Round:
    """Jobs that the ranks of a group do at the same time; `group` is None if there are no others."""

    jobs: list[_Job]
    place: int
    size: int
    group: ProcessGroup | None
    dtype: torch.dtype
    device: torch.device

    def run(
        self,
        function: Callable[[Tensor], Tensor],
        read: Callable[[int, slice], Tensor],
        write: Callable[[int, slice, Tensor], None],
    ) -> None:
        """Both sides of each exchange go through the jobs in the same order."""
        place, places = self.place, range(self.size)
        parts: list[list[Tensor]] = [[] for _ in places]
        shapes: list[list[_Shape]] = [[] for _ in places]
        for job in self.jobs:
            if job.sent_by(place):
                parts[job.owner].append(read(job.index, job.within(place)).to(self.device, self.dtype))
            if job.owner == place:
                for sender in filter(job.sent_by, places):
                    shapes[sender].append(job.part(sender))
        arrived = self._exchange(parts, shapes)

        parts, shapes = [[] for _ in places], [[] for _ in places]
        for job in self.jobs:
            if job.owner == place:
                whole = torch.empty(job.whole(), dtype=self.dtype, device=self.device)
                for sender in filter(job.sent_by, places):
                    job.cut(whole, sender).copy_(next(arrived[sender]))
                result = function(whole).to(self.dtype)
                for holder in filter(job.held_by, places):
                    parts[holder].append(job.cut(result, holder))
            shapes[job.owner].append(job.part(place))
        arrived = self._exchange(parts, shapes)
        for job in self.jobs:
            write(job.index, job.within(place), next(arrived[job.owner]))

    def _exchange(self, parts: list[list[Tensor]], shapes: list[list[_Shape]]) -> list[Iterator[Tensor]]:
        """Sends `parts[i]` to place i; returns what arrives from each, of the given `shapes`."""
        if self.group is None:
            return [iter(own) for own in parts]
        flat = [part.flatten() for to_one in parts for part in to_one]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        sizes = [[torch.Size(shape).numel() for shape in from_one] for from_one in shapes]
        received = sent.new_empty(sum(map(sum, sizes)))
        dist.all_to_all_single(
            received,
            sent,
            [sum(from_one) for from_one in sizes],
            [sum(part.numel() for part in to_one) for to_one in parts],
            group=self.group,
        )
        pieces = iter(received.split(list(itertools.chain.from_iterable(sizes))))
        return [iter([next(pieces).view(shape) for shape in from_one]) for from_one in shapes]
